"""What each attack cost, with its interval beside what is allowed."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from mithridate.audit.output.evidence import points, side_name
from mithridate.audit.result import WHERE, Audited, Ruled, Says, Side
from mithridate.report.figures.drawing import PALETTE, Drawing, fitting, panels, rendered, style, title

COLOURS: Mapping[Says, str] = {"above": PALETTE["red"], "below": PALETTE["green"]}
OTHER = PALETTE["edge"]

FARTHEST = 105.0
"""The end of the axis, in points; an interval that goes on beyond it is cut there."""


def intervals(audited: Audited) -> list[Drawing]:
    """A figure a side, the one that the verdict is of first; none of a side without an interval."""
    return [_drawn(side) for side in reversed(audited.sides) if any(r.cost.low is not None for r in side.rulings)]


def _drawn(side: Side) -> Drawing:
    shown = [r for r in side.rulings if r.cost.low is not None]
    by = {measure: [r for r in shown if r.measure == measure] for measure in WHERE}
    by = {measure: rows for measure, rows in by.items() if rows}
    with style():
        figure, axes = panels(len(by), width=3.6, height=0.6 + 0.27 * max(map(len, by.values())), top=0.2)
        for ax, (measure, rows) in zip(axes, by.items(), strict=True):
            _panel(ax, rows, WHERE[measure])
        return rendered(
            figure,
            stem=f"intervals-{'guarded' if side.guarded else 'unguarded'}",
            heading=f"The model {side_name(side)}",
            caption="Points of accuracy: mean over paired seeds and its 95 % interval. The dashed line is what is "
            "allowed: an interval to the right of it is too much, one to the left is within. In italics: clean streams "
            "and noise.",
            alt=f"Intervals of what each attack cost the model {side_name(side)}. "
            + " ".join(f"{r.attack}, {r.measure}: {points(r.cost)} points, {r.allowed:g} allowed." for r in shown),
        )


def _panel(ax: Axes, rows: Sequence[Ruled], heading: str) -> None:
    rows = sorted(rows, key=lambda r: (not r.control, r.cost.mean or 0.0))
    for place, r in enumerate(rows):
        low, mean, high = (math.nan if value is None else value for value in (r.cost.low, r.cost.mean, r.cost.high))
        colour = COLOURS.get(r.says, OTHER)
        ends = [max(low, -FARTHEST / 5), min(high, FARTHEST)]
        ax.plot(ends, [place, place], color=colour, linewidth=2.4, solid_capstyle="butt")
        ax.plot([mean], [place], color=colour, marker="o", markersize=5.5)
    ax.axvline(rows[0].allowed, color=PALETTE["ink"], linestyle="--", linewidth=1)
    ax.axvline(0, color=PALETTE["faint"], linewidth=0.8)
    ax.set_yticks(range(len(rows)), [fitting(r.attack) for r in rows])
    for label, r in zip(ax.get_yticklabels(), rows, strict=True):
        label.set_fontstyle("italic" if r.control else "normal")
    ax.set_ylim(-0.7, len(rows) - 0.3)
    left, right = ax.get_xlim()
    ax.set_xlim(max(left, -FARTHEST / 5), min(max(right, 1.3 * rows[0].allowed), FARTHEST))
    ax.set_xlabel("points of accuracy")
    title(ax, heading)
