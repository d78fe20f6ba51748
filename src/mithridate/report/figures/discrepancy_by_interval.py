"""Mean Memorization Discrepancy against the backtracking interval k."""

from collections.abc import Callable, Sequence

from matplotlib.ticker import MaxNLocator

from mithridate.bench.store import Run
from mithridate.report.detectors import DetectorInfo, detectors, looking_back
from mithridate.report.figures.drawing import (
    Band,
    Drawing,
    draw_mean,
    from_zero,
    over_seeds,
    panels,
    saved,
    style,
    title,
)
from mithridate.report.figures.scored import LOOKS, MAX_PANELS, cell_of, ends, kinds_legend, mean_shown, quantity
from mithridate.report.rows import Row
from mithridate.report.scores import POISONED, WHERE, ScoredSamples, samples, strongest


@style()
def discrepancy_by_interval(rows: Sequence[Row]) -> Drawing | None:
    """Mean Memorization Discrepancy against the backtracking interval k, one panel a divergence.

    Args:
        rows: Rows of one data set and model.

    Source:
        After Zhu et al., ICML 2023, Figs. 2, 5 (b), 7 and 10.
    """
    attacked = strongest(rows)
    if attacked is None:
        return None
    row, phase = attacked
    families = [family for family in looking_back(detectors([row]), "discrepancy") if len(family) > 1]
    shown = [
        (family, lines) for family in families[:MAX_PANELS] if POISONED in (lines := interval_lines(row, family, phase))
    ]
    if not shown:
        return None
    figure, axes = panels(len(shown), height=2.7)
    for ax, (family, lines) in zip(axes, shown, strict=True):
        for kind, line in lines.items():
            draw_mean(ax, line, LOOKS[kind])
        from_zero(ax)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.set_xlabel("backtracking interval k (epochs)")
        ax.set_ylabel(f"mean {quantity(family[0], epoch=False)}")
        if len(shown) > 1:
            title(ax, family[0].divergence or family[0].label)
    kinds_legend(figure, (kind for _, lines in shown for kind in lines))
    return saved(
        figure,
        row,
        "discrepancy-by-interval",
        heading="Discrepancy by backtracking interval",
        caption=f"{cell_of(row)}, {WHERE[phase]}: distance between the current model's answers and those of the "
        "model k epochs before the end of the burn-in; updates of the stream are not counted in k. Line: mean "
        "over seeds; band: from the lowest to the highest. Clean: the same samples before poisoning. Means do not "
        "show how far single samples overlap.",
        alt="Line chart of the mean discrepancy by backtracking interval. " + ends(shown[0][1], "k"),
    )


def interval_lines(row: Row, family: Sequence[DetectorInfo], phase: str) -> dict[str, dict[float, Band]]:
    """Mean discrepancy by backtracking interval k, for each kind of sample that there is.

    Args:
        row: One cell.
        family: Detectors that differ in their epoch alone.
        phase: Whose samples.
    """

    def line(kind: str) -> dict[float, Band]:
        return along_intervals(row, family, lambda run, info: mean_shown(info, samples(run, info.key, phase), kind))

    lines = {kind: line(kind) for kind in ScoredSamples._fields}
    return {kind: line for kind, line in lines.items() if line}


def along_intervals(
    row: Row, family: Sequence[DetectorInfo], mean: Callable[[Run, DetectorInfo], float | None]
) -> dict[float, Band]:
    """A number of detectors, by their backtracking interval k, over the seeds.

    Args:
        row: One cell.
        family: Detectors that differ in their epoch alone.
        mean: Of one run and detector; None where there is none.
    """
    curves = ({info.interval: mean(run, info) for info in family} for run in row.runs)
    return over_seeds({k: m for k, m in curve.items() if k is not None and m is not None} for curve in curves)
