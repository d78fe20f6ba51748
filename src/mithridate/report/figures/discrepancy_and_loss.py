"""Mean Memorization Discrepancy against the fall of the loss."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from mithridate.report.detectors import DetectorInfo, detectors, looking_back
from mithridate.report.figures.drawing import Drawing, panels, saved, style
from mithridate.report.figures.scored import LOOKS, cell_of, kinds_legend, mean_shown, quantity
from mithridate.report.rows import Row
from mithridate.report.scores import CLEAN, POISONED, WHERE, finite_mean, samples, strongest
from mithridate.report.wording import decimal


@style()
def discrepancy_and_loss(rows: Sequence[Row]) -> Drawing | None:
    """Mean Memorization Discrepancy against how far the loss has fallen since the same old model, a point an epoch.

    Args:
        rows: Rows of one data set and model.

    Source:
        After Zhu et al., ICML 2023, Fig. 8.
    """
    attacked = strongest(rows)
    if attacked is None:
        return None
    row, phase = attacked
    families, losses = (looking_back(detectors([row]), name) for name in ("discrepancy", "loss"))
    points = loss_points(row, families[0], losses[0], phase) if families and losses else {}
    if len(points.get(CLEAN, {})) < 2 or not points[POISONED]:
        return None
    figure, (ax,) = panels(1, height=3.2)
    for kind, line in points.items():
        look = LOOKS[kind]
        x, y = zip(*line.values(), strict=True)
        ax.plot(x, y, color=look.colour, linestyle=look.dashes, marker=look.marker, markersize=5, linewidth=1.2)
    ax.margins(0.08, 0.12)
    for epoch in _with_room(points[POISONED], ax):
        ax.annotate(str(epoch), points[POISONED][epoch], (0, 6), textcoords="offset points", ha="center", fontsize=8)
    ax.set_xlabel("loss then \u2212 loss now, of clean samples (nats)")
    ax.set_ylabel(f"mean {quantity(families[0][0], epoch=False)}")
    kinds_legend(figure, points)
    return saved(
        figure,
        row,
        "discrepancy-and-loss",
        heading="Discrepancy and loss",
        caption=f"{cell_of(row)}, {WHERE[phase]}. A point an old model, with its burn-in epoch where there is room: "
        "how far the loss of the clean samples has fallen since, and the mean discrepancy to it; both axes mean "
        "over seeds. That the two rise together says nothing about single samples.",
        alt="Mean discrepancy against the fall of the loss since each old model. "
        + " ".join(
            f"Epoch {epoch}: {decimal(x, 2)} nats, clean {decimal(y, 2)}, poisoned "
            f"{decimal(points[POISONED][epoch][1], 2)}."
            for epoch, (x, y) in points[CLEAN].items()
            if epoch in points[POISONED]
        ),
    )


def loss_points(
    row: Row, family: Sequence[DetectorInfo], losses: Sequence[DetectorInfo], phase: str
) -> dict[str, dict[int, tuple[float, float]]]:
    """(loss then - loss now of the clean samples, mean discrepancy) by epoch, for clean and poisoned samples.

    Args:
        row: One cell.
        family: Discrepancy detectors.
        losses: Loss detectors with an epoch; epochs that only one of the two has are left out.
        phase: Whose samples.

    Returns:
        Means over the runs that have all numbers; the latest epoch first.
    """
    at = {info.epoch: info for info in losses}
    points: dict[str, dict[int, tuple[float, float]]] = {CLEAN: {}, POISONED: {}}
    for info in family:
        if info.epoch is None or info.epoch not in at:
            continue
        for kind, line in points.items():
            pairs = [
                (x, y)
                for run in row.runs
                if (x := finite_mean(samples(run, at[info.epoch].key, phase).clean)) is not None
                and (y := mean_shown(info, samples(run, info.key, phase), kind)) is not None
            ]
            if pairs:
                line[info.epoch] = (float(np.mean([x for x, _ in pairs])), float(np.mean([y for _, y in pairs])))
    return points


def _with_room(points: Mapping[int, tuple[float, float]], ax: Axes) -> list[int]:
    """Epochs whose points are far enough from those labelled before them, the oldest model first."""
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    labelled: dict[int, tuple[float, float]] = {}
    for epoch, (x, y) in sorted(points.items()):
        place = (x / (right - left), y / (high - low))
        if all(math.dist(place, other) > 0.06 for other in labelled.values()):
            labelled[epoch] = place
    return list(labelled)
