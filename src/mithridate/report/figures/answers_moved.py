"""How far poisoning moves a model's answers, now and earlier, beside how far time has moved them."""

from collections.abc import Sequence

from matplotlib.ticker import MaxNLocator

from mithridate.report.detectors import DetectorInfo, detectors, looking_back
from mithridate.report.figures.discrepancy_by_interval import along_intervals, interval_lines
from mithridate.report.figures.drawing import (
    COLOURS,
    DASHES,
    MARKERS,
    Band,
    Drawing,
    Look,
    draw_mean,
    from_zero,
    legend,
    panels,
    saved,
    style,
    title,
)
from mithridate.report.figures.scored import LOOKS as KIND_LOOKS
from mithridate.report.figures.scored import cell_of, ends, quantity
from mithridate.report.rows import Row
from mithridate.report.scores import CLEAN, MOVED_NOW, MOVED_THEN, POISONED, WHERE, mean_moved, strongest

LOOKS = {
    MOVED_NOW: Look(COLOURS[5], DASHES[0], MARKERS[3]),
    MOVED_THEN: Look(COLOURS[4], DASHES[1], MARKERS[4]),
    CLEAN: KIND_LOOKS[CLEAN],
    POISONED: KIND_LOOKS[POISONED],
}
NAMES = {
    MOVED_NOW: "by poison, model now (\u03b1)",
    MOVED_THEN: "by poison, model then (\u03b1\u2032)",
    CLEAN: "by time, clean samples (\u03b2)",
    POISONED: "by time, poison (\u03b2\u2032)",
}
PANELS = {"What poisoning moves": (MOVED_NOW, MOVED_THEN), "What time moves": (CLEAN, POISONED)}


@style()
def answers_moved(rows: Sequence[Row]) -> Drawing | None:
    """How far poisoning moves the answers of the current and of older models, and how far the two lie apart.

    Args:
        rows: Rows of one data set and model.

    Returns:
        None unless a discrepancy detector was asked for `moved_answers`.

    Source:
        After Zhu et al., ICML 2023, Fig. 3, bottom.
    """
    attacked = strongest(rows)
    if attacked is None:
        return None
    row, phase = attacked
    families = looking_back(detectors([row]), "discrepancy")
    family, lines = next(
        ((family, lines) for family in families if MOVED_THEN in (lines := moved_lines(row, family, phase))), (None, {})
    )
    if family is None:
        return None
    figure, axes = panels(len(PANELS), height=2.7, width=3.6)
    for ax, (heading, kinds) in zip(axes, PANELS.items(), strict=True):
        for kind in kinds:
            draw_mean(ax, lines[kind], LOOKS[kind])
        from_zero(ax)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.set_xlabel("backtracking interval k (epochs)")
        title(ax, heading)
    axes[0].set_ylabel(f"mean {quantity(family[0], epoch=False)}")
    legend(figure, {NAMES[kind]: LOOKS[kind] for kind in lines})
    return saved(
        figure,
        row,
        "answers-moved",
        heading="Answers moved by poison, and by time",
        caption=f"{cell_of(row)}, {WHERE[phase]}. Left: distance between a model's answers to a poisoned sample and to "
        "the same sample before, for the current model, which the poison was made on, and for that of k epochs before "
        "the end of the burn-in. Right: distance between these two models' answers to one sample. Line: mean over "
        "seeds; band: from the lowest to the highest. Only who poisoned the samples can measure the left.",
        alt="Line charts by backtracking interval. " + ends(lines, "k", NAMES),
    )


def moved_lines(row: Row, family: Sequence[DetectorInfo], phase: str) -> dict[str, dict[float, Band]]:
    """Mean distances by backtracking interval k: alpha, alpha', beta and beta' of the paper.

    Args:
        row: One cell.
        family: Discrepancy detectors that differ in their epoch alone.
        phase: Whose samples.

    Returns:
        By kind; none where the runs did not store how far poisoning moved the answers.
    """

    def moved(which: str) -> dict[float, Band]:
        return along_intervals(row, family, lambda run, info: mean_moved(run, info.key, which, phase))

    lines = {MOVED_NOW: moved(MOVED_NOW), MOVED_THEN: moved(MOVED_THEN), **interval_lines(row, family, phase)}
    return {kind: lines[kind] for kind in NAMES} if all(lines.get(kind) for kind in NAMES) else {}
