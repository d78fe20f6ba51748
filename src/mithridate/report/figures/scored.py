"""What the figures of scores share: how each kind of sample is drawn, and what is drawn of a detector.

Discrepancies and losses are drawn as such, not as scores (their scores are minus them).
"""

from collections.abc import Iterable, Mapping

from matplotlib.figure import Figure

from mithridate.report.detectors import DetectorInfo
from mithridate.report.figures.drawing import COLOURS, DASHES, MARKERS, Line, Look, legend
from mithridate.report.roc import Scores
from mithridate.report.rows import Row, seeds
from mithridate.report.scores import CLEAN, KINDS, OOD, POISONED, ScoredSamples, finite_mean

STREAM = "clean stream"
"""The line of a run that nobody attacked."""

LOOKS = {
    CLEAN: Look(COLOURS[1], DASHES[1], MARKERS[0]),
    POISONED: Look(COLOURS[3], DASHES[0], MARKERS[1]),
    OOD: Look(COLOURS[4], DASHES[2], MARKERS[2]),
    STREAM: Look(COLOURS[0], DASHES[3], MARKERS[4]),
}
"""How each kind of sample is drawn in every figure."""

NAMES = {**KINDS, STREAM: "clean stream, no attack"}

MAX_PANELS = 12
"""Detectors drawn in one figure; tables have all."""


def quantity(info: DetectorInfo, *, epoch: bool = True) -> str:
    """What is drawn of a detector, with its unit.

    Args:
        info: The detector.
        epoch: Whether to name the old model.
    """
    old = f" to epoch {info.epoch}" if epoch and info.epoch is not None else ""
    if info.is_discrepancy:
        return f"discrepancy{old}" + {"l2": " (logits)", "tv": ""}.get(info.divergence, " (nats)")
    if info.is_loss:
        return "loss (nats)" if info.epoch is None else f"rise of loss{old.replace(' to', ' since')} (nats)"
    return "score"


def shown(info: DetectorInfo, scores: Scores) -> Scores:
    """Scores as they are drawn: discrepancies and losses instead of minus them."""
    return -scores if info.is_discrepancy or info.is_loss else scores


def mean_shown(info: DetectorInfo, scores: ScoredSamples, kind: str) -> float | None:
    """Mean of what is drawn of one kind of samples; None if no score is finite."""
    return finite_mean(shown(info, getattr(scores, kind)))


def kinds_legend(figure: Figure, kinds: Iterable[str]) -> None:
    """One legend of the kinds of samples that are drawn."""
    legend(figure, {NAMES[kind]: LOOKS[kind] for kind in kinds})


def cell_of(row: Row) -> str:
    """Attack, defence and seeds in words."""
    return f"{row.attack}, defence {row.defence}, {seeds_of(row)}"


def seeds_of(row: Row) -> str:
    """The seeds of a cell in words, and how many they are."""
    return f"seeds {seeds(row.runs)} (n = {len(row.runs)})"


def ends(lines: Mapping[str, Line], axis: str, names: Mapping[str, str] = NAMES) -> str:
    """First and last mean of each line in words.

    Args:
        lines: By kind.
        axis: What goes across.
        names: Of the kinds, in words.
    """
    return " ".join(
        f"{names[kind]}: {line[first][0]:.3g} at {axis} {first:g}, {line[last][0]:.3g} at {axis} {last:g}."
        for kind, line in lines.items()
        for first, last in [(min(line), max(line))]
    )
