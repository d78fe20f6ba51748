"""Accuracy by epoch of the burn-in, under each bound of its gradients."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from matplotlib.ticker import MaxNLocator

from mithridate.bench.store import Run
from mithridate.report.figures.drawing import (
    Band,
    Drawing,
    draw_mean,
    legend,
    looks_of,
    over_seeds,
    panels,
    saved,
    style,
)
from mithridate.report.rows import Row, seed
from mithridate.report.settings import config_table, flattened
from mithridate.report.wording import decimal, listed, number

NOT_NAMED = ("burn_in.seed", "burn_in.evaluate_every", "burn_in.checkpoints")
"""Settings of a burn-in that change nothing about how it learns, or that lines are means over."""

NORM = "burn_in.norm"

MAX_MARKERS = 20


@style()
def burn_in_curves(rows: Sequence[Row]) -> Drawing | None:
    """Test accuracy by epoch of the burn-in, a line for each way in which it was trained.

    Args:
        rows: Rows of any data set and model; runs whose burn-in was measured along the way (`evaluate_every`) are
            shown, each burn-in once.

    Returns:
        None if fewer than two ways were measured.

    Source:
        After Pang et al., NeurIPS 2021, Fig. 3 (a).
    """
    lines = burn_in_lines(rows)
    if len(lines) < 2:
        return None
    looks = looks_of(lines)
    figure, (ax,) = panels(1, width=6.4, height=3.1)
    for name, line in lines.items():
        draw_mean(ax, line, looks[name], marked=max(1, len(line) // MAX_MARKERS))
    ax.set_xlabel("epoch of the burn-in")
    ax.set_ylabel("test accuracy (%)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure, looks)
    ends = {name: (max(line), line[max(line)][0]) for name, line in lines.items()}
    return saved(
        figure,
        _subject(rows),
        "burn-in-curves",
        heading="Accuracy along the burn-in",
        caption="Nothing is attacked here: a line that rises more slowly, or ends lower, is what that way of training "
        "costs. clip_norm is the length that longer gradients are shortened to (unset: none is). Mean over seeds at "
        "epochs that all have; band: from the lowest to the highest.",
        alt="Line chart of test accuracy by epoch of the burn-in. "
        + " ".join(f"{name}: {decimal(end)} percent after epoch {epoch:g}." for name, (epoch, end) in ends.items()),
    )


def burn_in_lines(rows: Sequence[Row]) -> dict[str, dict[float, Band]]:
    """Accuracy in percent by epoch, by what tells one way of training from the others; wide bounds first.

    Args:
        rows: Rows of any data set and model.
    """
    runs = [run for row in rows for run in row.runs if burn_in_curve(run)]
    runs.sort(key=lambda run: -(number(config_table(run, "burn_in").get("clip_norm")) or math.inf))
    ways = [_way(run) for run in runs]
    apart = [key for key in dict.fromkeys(key for way in ways for key in way) if len(_values(key, ways)) > 1]
    curves: dict[str, dict[int | None, Mapping[float, float]]] = {}
    for way, run in zip(ways, runs, strict=True):
        name = ", ".join(f"{key.removeprefix('burn_in.')} {value}" for key in apart for value in _values(key, [way]))
        curves.setdefault(name, {})[seed(run)] = burn_in_curve(run)
    return {name: over_seeds(by_seed.values()) for name, by_seed in curves.items()}


def burn_in_curve(run: Run) -> dict[float, float]:
    """Test accuracy in percent by epoch of the burn-in; empty if it was not measured on the way."""
    points = run.summary.get("burn_in_curve") or []
    measured = {number(point.get("epoch")): number(point.get("accuracy")) for point in points}
    return {epoch: 100 * value for epoch, value in measured.items() if epoch is not None and value is not None}


def _subject(rows: Sequence[Row]) -> Row:
    """A row that stands for all that were measured: their data sets by name, without the settings that lines tell."""
    shown = [row for row in rows if any(burn_in_curve(run) for run in row.runs)]
    names = dict.fromkeys(str(config_table(row.runs[0], "data").get("name")) for row in shown)
    return replace(shown[0], dataset=listed(list(names)))


def _way(run: Run) -> dict[str, str]:
    """What decides a burn-in, but for its seed."""
    tables = {key: value for key in ("model", "burn_in") if (value := config_table(run, key))}
    flat = {"data": str(config_table(run, "data").get("name")), **flattened(tables)}
    unused = set() if "burn_in.clip_norm" in flat else {NORM}
    return {key: value for key, value in flat.items() if key not in {*NOT_NAMED, *unused}}


def _values(key: str, ways: Sequence[Mapping[str, str]]) -> set[str]:
    """What a setting is in some ways; the norm of a bound, only where there is a bound."""
    return {way.get(key, "unset") for way in ways if key in way or key != NORM}
