"""What every detector must pass."""

from collections.abc import Sequence
from functools import lru_cache
from statistics import median

import torch
from torch import Tensor

from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError
from mithridate.core.features import observe
from mithridate.core.past import Snapshot, Weights
from mithridate.core.view import Memory
from mithridate.core.watch import Detector
from mithridate.testing.checks.evidence import Evidence
from mithridate.testing.checks.subject import Check, fresh, made, named_choices, variants
from mithridate.testing.checks.witness import Witness, bits, same_tensors, through_file, unsaveable
from mithridate.testing.checks.worlds import image_world, other_worlds, stream_of
from mithridate.training.history import History

SEEDS = range(3)
SEPARATED = 0.9
"""AUROC of blatant anomalies against clean samples, at the median over `SEEDS`."""


@lru_cache(maxsize=64)
def exercised(cls: type) -> Evidence:
    """What is found when a detector is tried in all its settings; tried once."""
    evidence = Evidence()
    with evidence.trying(cls.__name__):
        detectors = variants(cls, [{}, *named_choices(cls)])
        for detector in detectors:
            with evidence.trying(detector):
                _fit_and_score(detector, evidence)
        if evidence.crashed:
            return evidence
        for detector in detectors:
            with evidence.trying(detector, "company"):
                _try_other_company(detector, evidence)
        with evidence.trying(detectors[0], "dtype"):
            _try_float64(detectors[0], evidence)
        with evidence.trying(detectors[0], "other inputs"):
            _try_other_inputs(detectors[0])
    return evidence


@lru_cache(maxsize=8)
def _lesson(seed: int, dtype: torch.dtype) -> Snapshot:
    """The learner of an image world once it was taught that class 0 is class 1."""
    learner = image_world(dtype, seed=seed).learner
    for x, y in stream_of(seed).burn_in.batches(20):
        learner.update(Batch(x.to(dtype), torch.where(y == 0, 1, y)))
    return learner.snapshot()


class _Play:
    """A detector that is fitted to a world's burn-in samples, as its model sees them, and scores."""

    def __init__(
        self, detector: Detector, evidence: Evidence | None, *, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        self.detector, self.seed, self.dtype = detector, seed, dtype
        self.world = image_world(dtype, seed=seed)
        self.witness = Witness(detector, evidence, self.world)

    def fitted(self) -> Memory:
        """What it remembers of clean samples."""
        if not self.detector.fits:
            return {}
        batches = (Batch(x.to(self.dtype), y) for x, y in stream_of(self.seed).burn_in.batches(60))
        clean = observe(self.world.learner.model, batches)
        with self.witness.watching("fit", {"clean": clean}):
            return self.detector.fit(clean, rng=torch.Generator().manual_seed(3))

    def teach(self) -> None:
        """The model learns that class 0 is class 1, and remembers how it was before."""
        learner = self.world.learner
        learner.history = History(checkpoints={0: Weights.of(learner.model).copied()}, length=1)
        learner.restore(_lesson(self.seed, self.dtype))

    def scores(self, batch: Batch, fitted: Memory) -> Tensor:
        """What it says of samples, granted just what it declares."""
        view, batch, fitted = (
            self.world.view(self.detector, {}),
            batch.clone(),
            {k: t.clone() for k, t in fitted.items()},
        )
        with self.witness.watching("score", {"batch": batch, "fitted": fitted}):
            return self.detector.score(batch, view, fitted)


def _fit_and_score(detector: Detector, evidence: Evidence) -> None:
    """Fit and score; then again, and in another object that reads what was saved."""
    play = _Play(detector, evidence)
    fitted, batch = play.fitted(), stream_of(0).victim_batch(0, 0)
    if bool(fitted) is not detector.fits:
        evidence.add("notes", detector, f"says that `fits` is {detector.fits}, and notes {sorted(fitted)}")
    if problem := unsaveable(fitted):
        evidence.add("notes", detector, problem)
        evidence.crashed = True
        return
    play.teach()
    scores = play.scores(batch, fitted)
    if (scores.shape, scores.device) != (batch.y.shape, batch.y.device):
        evidence.add("shape", detector, f"gives {tuple(scores.shape)} scores of {batch.size} samples")
    if scores.requires_grad or bool(scores.isnan().any()):
        evidence.add("shape", detector, "gives scores that are NaN or carry a gradient")

    again = _Play(fresh(detector), None)
    other = again.fitted()
    again.teach()
    if not same_tensors(other, fitted) or bits(again.scores(batch, other)) != bits(scores):
        evidence.add("repeats", detector, "notes or scores otherwise the second time")
    resumed = _Play(fresh(detector), None)
    resumed.teach()
    if bits(resumed.scores(batch, through_file(fitted))) != bits(scores):
        evidence.add("resumes", detector, "scores otherwise once its notes were saved")


def _try_other_company(detector: Detector, evidence: Evidence) -> None:
    """A sample has the same score in a batch, in another order, in pieces and alone."""
    play, batch = _Play(detector, None), stream_of(0).victim_batch(0, 0)
    fitted = play.fitted()
    play.teach()
    whole = play.scores(batch, fitted)
    if whole.shape != batch.y.shape:
        return  # that is on record
    order = torch.randperm(batch.size, generator=torch.Generator().manual_seed(2))
    turned = play.scores(batch.take(order), fitted)
    pieces = [play.scores(piece, fitted) for piece in batch.split(7)]
    for how, other in (("another order", turned), ("pieces", torch.cat(pieces)[order])):
        if not torch.allclose(whole[order], other, rtol=1e-3, atol=1e-4):
            evidence.add("company", detector, f"scores a sample otherwise in {how}")
    alone = play.scores(batch.take(slice(1)), fitted)
    if alone.shape != (1,) or not torch.allclose(alone, whole[:1], rtol=1e-3, atol=1e-4):
        evidence.add("batch of one", detector, "scores a sample otherwise alone")


def _try_float64(detector: Detector, evidence: Evidence) -> None:
    """A model in float64 is no obstacle; scores may have any float type."""
    play, batch = _Play(detector, evidence, dtype=torch.float64), stream_of(0).victim_batch(0, 0)
    fitted = play.fitted()
    play.teach()
    scores = play.scores(Batch(batch.x.double(), batch.y), fitted)
    if not scores.is_floating_point():
        evidence.add("dtype", detector, f"gives scores of {scores.dtype}")


def _try_other_inputs(detector: Detector) -> None:
    for world in other_worlds():
        try:
            detector.check_inputs(world.batches[0])
        except ConfigError:
            continue
        clean = observe(world.learner.model, world.learner.training or ())
        fitted = detector.fit(clean, rng=torch.Generator().manual_seed(3)) if detector.fits else {}
        detector.score(world.batches[0], world.view(detector, {}), fitted)


def check_gives_scores(cls: type) -> None:
    """One number a sample on the batch's device, not NaN and without a gradient."""
    exercised(cls).require("shape")


def check_scores_in_any_company(cls: type) -> None:
    """A sample has the same score in another order and in pieces of the batch."""
    exercised(cls).require("company")


def _auroc(clean: Tensor, odd: Tensor) -> float:
    """How often a clean sample scores above an odd one; ties count half."""
    above, equal = clean[:, None] > odd, clean[:, None] == odd
    return float((above.double() + 0.5 * equal.double()).mean())


def check_separates(cls: type) -> None:
    """With its defaults it puts blatant anomalies below clean images; the median AUROC is high.

    A detector that is fitted must do so for inverted images. Another may instead for images of a class that the model
    was just taught to call by the name of another one: they are wrong as labelled, and the model has changed its mind.
    """
    if exercised(cls).crashed:
        return  # that is on record
    detector: Detector = made(cls, {})
    inverted, renamed = [], []
    for seed in SEEDS:
        test = stream_of(seed).test.all()
        play = _Play(detector, None, seed=seed)
        fitted = play.fitted()
        odd = play.scores(Batch(1 - test.x, test.y), fitted)
        inverted.append(_auroc(play.scores(test, fitted), odd))
        play.teach()
        scores = play.scores(test, fitted)
        renamed.append(_auroc(scores[test.y != 0], scores[test.y == 0]))
    found = {"inverted images": median(inverted)} | ({} if detector.fits else {"a renamed class": median(renamed)})
    assert max(found.values()) > SEPARATED, f"{cls.__name__} does not separate blatant anomalies; AUROC: {found}"


CHECKS: Sequence[Check] = (check_gives_scores, check_scores_in_any_company, check_separates)
