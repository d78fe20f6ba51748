"""Histograms of what each detector says of clean and poisoned samples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from mithridate.report.detectors import DetectorInfo, detectors, representatives
from mithridate.report.figures.drawing import Drawing, Look, label_left, panels, saved, style, title
from mithridate.report.figures.scored import LOOKS, MAX_PANELS, cell_of, kinds_legend, quantity, shown
from mithridate.report.roc import Scores, curve
from mithridate.report.rows import Row
from mithridate.report.scores import OOD, WHERE, ScoredSamples, samples, strongest
from mithridate.report.statistic import Statistic
from mithridate.report.wording import decimal, with_spread

BINS = 30

TAIL = 0.01
"""The share of clean or poisoned samples beyond either end of a histogram; the outermost bins hold them."""

FLOOR = 1e-7
"""The smallest discrepancy or loss that a logarithmic axis shows: below it float32 has nothing left to say."""


@dataclass(frozen=True)
class Distribution:
    """Scores of one detector, all seeds together, in the unit in which they are drawn.

    Args:
        info: The detector.
        scores: By kind of sample; finite ones only.
        auroc: AUROC of each seed by itself.
    """

    info: DetectorInfo
    scores: ScoredSamples
    auroc: Statistic


@style()
def score_distributions(rows: Sequence[Row]) -> Drawing | None:
    """Histograms of what each detector says of clean and poisoned samples, under the strongest attack.

    Args:
        rows: Rows of one data set and model.

    Source:
        After Zhu et al., ICML 2023, Figs. 1 and 5 (a).
    """
    attacked = strongest(rows)
    if attacked is None or not (shown_of := distributions(*attacked)):
        return None
    row, phase = attacked
    figure, axes = panels(len(shown_of), height=2.3)
    for ax, panel in zip(axes, shown_of, strict=True):
        edges = bins(panel.info, panel.scores)
        for kind, scores in panel.scores._asdict().items():
            if len(scores):
                _draw_histogram(ax, scores, edges, LOOKS[kind], filled=kind != OOD)
        title(ax, panel.info.label, pad=16)
        if panel.auroc.n:
            text = f"AUROC {with_spread(panel.auroc.mean, panel.auroc.std, 2)}"
            ax.text(0, 1.03, text, transform=ax.transAxes, fontsize=8.5)
        if logarithmic(panel.info):
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(numticks=5))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel(quantity(panel.info))
    label_left(axes, "share of samples (%)")
    kinds_legend(
        figure, [kind for kind in ScoredSamples._fields if any(len(getattr(panel.scores, kind)) for panel in shown_of)]
    )
    return saved(
        figure,
        row,
        "score-distributions",
        heading="Scores of clean and poisoned samples",
        caption=f"{cell_of(row)}, {WHERE[phase]}; samples of all seeds together, AUROC mean \u00b1 standard "
        "deviation of the single seeds (0.5: a coin). Clean: the same samples before poisoning. The outermost bins "
        "hold all that lies beyond; axes of discrepancies and losses are logarithmic. Of detectors that look back "
        "at several epochs, the latest (\u201cstatic\u201d) and the one nearest to half the burn-in are shown. "
        "Suspicious is a low score, a high discrepancy or loss.",
        alt="Histograms of clean and poisoned samples, one panel a detector. "
        + " ".join(
            f"{panel.info.label}: AUROC {decimal(panel.auroc.mean, 2)}."
            for panel in shown_of
            if panel.auroc.mean is not None
        ),
    )


def distributions(row: Row, phase: str) -> list[Distribution]:
    """The scores of every representative detector that scored clean and poisoned samples.

    Args:
        row: One cell.
        phase: Whose samples.
    """
    scored = []
    for info in representatives(detectors([row]))[:MAX_PANELS]:
        runs = [samples(run, info.key, phase) for run in row.runs]
        curves = [one for run in runs if (one := curve(run.clean, run.poisoned)) is not None]
        pooled = (shown(info, np.concatenate(parts)) for parts in zip(*runs, strict=True))
        finite = ScoredSamples(*(scores[np.isfinite(scores)] for scores in pooled))
        if len(finite.clean) and len(finite.poisoned):
            scored.append(Distribution(info, finite, Statistic(tuple(one.auroc for one in curves))))
    return scored


def bins(info: DetectorInfo, scores: ScoredSamples) -> NDArray[np.float64]:
    """Edges of histogram bins that all kinds of samples share; logarithmic for what is never negative.

    Args:
        info: The detector.
        scores: Scores of its samples, as they are drawn.
    """
    ends = [np.quantile(part, [TAIL, 1 - TAIL]) for part in (scores.clean, scores.poisoned)]
    low, high = min(float(end[0]) for end in ends), max(float(end[1]) for end in ends)
    if logarithmic(info):
        low, high = max(low, FLOOR), max(high, 10 * FLOOR)
        return np.geomspace(min(low, high / 10), high, BINS + 1)
    if not high > low:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, BINS + 1)


def logarithmic(info: DetectorInfo) -> bool:
    """Whether a detector's histogram has a logarithmic axis: most discrepancies and losses are tiny, a few are not."""
    return info.is_discrepancy or (info.is_loss and info.epoch is None)


def _draw_histogram(ax: Axes, scores: Scores, edges: NDArray[np.float64], look: Look, *, filled: bool) -> None:
    counts, _ = np.histogram(np.clip(scores, edges[0], edges[-1]), edges)
    shares = 100 * counts / len(scores)
    if filled:
        ax.stairs(shares, edges, fill=True, color=look.colour, alpha=0.25)
    ax.stairs(shares, edges, color=look.colour, linestyle=look.dashes, linewidth=1.4)
