"""A detector as a defence: samples that score below a threshold are dropped, or count for less."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor

from mithridate.core.batch import AnyBatch
from mithridate.core.defence import Defence, Screened
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.features import observe
from mithridate.core.past import Epoch
from mithridate.core.registry import build, config_of, register, settings
from mithridate.core.seeding import generator
from mithridate.core.view import Memory, Need, View
from mithridate.core.watch import Detector

FITTED, THRESHOLD = "fitted.", "threshold"
"""Notes: what the detector remembers of clean samples (a prefix), and the score below which a sample is flagged."""

CHUNK = 500
"""Trusted samples that are scored at once."""


@register("defence", "filter")
@settings
class Filter(Defence):
    """Drop, or learn less from, the samples that a detector finds more suspicious than almost all trusted ones.

    At the first batch of the stream the detector is fitted to samples that the model was trained on (if it is one that
    is fitted), and the threshold is set on the trusted samples, which must not be among those: the model and the
    detector know their own training samples too well, and a threshold set there would flag far too many others. Both
    then stay as they are. Of n trusted samples, the k-th lowest score is the threshold, k = floor(fpr * (n + 1)), and
    what scores below it is flagged: a further clean sample, seen by the same model, is flagged with probability k / (n
    + 1) at most, whatever the scores' distribution. Scores that are not finite are flagged, too.

    What breaks it: poison that looks clean to the detector, since an attacker who knows it can keep the score up while
    crafting; accumulative poison was made to pass, and Fig. 2 of Pang et al. shows it pass better than the vanilla
    one. And a model that moves away from the one that the detector was fitted to: features drift as it learns, and
    with them the share of clean samples that is flagged; watch it (column `flagged_clean` of the trace).

    Args:
        detector: Its table, as in a recipe: `{name = "lid", neighbours = 20}`; completed with the detector's defaults.
        fpr: Share of clean samples that may be flagged, in [0, 1); 0 flags nothing and is off.
        flagged_weight: What a flagged sample's loss is multiplied by, in [0, 1). 0 drops the sample before the model
            sees it, so that it is in no BatchNorm statistic either, and the loss is the mean over the others. Above 0
            the batch stays whole, and the weighted losses are divided by the number of samples, not by the sum of
            weights: no sample pulls harder because others were flagged, and a batch that is flagged as a whole makes a
            weak step, not a full one.
        fit_samples: Fit to so many clean samples at most, >= 1, drawn from all; unset: all of them.

    Raises:
        ConfigError: The detector's name, key or value is wrong; or it looks some updates back, where at the first batch
            there is nothing yet.
        DataError: (from `screen`) too few trusted samples for the rate, trusted scores that are all equal or not
            finite, or clean samples that the detector cannot be fitted to.

    Source:
        Detectors: Pang et al., NeurIPS 2021, section 4.1 "Anomaly detection". Threshold: split conformal outlier
        detection, Bates et al., Annals of Statistics 2023, arXiv:2104.08279 (marginal conformal p-values).
    """

    neutral: ClassVar[Mapping[str, Any]] = {"fpr": 0.0}
    active: ClassVar[Mapping[str, Any]] = {"fpr": 0.5}

    detector: dict[str, Any] = Field(default_factory=lambda: {"name": "gda"})
    fpr: Annotated[float, Field(ge=0, lt=1)] = 0.05
    flagged_weight: Annotated[float, Field(ge=0, lt=1)] = 0.0
    fit_samples: Annotated[int, Field(ge=1)] | None = None

    def __post_init__(self) -> None:
        built: Detector = build("detector", self.detector, where="[defence] filter, detector")
        if built.lookback:
            raise ConfigError(
                "[defence] filter: its threshold is set at the first batch, when there is no model some updates back "
                f'to compare with ({self.detector}); set old = "checkpoint", or use the defence dsc.'
            )
        needs = built.needs | {Need.TRUSTED} | ({Need.MODEL, Need.TRAINING} if built.fits else set())
        # The class is frozen: these are set once, here, and follow from `detector`.
        object.__setattr__(self, "detector", config_of(built))
        object.__setattr__(self, "built", built)
        object.__setattr__(self, "needs", needs)

    def __hash__(self) -> int:
        """Equal filters have equal hashes; the detector's table itself has none."""
        return hash((self.detector["name"], self.fpr, self.flagged_weight, self.fit_samples))

    @property
    def old_epochs(self) -> frozenset[Epoch | None]:
        """The detector's."""
        return self._detector.old_epochs

    def check_inputs(self, batch: AnyBatch) -> None:
        """Refuse what the detector refuses."""
        self._detector.check_inputs(batch)

    def screen(self, batch: AnyBatch, view: View) -> Screened:
        """The batch without what is flagged, or with less weight on it."""
        if self.fpr == 0:
            return Screened(batch)
        if THRESHOLD not in view.memory:
            view.memory.update(self._prepared(view, batch.y.device))
        scores = self._scores(batch, view, _under_prefix(view.memory))
        flagged = (scores < float(view.memory[THRESHOLD])) | ~torch.isfinite(scores)
        if not bool(flagged.any()):
            return Screened(batch, flagged.cpu())
        if self.flagged_weight > 0:
            return Screened(batch, flagged.cpu(), torch.where(flagged, self.flagged_weight, 1.0))
        return Screened(batch.take(~flagged), flagged.cpu())

    def _prepared(self, view: View, device: torch.device) -> Memory:
        """The fitted detector and its threshold, as notes."""
        detector, fitted = self._detector, {}
        trusted = view.trusted.to(device)
        n = trusted.size
        k = math.floor(self.fpr * (n + 1) + 1e-9)  # 0.1 * 30 should be 3
        if k < 1:
            raise DataError(
                f"filter: {n} trusted samples cannot set a false-positive rate of {self.fpr:g}; give at least "
                f"{math.ceil(1 / self.fpr) - 1}, or a rate of {1 / (n + 1):.3g} or more."
            )
        if detector.fits:
            rng = generator("filter", self.detector["name"])
            chosen = view.training if self.fit_samples is None else _drawn(view.training, self.fit_samples, rng)
            clean = observe(view.model.module, (batch.to(device) for batch in chosen))
            fitted = detector.fit(clean, rng=rng)
        scores = torch.cat([self._scores(piece, view, fitted) for piece in trusted.split(CHUNK)])
        finite, name = torch.isfinite(scores), self.detector["name"]
        ordered = torch.where(finite, scores, -torch.inf).sort().values
        threshold = ordered[k - 1]
        if not torch.isfinite(threshold):
            raise DataError(
                f"filter: {n - int(finite.sum())} of {n} trusted samples have no finite score ({name}), and a rate of "
                f"{self.fpr:g} allows less than {k}; the model has diverged, or the detector does not suit it."
            )
        if ordered[0] == ordered[-1]:
            raise DataError(
                f"filter: all {n} trusted samples have the same score ({name}), so no threshold separates any; compare "
                "with an older model, or choose another detector."
            )
        return {f"{FITTED}{key}": tensor for key, tensor in fitted.items()} | {THRESHOLD: threshold.cpu()}

    @property
    def _detector(self) -> Detector:
        built: Detector = self.__dict__["built"]
        return built

    def _scores(self, batch: AnyBatch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        """(n,) float64, on the batch's device."""
        with view.inside("scoring.", self._detector.needs, f"filter, {self.detector['name']}") as inside:
            return self._detector.score(batch, inside, fitted).detach().double()


def _under_prefix(memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The detector's part of the notes."""
    return {key.removeprefix(FITTED): value for key, value in memory.items() if key.startswith(FITTED)}


def _drawn(batches: Iterable[AnyBatch], count: int, rng: Generator) -> Iterator[AnyBatch]:
    """So many samples of the batches at most, drawn at random, in their order.

    Args:
        batches: Gone through twice: to count, and to take.
        count: How many samples.
        rng: Draws them.
    """
    sizes = [batch.size for batch in batches]
    kept = torch.zeros(sum(sizes), dtype=torch.bool)
    kept[torch.randperm(len(kept), generator=rng)[:count]] = True
    for batch, mine in zip(batches, torch.split(kept, sizes), strict=True):
        if bool(mine.any()):
            yield batch.take(mine)
