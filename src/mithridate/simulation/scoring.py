"""Detectors beside a run: fitted once before the stream, they score every batch and change nothing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError
from mithridate.core.features import observe
from mithridate.core.seeding import generator
from mithridate.core.view import Memory, Need, View
from mithridate.core.watch import Detector
from mithridate.training.learner import Learner

CLEAN, RECEIVED, OOD = "clean", "received", "ood"
"""Where a scored sample comes from: the stream before anyone poisoned it (for measurement only; a deployed system never
sees it), the batch as the learner received it, another image set."""


@dataclass(frozen=True)
class Scorer:
    """A fitted detector.

    Args:
        label: What tables call it.
        detector: Its settings.
        fitted: What the detector remembers of clean samples.
    """

    label: str
    detector: Detector
    fitted: Memory

    def score(self, batch: Batch, learner: Learner) -> Tensor:
        """(n,) float64 on the CPU, lower for the more suspicious; what is not finite becomes -inf."""
        scores = self.detector.score(batch, self._view(learner), self.fitted).detach().double().cpu()
        return torch.where(scores.isnan(), -torch.inf, scores)

    def moved(self, clean: Batch, received: Batch, learner: Learner) -> dict[str, Tensor]:
        """What `Detector.moved` says, each (n,) float64 on the CPU."""
        distances = self.detector.moved(clean, received, self._view(learner))
        return {name: values.detach().double().cpu() for name, values in distances.items()}

    def _view(self, learner: Learner) -> View:
        available: dict[Need, Any] = {Need.MODEL: learner.white_box}
        if learner.history is not None:
            available[Need.HISTORY] = learner.history
        return View(learner.step, {}, available, self.detector.needs, self.label)


def fit_scorers(
    detectors: Mapping[str, Detector], learner: Learner, training: Iterable[Batch] | None, *, seed: int
) -> list[Scorer]:
    """Fit detectors to clean samples, with the model as it is now.

    Args:
        detectors: By label.
        learner: Whose model gives the features; not changed.
        training: Clean batches; one pass is made, and none if no detector needs it.
        seed: Decides which samples a detector remembers, where not all are.

    Raises:
        ConfigError: A detector must be fitted and there is nothing to fit it on.
        DataError: There are too few samples for a detector.
    """
    fitting = [label for label, detector in detectors.items() if detector.fits]
    if fitting and training is None:
        raise ConfigError(f"the detector {fitting[0]} must be fitted on clean samples: give the burn-in's batches.")
    clean = observe(learner.model, training) if fitting and training is not None else None
    scorers = []
    for label, detector in detectors.items():
        rng = generator("detector", label, seed)
        scorers.append(Scorer(label, detector, detector.fit(clean, rng=rng) if detector.fits and clean else {}))
    return scorers


def score_batches(
    scorers: Sequence[Scorer], learner: Learner, step: int, sources: Mapping[str, Batch]
) -> dict[str, Tensor]:
    """Scores of one step's batches by `step/source/detector`, and distances that poisoning moved its samples.

    Args:
        scorers: The detectors.
        learner: As it is before it learns from the batch.
        step: Which step.
        sources: Batches by where they come from; `CLEAN` and `RECEIVED` are among them.
    """
    if learner.history is not None:  # as the learner does before its update: both then look equally far back
        learner.history.record(learner.step, learner.model)
    scores = {
        f"{step}/{source}/{scorer.label}": scorer.score(batch, learner)
        for source, batch in sources.items()
        for scorer in scorers
    }
    distances = {
        f"{step}/{name}/{scorer.label}": values
        for scorer in scorers
        for name, values in scorer.moved(sources[CLEAN], sources[RECEIVED], learner).items()
    }
    return scores | distances


def score_columns(scores: Mapping[str, Tensor], changed: Mapping[int, Tensor]) -> dict[str, NDArray[Any]]:
    """All scores of a run as columns, one entry a score.

    Args:
        scores: From `score_batches`, of every step.
        changed: By step, (n,) bool: which received samples had been poisoned; those that moved are of these.

    Returns:
        `step`, `source`, `detector`, `sample` (position in its batch), `poisoned`, `score`.
    """
    parts: dict[str, list[NDArray[Any]]] = {
        name: [] for name in ("step", "source", "detector", "sample", "poisoned", "score")
    }
    for key, values in scores.items():
        step, source, detector = key.split("/", 2)
        n = len(values)
        poisoned = np.zeros(n, dtype=bool) if source in {CLEAN, OOD} else changed[int(step)].cpu().numpy()
        parts["step"].append(np.full(n, int(step)))
        parts["source"].append(np.full(n, source, dtype=object))
        parts["detector"].append(np.full(n, detector, dtype=object))
        parts["sample"].append(np.arange(n))
        parts["poisoned"].append(poisoned)
        parts["score"].append(values.numpy())
    return {name: np.concatenate(column) if column else np.empty(0) for name, column in parts.items()}
