"""Accuracy along a stream that nobody attacks: what defences cost."""

from collections.abc import Sequence

from matplotlib.ticker import FuncFormatter, MaxNLocator

from mithridate.report.figures.drawing import (
    Band,
    Drawing,
    draw_mean,
    legend,
    looks_of,
    over_seeds,
    panels,
    percent,
    saved,
    style,
)
from mithridate.report.figures.scored import seeds_of
from mithridate.report.figures.timeline import by_step
from mithridate.report.rows import Row
from mithridate.report.wording import decimal, listed

MAX_BANDS = 4
"""Lines with bands in one panel; more would hide each other."""


@style()
def clean_stream_accuracy(rows: Sequence[Row]) -> Drawing | None:
    """Accuracy along the steps of a stream that nobody attacks: what defences cost. Needs no scores.

    Args:
        rows: Rows of one data set and model.

    Returns:
        None unless at least two defences ran on a clean stream.

    Source:
        After Zhu et al., ICML 2023, Fig. 6, right.
    """
    lines = clean_lines(rows)
    members = [row for row in rows if not row.attacking and row.defence in lines]
    if len(lines) < 2:
        return None
    figure, (ax,) = panels(1, height=3.4, width=6.8)
    looks, bands = looks_of(lines), len(lines) <= MAX_BANDS
    for name, line in lines.items():
        draw_mean(ax, percent(line), looks[name], band=bands)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.set_xlabel("clean batches learned")
    ax.set_ylabel("test accuracy (%)")
    legend(figure, looks)
    floor = float(ax.get_ylim()[0])
    last = {name: line[max(line)][0] for name, line in lines.items()}
    return saved(
        figure,
        members[0],
        "clean-stream",
        heading="Accuracy on a clean stream",
        caption="Nobody attacks: what a defence costs by itself; "
        f"{listed(list(dict.fromkeys(map(seeds_of, members))))}. Line: mean over seeds at the steps that all of them "
        f"have{'; band: from the lowest to the highest' if bands else ''}; lines that agree hide each other. The "
        f"vertical axis starts at {decimal(floor, 1)} %.",
        alt="Line chart of test accuracy by clean batches learned, a line a defence. At the end: "
        + ", ".join(f"{name} {decimal(100 * value)} percent" for name, value in last.items())
        + ".",
    )


def clean_lines(rows: Sequence[Row]) -> dict[str, dict[float, Band]]:
    """Test accuracy after each step of a stream that nobody attacks, by defence.

    Args:
        rows: Rows of one data set and model. Where several `clean` cells have the same defence, the one with the most
            steps is taken.
    """
    lines: dict[str, dict[float, Band]] = {}
    for row in rows:
        if row.attacking:
            continue
        line = over_seeds(by_step(run, "accuracy") for run in row.runs)
        if len(line) > max(1, len(lines.get(row.defence, {}))):
            lines[row.defence] = line
    return lines
