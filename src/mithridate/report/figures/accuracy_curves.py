"""Accuracy along the steps, every run aligned at its trigger."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from mithridate.report.figures.drawing import (
    MARKS,
    PALETTE,
    Drawing,
    Look,
    label_left,
    legend,
    looks_of,
    panels,
    percent,
    saved,
    style,
    title,
)
from mithridate.report.figures.timeline import (
    AFTER,
    aligned,
    countdown,
    draw_steps,
    lines_by_panel,
    longest_phase,
    mean_line,
    placed,
    trigger_width,
)
from mithridate.report.rows import Row
from mithridate.report.wording import decimal, points


@style()
def accuracy_curves(rows: Sequence[Row]) -> Drawing | None:
    """Accuracy along the steps, every run aligned at its trigger.

    Args:
        rows: Rows of one data set and model.

    Returns:
        None if no run has a trace.

    Source:
        After Pang et al., NeurIPS 2021, Fig. 1.
    """
    lines, longest = lines_by_panel(rows), longest_phase(rows)
    if longest is None:
        return None
    figure, axes = panels(len(lines), width=3.9, height=3.0, least=6.4, top=0.7, share=True)
    looks = looks_of(name for members in lines.values() for name, _ in members)
    for ax, (heading, members) in zip(axes, lines.items(), strict=True):
        title(ax, heading)
        for name, row in members:
            _draw_runs(ax, row, longest, looks[name])
    _percent_axis(axes)
    for ax, members in zip(axes, lines.values(), strict=True):
        _mark_trigger(ax, longest)
        ax.xaxis.set_tick_params(labelbottom=True)
        _label_changes(ax, [row for _, row in members], longest)
    label_left(axes, "test accuracy (%)")
    figure.supxlabel("steps until the trigger", fontsize=9)
    legend(figure, looks, rows)
    floor = float(axes[0].get_ylim()[0])
    return saved(
        figure,
        rows[0],
        "accuracy",
        heading="Accuracy along the steps",
        caption="Every run ends at its trigger step (shaded), however long its phase. Thick: mean over seeds at "
        "steps that all of them have; band: from the lowest to the highest seed; thin: single runs. Numbers: "
        "mean change in the trigger step, in points; runs that a monitor halted have none and enter no mean. "
        f"The vertical axis starts at {decimal(floor, 0)} %.",
        alt="Line chart of test accuracy by steps until the trigger. "
        + " ".join(
            f"{row.cell}: from {points(before)} to {points(after)} percent in the trigger step."
            for row in rows
            if (before := row.statistic("accuracy_before_trigger").mean) is not None
            and (after := row.statistic("accuracy_after_trigger").mean) is not None
        ),
    )


def _draw_runs(ax: Axes, row: Row, longest: float, look: Look) -> None:
    for run in row.runs:
        curve = placed({place: 100 * value for place, value in aligned(run, "accuracy").items()}, longest)
        ax.plot(list(curve), list(curve.values()), color=look.colour, linewidth=0.8, alpha=0.45, zorder=2)
        mark = MARKS.get(str(run.summary.get("status")))
        if mark and curve:
            last = max(curve)
            ax.plot(
                [last],
                [curve[last]],
                marker=mark,
                color=look.colour,
                markersize=9,
                markeredgewidth=1.8 if mark == "x" else 0.5,
                markeredgecolor=look.colour if mark == "x" else PALETTE["paper"],
                zorder=4,
            )
    line = placed(percent(mean_line(row, "accuracy")), longest)
    draw_steps(ax, line, look, marked=[len(line) - 2, len(line) - 1])


def _percent_axis(axes: Sequence[Axes]) -> None:
    values = [y for ax in axes for line in ax.lines for y in np.asarray(line.get_ydata(), dtype=float)]
    low, high = min(values, default=0.0), max(values, default=100.0)
    pad = max(1.0, 0.06 * (high - low))
    axes[0].set_ylim(max(-1.0, low - pad), min(high + pad, 101.0))


def _mark_trigger(ax: Axes, longest: float) -> None:
    """The dashed line before the trigger, the shaded step, and ticks that count down to it."""
    width = trigger_width(longest)
    ax.axvspan(0, width, color=PALETTE["shade"], zorder=0)
    ax.axvline(0, color=PALETTE["edge"], linestyle="--", linewidth=1.2, zorder=1)
    ax.axvline(width, color=PALETTE["faint"], linewidth=0.8, zorder=1)
    early = countdown(longest, 0)
    ax.set_xticks([*(-steps for steps in early), 0, width], [*map(str, early), "before", "after"])
    ax.grid(visible=False, axis="x")
    ax.set_xlim(-longest - 0.06 * (longest + width), width + 0.16 * (longest + width))


def _label_changes(ax: Axes, rows: Sequence[Row], longest: float) -> None:
    """Mean change in the trigger step, to the right of each line's end, moved apart where they would overlap."""
    ends = []
    for row in rows:
        change = row.difference("accuracy_after_trigger", "accuracy_before_trigger").mean
        after = mean_line(row, "accuracy").get(AFTER)
        if change is not None and after is not None:
            ends.append((100 * after[0], f"{100 * change:+z.1f}"))
    low, high = ax.get_ylim()
    width = trigger_width(longest)
    heights = spread_out([end for end, _ in ends], 0.065 * (high - low), low, high)
    for height, (end, text) in zip(heights, ends, strict=True):
        ax.annotate(
            text,
            (width, end),
            (width + 0.035 * (longest + width), height),
            va="center",
            fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": PALETTE["faint"], "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
        )


def spread_out(heights: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Heights moved as little as a sweep can so that neighbours are `distance` apart and, if there is room, inside.

    >>> spread_out([1.0, 1.0], 2.0, 0.0, 10.0)
    [1.0, 3.0]
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    floor = low
    for i in order:
        placed[i] = max(placed[i], floor)
        floor = placed[i] + distance
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - distance
    return placed
