"""What a guard measured along the steps of a loop, and the steps that it took back."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mithridate.guard.record import StepRecord
from mithridate.report.figures.drawing import COLOURS, PALETTE, Drawing, rendered, style
from mithridate.report.wording import number

KEPT, REFUSED, SHORTENED = COLOURS[1], COLOURS[3], COLOURS[2]

MOST_POINTS = 2000
"""Points that are drawn of a line; of more, the highest and lowest of each stretch."""

PANELS: Mapping[str, tuple[Callable[[StepRecord], float | None], str]] = {
    "trusted_loss": (lambda record: record.trusted_loss, "loss on the trusted set"),
    "trusted_worst": (
        lambda record: None if record.trusted_worst is None else 100 * record.trusted_worst,
        "accuracy of its worst class (%)",
    ),
    "refusals_in_a_row": (lambda record: float(record.refusals_in_a_row), "refusals in a row"),
}


@style()
def guarded_steps(records: Sequence[StepRecord]) -> Drawing | None:
    """Loss and worst class on the trusted set, and refusals in a row, along the attempted steps.

    Args:
        records: Of one rank, in order.

    Returns:
        None if there is nothing to draw: no step, or neither a measure nor a refusal.
    """
    curves = {name: _values(records, read) for name, (read, _) in PANELS.items()}
    curves = {name: values for name, values in curves.items() if values}
    if not any(curves.get("refusals_in_a_row", {}).values()):
        curves.pop("refusals_in_a_row", None)
    if not curves:
        return None
    refused = [record.attempt for record in records if record.verdict == "refused"]
    shortened = [record.attempt for record in records if record.verdict == "shortened"]
    last_of_warm_up = max((record.attempt for record in records if record.warm_up), default=0)
    figure = Figure(layout="constrained")
    figure.set_size_inches(9.6, 0.7 + 2.0 * len(curves))
    axes = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (name, values) in zip(axes, curves.items(), strict=True):
        ax.set_title(PANELS[name][1], loc="left")
        if name == "refusals_in_a_row":
            attempts, lengths = _columns(_thinned(values))
            ax.fill_between(attempts, lengths, step="mid", color=REFUSED, alpha=0.35, linewidth=1.0)
            ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            ax.set_ylim(bottom=0)
        else:
            _draw(ax, values, refused, shortened, last_of_warm_up)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for start, end in _spans(records):
            ax.axvspan(start - 0.5, end + 0.5, color=PALETTE["shade"], linewidth=0, zorder=0)
    axes[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes[-1].set_xlabel("attempted steps")
    marks = {
        "steps that stayed": Line2D([], [], color=KEPT),
        "shortened": Line2D([], [], color=SHORTENED, linestyle="", marker="D", markersize=5),
        "refused": Line2D([], [], color=REFUSED, linestyle="", marker="X", markersize=6),
    }
    there = {"shortened": bool(shortened), "refused": bool(refused)}
    shown = {name: mark for name, mark in marks.items() if there.get(name, True)}
    if curves.keys() - {"refusals_in_a_row"}:
        figure.legend(list(shown.values()), list(shown), loc="outside upper left", ncols=3)
    warm_up = (
        " Grey: the warm-up, in which the guard only watches; the axes are made for the steps after it."
        if any(r.warm_up for r in records)
        else ""
    )
    return rendered(
        figure,
        stem="guarded-steps",
        heading="Along the steps",
        caption="What each attempted step led to, on the trusted set. A refused step was taken back: the line goes on "
        "from the state before it, and its mark shows where it would have led, at an edge if that is beyond it, and at "
        f"the lower one if it was not measured.{warm_up}",
        alt=f"Line charts along the attempted steps of {' and '.join(PANELS[name][1] for name in curves)}; "
        f"{len(refused)} refused steps are marked.",
    )


def _values(records: Sequence[StepRecord], read: Callable[[StepRecord], float | None]) -> dict[int, float]:
    """A measure by attempt, where it is a finite number."""
    values = ((record.attempt, number(read(record))) for record in records)
    return {attempt: value for attempt, value in values if value is not None}


def _draw(
    ax: Axes, values: Mapping[int, float], refused: Sequence[int], shortened: Sequence[int], warm_up: int
) -> None:
    """The line of the steps that stayed, and marks for the others, all of them inside the axes."""
    gone = set(refused)
    kept = {attempt: value for attempt, value in values.items() if attempt not in gone}
    line = _thinned(kept)
    ax.plot(*_columns(line), color=KEPT, linewidth=1.4 if len(line) < 200 else 1.0)
    low, high = _range({a: value for a, value in kept.items() if a > warm_up} or kept or values)
    ax.set_ylim(low, high)
    inside = 0.04 * (high - low)
    for attempts, colour, marker, size in ((shortened, SHORTENED, "D", 4.5), (refused, REFUSED, "X", 6.0)):
        places = {a: min(max(values.get(a, low), low + inside), high - inside) for a in attempts}
        ax.plot(
            *_columns(_thinned(places)),
            color=colour,
            linestyle="",
            marker=marker,
            markersize=size,
            markeredgecolor=PALETTE["paper"],
            markeredgewidth=0.6,
            zorder=4,
        )


def _range(values: Mapping[int, float]) -> tuple[float, float]:
    """The ends of an axis that shows most values well: a spike does not flatten all others."""
    ordered = np.sort(np.fromiter(values.values(), float))
    low, typical = float(ordered[0]), float(np.quantile(ordered, 0.98))
    span = max(typical - low, 0.05 * max(abs(typical), 1e-6))
    high = min(float(ordered[-1]), typical + span)
    return low - 0.1 * (high - low) - 0.05 * span, high + 0.35 * span


def _thinned(values: Mapping[int, float]) -> dict[int, float]:
    """At most about `MOST_POINTS` of the values: of each stretch of attempts the lowest and the highest."""
    if len(values) <= MOST_POINTS:
        return dict(values)
    attempts = list(values)
    chosen: set[int] = set()
    for stretch in np.array_split(np.array(attempts), MOST_POINTS // 2):
        members = [int(attempt) for attempt in stretch]
        chosen |= {min(members, key=values.__getitem__), max(members, key=values.__getitem__)}
    return {attempt: values[attempt] for attempt in attempts if attempt in chosen}


def _columns(values: Mapping[int, float]) -> tuple[list[int], list[float]]:
    return list(values), list(values.values())


def _spans(records: Sequence[StepRecord]) -> list[tuple[int, int]]:
    """First and last attempt of each stretch of warm-up."""
    spans: list[tuple[int, int]] = []
    inside = False
    for record in records:
        if record.warm_up:
            spans = [*spans[:-1], (spans[-1][0], record.attempt)] if inside else [*spans, (record.attempt,) * 2]
        inside = record.warm_up
    return spans
