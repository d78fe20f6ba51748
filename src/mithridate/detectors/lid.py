"""Local intrinsic dimensionality of a model's features around a sample."""

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
from mithridate.detectors.stored import distances, right_features

SHARE = 0.06
"""Neighbours as a share of the stored samples: the paper's 600 of 10,000."""
LEAST = 10
"""Neighbours at least, where their number follows from the samples: an estimate from a few is mostly noise."""
RESOLUTION = torch.finfo(torch.float32).eps
"""A distance below this share of the K-th neighbour's counts as that: features are float32, and log 0 is no number."""


@register("detector", "lid", presets={"paper": {"neighbours": 600, "stored": 10_000}})
@settings
class LID(Detector):
    """Minus the local intrinsic dimensionality, estimated from the distances to the nearest stored features.

    Stored are clean samples that the model classifies as labelled, of all classes together. A sample that equals a
    stored one has a finite score: its smallest distances are taken for float32's resolution of the K-th, and if all K
    are zero, for a point of a dimension near 0. If all K are equal and not zero, the estimate is infinite and the
    score -inf.

    Args:
        neighbours: K in Eq. (19), >= 2. Unset: 6 % of the stored samples, at least 10, which is the paper's 600 where
            10,000 are stored, and stays local where there are fewer.
        stored: Features stored at most, >= 3; more are drawn from.

    Raises:
        DataError: (from `fit`) not more correctly classified clean samples than neighbours, or a feature that is not
            finite.

    Source:
        Pang et al., NeurIPS 2021, appendix B.3, Eq. (19), after Ma et al., ICLR 2018, arXiv:1801.02613, Eq. (4).
    """

    neighbours: Annotated[int, Field(ge=2)] | None = None
    stored: Annotated[int, Field(ge=3)] = 10_000

    def fit(self, clean: Observed, *, rng: Generator) -> Memory:
        """The stored features."""
        right = right_features(clean, where="lid").features
        kept = torch.randperm(len(right), generator=rng)[: self.stored]
        count = self._count(len(kept))
        if len(kept) <= count:
            raise DataError(
                f"lid: {count} neighbours need more than {count} stored samples; {len(kept)} of {len(clean.y)} clean "
                f"samples could be stored (the model classifies {len(right)} as labelled; stored = {self.stored}). "
                "Give more clean samples, or set fewer `neighbours`."
            )
        return {"features": right[kept.to(right.device)]}

    def score(self, batch: Batch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        """(n,) float64, <= 0."""
        features = observe(view.model.module, [batch]).features
        stored = fitted["features"].to(features.device)
        nearest = distances(features, stored).topk(self._count(len(stored)), largest=False).values
        return -dimensionality(nearest)

    def _count(self, stored: int) -> int:
        return max(LEAST, round(SHARE * stored)) if self.neighbours is None else self.neighbours


def dimensionality(nearest: Tensor) -> Tensor:
    """Local intrinsic dimensionality from distances to the K nearest neighbours, Eq. (19).

    Args:
        nearest: (n, K) in ascending order, >= 0.

    Returns:
        (n,) in [0, inf].
    """
    last = nearest[:, -1:]
    ratios = torch.where(last == 0, torch.zeros_like(nearest), nearest / last).clamp(min=RESOLUTION)
    return 1 / ratios.log().mean(1).abs()  # not -1 / mean: that is -inf where all distances are equal
