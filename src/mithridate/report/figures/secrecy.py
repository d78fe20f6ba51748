"""What federations add to a report: convergence under clipping, secrecy against destruction, a table by bound.

All three show federated runs only; of online runs there is nothing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mithridate.bench.store import Run
from mithridate.report.figures.drawing import (
    MAX_COLUMNS,
    MAX_DASHED,
    MAX_MARKED,
    Drawing,
    Look,
    common,
    fitting,
    legend,
    looks_of,
    saved,
    style,
)
from mithridate.report.page import TableSection
from mithridate.report.rows import Row, Statistic, flattened, shared, spread
from mithridate.report.wording import MISSING, decimal, file_stem, listed, number, points

NORMS = ("l2", "linf")
"""The norms of clipping, in the order of the paper's tables."""

ENDS = frozenset({"label", "max_rounds", "accuracy_floor", "max_drop"})
"""Settings of an attack that say what it is called or when its phase ends, not what is sent in it."""

CORNERS = ((1, 1), (-1, -1), (1, -1), (-1, 1))
"""Where the numbers of rounds stand beside the points, line by line, so that close lines do not hide them."""

FAINT = 0.25
"""Opacity of bars, which overlap where phases are about as secret as each other."""

MARGIN = 0.06
"""Room around the points of a panel, relative to what they span."""


@dataclass(frozen=True)
class Point:
    """One accumulative attack of one length.

    Args:
        rounds: Mean number of rounds before the trigger.
        before: Accuracy before the trigger round, fractions.
        after: The same after it, of the same runs.
    """

    rounds: float
    before: Statistic
    after: Statistic


def federated_drawings(rows: Sequence[Row]) -> list[Drawing]:
    """The figures of one data set and model, those that have something to show.

    Args:
        rows: Rows of one data set and model.
    """
    federated = [row for row in rows if row.federated]
    return [drawing for drawing in (convergence(federated), secrecy(federated)) if drawing is not None]


def convergence(rows: Sequence[Row]) -> Drawing | None:
    """Accuracy along the rounds where nothing is attacked, a line a defence: its longest federation.

    Args:
        rows: Federated rows of one data set and model.

    Returns:
        None if under fewer than two defences an unattacked federation took rounds.

    Source:
        After Pang et al., NeurIPS 2021, Fig. 3 (a).
    """
    clean = [row for row in by_bound(rows) if not row.attacking and row.has_phase and any(map(_curve, row.runs))]
    longest = {row.defence: row for row in sorted(clean, key=lambda row: row.statistic("steps").mean or 0)}
    shown = [row for row in clean if longest[row.defence] is row]
    if len(shown) < 2:
        return None
    looks = looks_of(row.defence for row in shown)
    with style():
        figure = Figure(layout="constrained", figsize=(6.4, 3.7))
        ax = figure.subplots()
        for row in shown:
            _draw_rounds(ax, row, looks[row.defence])
        ax.set_xlabel("round")
        ax.set_ylabel("test accuracy (%)")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(figure, looks, [])
        floor = float(ax.get_ylim()[0])
        return saved(
            figure,
            shown[0],
            stem=file_stem("convergence", *shown[0].group),
            heading="Convergence under each defence",
            caption="Nothing is attacked here: a line that rises more slowly than that without a defence, or ends "
            "lower, is what the defence costs. Round 0 is the model after its burn-in. Mean over seeds at rounds that "
            f"all have; band: from the lowest to the highest. The vertical axis starts at {decimal(floor, 0)} %.",
            alt="Line chart of test accuracy by round, without an attack. "
            + " ".join(
                f"{row.defence}: ends at {points(end)} percent."
                for row in shown
                if (end := row.statistic("accuracy_after_trigger").mean) is not None
            ),
        )


def secrecy(rows: Sequence[Row]) -> Drawing | None:
    """Accuracy after the trigger round against accuracy before it, of accumulative attacks: a line a weight of G_t.

    Args:
        rows: Federated rows of one data set and model.

    Returns:
        None if no accumulative attack reached its trigger.

    Source:
        After Pang et al., NeurIPS 2021, Fig. 3 (b).
    """
    panels = accumulative_points(by_bound(rows))
    if not panels:
        return None
    looks = looks_of(name for lines in panels.values() for name in lines)
    with style():
        figure = Figure(layout="constrained")
        n_columns = min(len(panels), MAX_COLUMNS)
        n_lines = -(-len(panels) // n_columns)
        figure.set_size_inches(max(5.2, 3.7 * n_columns), 0.7 + 3.3 * n_lines)
        axes = figure.subplots(n_lines, n_columns, sharex=True, sharey=True, squeeze=False)
        for ax, (defence, lines) in zip(axes.flat, panels.items(), strict=False):
            ax.set_title(fitting(f"defence: {defence}"), loc="left", fontweight="bold")
            for i, (name, line) in enumerate(lines.items()):
                _draw_points(ax, line, looks[name], CORNERS[i % len(CORNERS)])
            ax.xaxis.set_tick_params(labelbottom=True)
        every = [point for lines in panels.values() for line in lines.values() for point in line]
        _limits(axes[0, 0], every)
        for ax in list(axes.flat)[: len(panels)]:
            ax.axline((50, 50), slope=1, color="#999999", linestyle=":", linewidth=1.2, zorder=1)
        for ax in list(axes.flat)[len(panels) :]:
            ax.remove()
        figure.supxlabel("accuracy before the trigger round (%)", fontsize=9)
        figure.supylabel("accuracy after the trigger round (%)", fontsize=9)
        legend(figure, looks, [])
        return saved(
            figure,
            rows[0],
            stem=file_stem("secrecy", *rows[0].group),
            heading="Secrecy against destruction",
            caption="One point an accumulative phase; lines join phases of one weight lam, the shortest and the "
            "longest with the number of their rounds. Towards the right the phase is more secret (less accuracy lost "
            "before the trigger round), towards the bottom the trigger round destroys more: towards the bottom right "
            "is worse for the model. On the dotted line the trigger round changes nothing. Means over seeds; bars: one "
            "standard deviation.",
            alt="Scatter plot of accuracy after the trigger round by accuracy before it. "
            + " ".join(
                f"{defence}, {name}: "
                + listed(
                    [f"{_percent(p.before)} to {_percent(p.after)} percent after {p.rounds:g} rounds" for p in line]
                )
                + "."
                for defence, lines in panels.items()
                for name, line in lines.items()
            ),
        )


def accumulative_points(rows: Sequence[Row]) -> dict[str, dict[str, list[Point]]]:
    """The points of every accumulative attack, short phases first: by defence, then by what tells the lines apart.

    Args:
        rows: Federated rows of one data set and model. Attacks that differ in their length, or in what ends them, make
            one line; other settings that differ are named beside lam.
    """
    tried = [row for row in rows if row.attack_name == "accumulative" and row.statistic("drop").n]
    if not tried:
        return {}
    tables = {row.cell: flattened(_table(row.runs[0], "attack")) for row in tried}
    common_to_all = shared(list(tables.values()))
    panels: dict[str, dict[str, list[Point]]] = {row.defence: {} for row in tried}
    for row in sorted(tried, key=_strength):
        own = {key: value for key, value in tables[row.cell].items() if key not in {*common_to_all, *ENDS, "lam"}}
        name = ", ".join(
            [f"lam = {_setting(row, 'lam') or MISSING}", *(f"{key} = {value}" for key, value in own.items())]
        )
        panels[row.defence].setdefault(name, []).append(_point(row))
    return {
        defence: {name: sorted(line, key=lambda point: point.rounds) for name, line in lines.items()}
        for defence, lines in panels.items()
    }


def _point(row: Row) -> Point:
    reached = [run for run in row.runs if number(run.summary.get("drop")) is not None]
    held = Row(row.dataset, row.model, row.attack, row.defence, tuple(reached))
    return Point(
        rounds=round(held.statistic("steps").mean or 0, 1),
        before=held.statistic("accuracy_before_trigger"),
        after=held.statistic("accuracy_after_trigger"),
    )


def clipping_table(rows: Mapping[tuple[str, str], Sequence[Row]]) -> TableSection:
    """Accuracy after the trigger round: a row an attack and its loss scaling, a column a bound.

    Args:
        rows: All rows by data set and model.

    Returns:
        Without rows where fewer than two defences stand side by side.

    Source:
        In the order of Pang et al., NeurIPS 2021, Tables 3 to 5.
    """
    federated = {key: [row for row in members if row.federated] for key, members in rows.items()}
    ordered = by_bound([row for members in federated.values() for row in members])
    bounds = {row.defence: _bound(row) for row in ordered}
    taken = Counter(bounds.values())
    defences = {label: bound if taken[bound] == 1 else f"{bound} ({label})" for label, bound in bounds.items()}
    table: dict[str, list[list[str]]] = {}
    for members in federated.values():
        cells: dict[tuple[str, ...], dict[str, str]] = {}
        chosen = [row for row in members if _method(row)]
        labels: dict[tuple[str, str], set[str]] = {}
        for row in chosen:
            labels.setdefault((_method(row), _scaling(row)), set()).add(row.attack)
        for row in sorted(chosen, key=_strength):
            method, scaling = _method(row), _scaling(row)
            name = f"{method} ({row.attack})" if len(labels[method, scaling]) > 1 else method
            cells.setdefault((name, scaling), {})[row.defence] = spread(row.statistic("accuracy_after_trigger"))
        if cells and len(defences) > 1:
            table[members[0].subject] = [
                [*names, *(values.get(defence, MISSING) for defence in defences)] for names, values in cells.items()
            ]
    return TableSection(
        id="clipping",
        heading="After the trigger round, by bound",
        intro="Test accuracy (%) after the trigger round, mean ± standard deviation over seeds. Loss scaling: of a "
        "poisoned trigger the factor of its update, of an accumulative phase the weight lam (the factor of its "
        "trigger stands behind the name). A bound that holds keeps "
        "a row near that of no attack; what it costs stands in that row.",
        head=("method", "loss scaling", *defences.values()),
        rows=table,
        line=0,
    )


def by_bound(rows: Sequence[Row]) -> list[Row]:
    """Rows in the order of the paper's columns: no clipping, l2 bounds from wide to narrow, linf bounds, the others."""

    def place(row: Row) -> tuple[int, int, float, str]:
        defence = _table(row.runs[0], "defence")
        bound, norm = number(defence.get("clip_norm")), str(defence.get("norm", NORMS[0]))
        if row.defence_name == "none":
            return 0, 0, 0.0, ""
        if row.defence_name == "clip" and bound is not None and norm in NORMS:
            return 1, NORMS.index(norm), -bound, row.defence
        return 2, 0, 0.0, row.defence

    return sorted(rows, key=place)


def _bound(row: Row) -> str:
    """What a column of the table is called: its bound, or the label of a defence that is no clipping."""
    defence = _table(row.runs[0], "defence")
    if row.defence_name == "none":
        return "no clip"
    bound = number(defence.get("clip_norm"))
    if row.defence_name != "clip" or bound is None:
        return row.defence
    return f"{defence.get('norm', NORMS[0])} ≤ {bound:g}"


def _method(row: Row) -> str:
    """What a row of the table is called; empty for attacks that the paper's tables do not have."""
    if row.attack_name == "accumulative":
        times = _setting(row, "trigger_scale")
        longer = "" if times in {"", "1"} or _setting(row, "trigger_norm") else f", {times} times its length"
        return f"accumulative phase + {_setting(row, 'trigger') or 'clean'} trigger{longer}"
    return {"clean": "no attack", "direct": "poisoned trigger"}.get(row.attack_name, "")


def _scaling(row: Row) -> str:
    key = {"direct": "trigger_scale", "accumulative": "lam"}.get(row.attack_name)
    return MISSING if key is None else _setting(row, key) or MISSING


def _strength(row: Row) -> tuple[int, str, float, float]:
    """No attack, poisoned triggers, accumulative phases; in those by trigger, loss scaling and rounds."""
    rank = {"clean": 0, "direct": 1}.get(row.attack_name, 2)
    scaling = number(_table(row.runs[0], "attack").get("trigger_scale" if rank == 1 else "lam"))
    return rank, _setting(row, "trigger"), scaling or 0.0, row.statistic("steps").mean or 0.0


def _setting(row: Row, key: str) -> str:
    """One of the attack's settings in words; empty if it is unset."""
    value = _table(row.runs[0], "attack").get(key)
    return "" if value is None else f"{value:g}" if isinstance(value, int | float) else str(value)


def _table(run: Run, name: str) -> Mapping[str, Any]:
    table = run.config.get(name, {})
    return table if isinstance(table, Mapping) else {}


def _percent(statistic: Statistic) -> str:
    return points(statistic.mean or 0)


def _curve(run: Run) -> dict[int, float]:
    """Accuracy in percent by round, from 0, the state before the first."""
    found = ((int(step["step"]), number(step.get("accuracy"))) for step in run.trace)
    return {step: 100 * accuracy for step, accuracy in found if accuracy is not None}


def _draw_rounds(ax: Axes, row: Row, look: Look) -> None:
    middle = common([curve for run in row.runs if (curve := _curve(run))])
    n = len(middle)
    mean, low, high = ([values[i] for values in middle.values()] for i in range(3))
    ax.plot(
        list(middle),
        mean,
        color=look.colour,
        linestyle=look.dashes if n <= MAX_DASHED else "-",
        linewidth=2.0 if n <= MAX_DASHED else 1.2,
        marker=look.marker,
        markersize=4.5,
        markevery=1 if n <= MAX_MARKED else max(1, n // 10),
        zorder=3,
    )
    ax.fill_between(list(middle), low, high, color=look.colour, alpha=0.15, linewidth=0, zorder=1)


def _draw_points(ax: Axes, line: Sequence[Point], look: Look, corner: tuple[int, int]) -> None:
    x, y = ([100 * (statistic.mean or 0) for statistic in side] for side in _sides(line))
    across, along = ([100 * (statistic.std or 0) for statistic in side] for side in _sides(line))
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
    for i, (point, place) in enumerate(zip(line, zip(x, y, strict=True), strict=True)):
        if 0 < i < len(line) - 1:
            continue  # between the two that are named
        ax.annotate(
            f"{point.rounds:g}",
            place,
            (6 * corner[0], 6 * corner[1]),
            textcoords="offset points",
            ha="left" if corner[0] > 0 else "right",
            va="bottom" if corner[1] > 0 else "top",
            fontsize=8,
            color=look.colour,
        )


def _sides(line: Sequence[Point]) -> tuple[list[Statistic], list[Statistic]]:
    return [point.before for point in line], [point.after for point in line]


def _limits(ax: Axes, every: Sequence[Point]) -> None:
    """Room for all points and their bars; an axis spans two points of accuracy at least."""
    x, y = map(_span, _sides(every))
    ax.set_xlim(x)
    ax.set_ylim(y)


def _span(side: Sequence[Statistic]) -> tuple[float, float]:
    ends = [min(100.0, max(0.0, 100 * ((s.mean or 0) + sign * (s.std or 0)))) for s in side for sign in (-1, 1)]
    pad = max(1.0, MARGIN * (max(ends) - min(ends)))
    return min(ends) - pad, max(ends) + 1.5 * pad
