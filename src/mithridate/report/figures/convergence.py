"""Accuracy along the rounds of federations that nobody attacks."""

from collections.abc import Sequence

from matplotlib.ticker import MaxNLocator

from mithridate.report.federation import by_bound
from mithridate.report.figures.drawing import Drawing, legend, looks_of, over_seeds, panels, percent, saved, style
from mithridate.report.figures.timeline import by_step, draw_steps
from mithridate.report.rows import Row
from mithridate.report.wording import decimal, points


@style()
def convergence(rows: Sequence[Row]) -> Drawing | None:
    """Accuracy along the rounds where nothing is attacked, a line a defence: its longest federation.

    Args:
        rows: Rows of one data set and model; those of federations are shown.

    Returns:
        None if under fewer than two defences an unattacked federation took rounds.

    Source:
        After Pang et al., NeurIPS 2021, Fig. 3 (a).
    """
    clean = [
        row
        for row in by_bound(rows)
        if row.federated and not row.attacking and row.has_phase and any(by_step(run, "accuracy") for run in row.runs)
    ]
    longest = {row.defence: row for row in sorted(clean, key=lambda row: row.mean_steps)}
    shown = [row for row in clean if longest[row.defence] is row]
    if len(shown) < 2:
        return None
    looks = looks_of(row.defence for row in shown)
    figure, (ax,) = panels(1, width=6.4, height=3.1)
    for row in shown:
        line = percent(over_seeds(by_step(run, "accuracy") for run in row.runs))
        draw_steps(ax, line, looks[row.defence], marked=len(line) // 10)
    ax.set_xlabel("round")
    ax.set_ylabel("test accuracy (%)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure, looks)
    floor = float(ax.get_ylim()[0])
    return saved(
        figure,
        shown[0],
        "convergence",
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
