"""Runs of any length, aligned at their trigger: their steps, their mean lines and the axis that counts down to it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mithridate.bench.store import Run
from mithridate.report.figures.drawing import COLOURS, PALETTE, Band, Line, Look, draw_mean, over_seeds
from mithridate.report.rows import Row
from mithridate.report.wording import number

MAX_LINES = len(COLOURS)
"""More attacks than this, and each gets its own panel with a line a defence."""

MAX_MARKED, MAX_DASHED = 30, 200
"""Lines of more points have few markers, or no dashes and are thin: anything else would hide them."""

DRAWABLE = 1e30
"""Larger numbers come from a model that has blown up; no axis holds them."""

BEFORE, AFTER = 0, 1
"""Where the states before and after the trigger step stand; earlier states are negative: minus the steps to go."""

T = TypeVar("T")


def by_step(run: Run, column: str) -> dict[float, float]:
    """A column of the trace by step; values that are missing, not finite or beyond `DRAWABLE` are left out.

    Args:
        run: The run.
        column: One of the trace's columns.
    """
    values = ((int(step["step"]), number(step.get(column))) for step in run.trace)
    return {step: value for step, value in values if value is not None and abs(value) < DRAWABLE}


def aligned(run: Run, column: str) -> dict[float, float]:
    """A column of the trace by position: `AFTER` the trigger, `BEFORE` it, negative numbers for the steps to go.

    A run without a trigger ends at `BEFORE`. Values are left out as in `by_step`.

    Args:
        run: The run.
        column: One of the trace's columns.
    """
    triggers = [int(step["step"]) for step in run.trace if step["phase"] == "trigger"]
    end = triggers[0] - 1 if triggers else max((int(step["step"]) for step in run.trace), default=0)
    return {step - end: value for step, value in by_step(run, column).items() if step - end <= AFTER}


def longest_phase(rows: Sequence[Row]) -> float | None:
    """Steps before the trigger in the longest run; None if no run has a trace."""
    places = [place for row in rows for run in row.runs for place in aligned(run, "accuracy")]
    return max(0, -min(places)) if places else None


def lines_by_panel(rows: Sequence[Row]) -> dict[str, list[tuple[str, Row]]]:
    """Panels by title, each with its named lines: one a defence, or one an attack where there are too many attacks."""
    attacks, defences = {row.attack for row in rows}, {row.defence for row in rows}
    by_attack = len(attacks) > MAX_LINES >= len(defences)
    panels: dict[str, list[tuple[str, Row]]] = {}
    for row in rows:
        title, name = (row.attack, row.defence) if by_attack else (row.defence, row.attack)
        panels.setdefault(f"{'attack' if by_attack else 'defence'}: {title}", []).append((name, row))
    return panels


def mean_line(row: Row, column: str) -> dict[float, Band]:
    """Mean and band over the runs with a trigger step, or over all if none has one: a mean never mixes the two."""
    with_trigger = [run for run in row.runs if AFTER in aligned(run, "step")]
    return over_seeds(aligned(run, column) for run in with_trigger or row.runs)


def trigger_width(longest: float) -> float:
    """Width of the trigger step in the drawing: one step, but never too narrow to see."""
    return max(1.0, 0.22 * longest)


def placed(values: Mapping[float, T], longest: float) -> dict[float, T]:
    """Values by the place where they are drawn: what is `AFTER` the trigger, at the end of its step.

    Args:
        values: By position, as in `aligned`.
        longest: Steps before the trigger in the longest run; see `longest_phase`.
    """
    return {trigger_width(longest) if place == AFTER else place: value for place, value in values.items()}


def draw_steps(ax: Axes, line: Line, look: Look, *, marked: int | list[int]) -> None:
    """A mean line with a point a step: thin and without dashes if it has very many.

    Args:
        ax: Where.
        line: The numbers.
        look: How the line is told from others.
        marked: Which points have a marker if not all can have one.
    """
    crowded = len(line) > MAX_DASHED
    draw_mean(
        ax,
        line,
        replace(look, dashes="-") if crowded else look,
        width=1.2 if crowded else 2.0,
        marked=1 if len(line) <= MAX_MARKED else marked,
    )


def mark_batches(ax: Axes, longest: float) -> None:
    """The trigger batch shaded, and ticks that count the batches down to it; for what is measured of a batch."""
    width = trigger_width(longest)
    ax.axvspan(width / 2, width * 1.5, color=PALETTE["shade"], zorder=0)
    early = countdown(longest, 1)
    ax.set_xticks([*(1 - steps for steps in early), width], [*map(str, early), "trigger"])
    ax.grid(visible=False, axis="x")
    ax.set_xlim(min(0, 1 - longest) - 0.06 * (longest + width), width * 1.5)


def countdown(longest: float, last: int) -> list[int]:
    """Round numbers of steps from `longest` down, and `last`; no other so near to it that labels would touch."""
    room = max(1.0, 0.12 * longest)
    ticks = MaxNLocator(5, integer=True).tick_values(0, longest) if longest else []
    early = {int(tick) for tick in ticks if last + room <= tick <= longest}
    return sorted(early | ({last} if 0 < last <= longest else set()), reverse=True)
