"""Accuracy after the trigger round against accuracy before it: how secret and how destructive attacks are."""

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.axes import Axes

from mithridate.report.federation import attack_setting, by_bound, by_strength
from mithridate.report.figures.drawing import PALETTE, Drawing, Look, legend, looks_of, panels, saved, style, title
from mithridate.report.rows import Row
from mithridate.report.settings import flattened, shared
from mithridate.report.statistic import Statistic
from mithridate.report.wording import MISSING, listed, number, points

BEFORE, AFTER = "accuracy_before_trigger", "accuracy_after_trigger"
"""What the axes show."""

ENDS = frozenset({"label", "max_rounds", "accuracy_floor", "max_drop"})
"""Settings of an attack that say what it is called or when its phase ends, not what is sent in it."""

CORNERS = ((1, 1), (-1, -1), (1, -1), (-1, 1))
"""On which side of the points the numbers of rounds stand, line by line, so that close lines do not hide them."""

FAINT = 0.25
"""Opacity of bars, which overlap where phases are about as secret as each other."""

MARGIN = 0.06
"""Room around the points of a panel, relative to what they span."""


@style()
def secrecy(rows: Sequence[Row]) -> Drawing | None:
    """Accuracy after the trigger round against accuracy before it, of accumulative attacks: a line a weight of G_t.

    Args:
        rows: Rows of one data set and model; those of federations are shown.

    Returns:
        None if no accumulative attack reached its trigger.

    Source:
        After Pang et al., NeurIPS 2021, Fig. 3 (b).
    """
    shown = accumulative_lines([row for row in by_bound(rows) if row.federated])
    if not shown:
        return None
    looks = looks_of(name for lines in shown.values() for name in lines)
    figure, axes = panels(len(shown), width=3.7, height=3.3, least=5.2, top=0.7, share=True)
    for ax, (defence, lines) in zip(axes, shown.items(), strict=True):
        title(ax, f"defence: {defence}")
        for i, (name, line) in enumerate(lines.items()):
            _draw_points(ax, line, looks[name], CORNERS[i % len(CORNERS)])
        ax.xaxis.set_tick_params(labelbottom=True)
    every = [row for lines in shown.values() for line in lines.values() for row in line]
    axes[0].set_xlim(_limits([row.statistic(BEFORE) for row in every]))
    axes[0].set_ylim(_limits([row.statistic(AFTER) for row in every]))
    for ax in axes:
        ax.axline((50, 50), slope=1, color=PALETTE["faint"], linestyle=":", linewidth=1.2, zorder=1)
    figure.supxlabel("accuracy before the trigger round (%)", fontsize=9)
    figure.supylabel("accuracy after the trigger round (%)", fontsize=9)
    legend(figure, looks)
    return saved(
        figure,
        rows[0],
        "secrecy",
        heading="Secrecy against destruction",
        caption="One point an accumulative phase; lines join phases of one weight lam, the shortest and the "
        "longest with the number of their rounds. Towards the right the phase is more secret (less accuracy lost "
        "before the trigger round), towards the bottom the trigger round destroys more: towards the bottom right "
        "is worse for the model. On the dotted line the trigger round changes nothing. Means over seeds; bars: one "
        "standard deviation.",
        alt="Scatter plot of accuracy after the trigger round by accuracy before it. "
        + " ".join(
            f"{defence}, {name}: "
            + listed([f"{_percent(r, BEFORE)} to {_percent(r, AFTER)} percent after {_rounds(r)} rounds" for r in line])
            + "."
            for defence, lines in shown.items()
            for name, line in lines.items()
        ),
    )


def accumulative_lines(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """The cells of accumulative attacks, short phases first: by defence, then by what tells the lines apart.

    Args:
        rows: Federated rows of one data set and model. Attacks that differ in their length, or in what ends them, make
            one line; other settings that differ are named beside lam.

    Returns:
        Rows with the runs that reached their trigger.
    """
    tried = [
        replace(row, runs=reached)
        for row in rows
        if row.attack_name == "accumulative"
        and (reached := tuple(run for run in row.runs if number(run.summary.get("drop")) is not None))
    ]
    if not tried:
        return {}
    tables = {row.cell: flattened(row.attack_settings) for row in tried}
    unnamed = {*shared(list(tables.values())), *ENDS, "lam"}
    by_defence: dict[str, dict[str, list[Row]]] = {row.defence: {} for row in tried}
    for row in by_strength(tried):
        others = [f"{key} = {value}" for key, value in tables[row.cell].items() if key not in unnamed]
        name = ", ".join([f"lam = {attack_setting(row, 'lam') or MISSING}", *others])
        by_defence[row.defence].setdefault(name, []).append(row)
    return by_defence


def _percent(row: Row, metric: str) -> str:
    return points(row.statistic(metric).mean or 0)


def _rounds(row: Row) -> str:
    return f"{round(row.mean_steps, 1):g}"


def _draw_points(ax: Axes, line: Sequence[Row], look: Look, corner: tuple[int, int]) -> None:
    sides = [[row.statistic(metric) for row in line] for metric in (BEFORE, AFTER)]
    x, y = ([100 * (statistic.mean or 0) for statistic in side] for side in sides)
    across, along = ([100 * (statistic.std or 0) for statistic in side] for side in sides)
    drawn = ax.errorbar(
        x,
        y,
        xerr=across if any(across) else None,
        yerr=along if any(along) else None,
        color=look.colour,
        linestyle=look.dashes,
        linewidth=1.4,
        elinewidth=0.8,
        marker=look.marker,
        markersize=6,
        zorder=3,
    )
    for bar in drawn[2]:
        bar.set_alpha(FAINT)
    for i in sorted({0, len(line) - 1}):
        ax.annotate(
            _rounds(line[i]),
            (x[i], y[i]),
            (6 * corner[0], 6 * corner[1]),
            textcoords="offset points",
            ha="left" if corner[0] > 0 else "right",
            va="bottom" if corner[1] > 0 else "top",
            fontsize=8,
        )


def _limits(side: Sequence[Statistic]) -> tuple[float, float]:
    """Ends of an axis with room for all points and their bars; it spans two points of accuracy at least."""
    ends = [min(100.0, max(0.0, 100 * ((s.mean or 0) + sign * (s.std or 0)))) for s in side for sign in (-1, 1)]
    pad = max(1.0, MARGIN * (max(ends) - min(ends)))
    return min(ends) - pad, max(ends) + 1.5 * pad
