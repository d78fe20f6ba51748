"""Kernel density of a sample's features among clean ones of the class that the model predicts."""

import math
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from mithridate.core.batch import Batch
from mithridate.core.errors import DataError
from mithridate.core.features import observe
from mithridate.core.registry import register, settings
from mithridate.core.view import Memory, View
from mithridate.core.watch import Detector, Observed
from mithridate.detectors.stored import by_class, distances


@register(
    "detector",
    "kd",
    presets={"paper": {"bandwidth": 0.01, "per_class": 1000}, "released": {"bandwidth": 10.0, "per_class": 1000}},
)
@settings
class KernelDensity(Detector):
    """Log of the mean Gaussian kernel between a sample's features and clean ones of the predicted class.

    Only clean samples that the model classifies as labelled are stored. The sum is taken in the log domain and in
    float64: a far sample gets a large negative number, where a plain sum would be 0 for all of them.

    Args:
        bandwidth: sigma in the kernel exp(-|z - z_i|^2 / sigma^2), in the unit of the features, > 0. Far below the
            distances between samples (the paper's 0.01) only the nearest one counts; far above (the released code
            multiplies the square by 0.01, which is sigma = 10) the score is the mean square distance. Unset: the median
            distance of a stored feature to the nearest other one of its class, measured when fitted, which suits
            features of any scale; see the source.
        per_class: Features stored of each class at most, >= 2; more are drawn from.

    Raises:
        DataError: (from `fit`) fewer than two correctly classified clean samples of a class, a feature that is not
            finite, or, with no bandwidth given, more than half of the samples have a twin.

    Source:
        Pang et al., NeurIPS 2021, section 4.1 and appendix B.3, after Feinman et al., arXiv:1703.00410, Eq. (3). The
        bandwidth that is used when none is given is ours: on embedded digits and the toy stream it separates PGD,
        noise and poison as well as the best of a scan from 0.01 to 100, and at 10 less well.
    """

    bandwidth: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    per_class: Annotated[int, Field(ge=2)] = 1000

    def fit(self, clean: Observed, *, rng: Generator) -> Memory:
        """Stored features, their class, the bandwidth."""
        stored = []
        for features in by_class(clean, where="kd"):
            kept = torch.randperm(len(features), generator=rng)[: self.per_class]
            stored.append(features[kept.to(features.device)])
        return {
            "features": torch.cat(stored),
            "classes": torch.cat([torch.full((len(f),), label) for label, f in enumerate(stored)]),
            "bandwidth": torch.tensor(self.bandwidth or _median_gap(stored), dtype=torch.float64),
        }

    def score(self, batch: Batch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        """(n,) float64, <= 0: the log of a mean of kernels, each at most 1."""
        seen = observe(view.model.module, [batch])
        features, classes = (fitted[name].to(seen.features.device) for name in ("features", "classes"))
        scores = torch.empty(batch.size, dtype=torch.float64, device=seen.features.device)
        for label in torch.unique(seen.predicted):
            mine, same = seen.predicted == label, features[classes == label]
            exponents = -(distances(seen.features[mine], same) / float(fitted["bandwidth"])).square()
            scores[mine] = torch.logsumexp(exponents, 1) - math.log(len(same))
        return scores


def _median_gap(stored: list[Tensor]) -> float:
    """Median over all stored features of the distance to the nearest other one of the same class.

    Raises:
        DataError: It is zero.
    """
    gaps = torch.cat([distances(features, features).fill_diagonal_(torch.inf).amin(1) for features in stored])
    median = float(gaps.median())
    if median == 0:
        raise DataError(
            "kd: more than half of the clean samples have a twin of equal features in their class, so the median "
            "distance to the nearest one is 0 and no bandwidth; set `bandwidth`, or give other clean samples."
        )
    return median
