"""As far from the honest updates as they are from each other."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from mithridate.core.registry import register, settings
from mithridate.core.update_attack import Honest
from mithridate.core.view import View
from mithridate.update_attacks.hostile import HostileShare, Share, every_honest_row


@register("update_attack", "min_max")
@settings
class MinMax(HostileShare):
    """All hostile clients send mean + gamma * direction, gamma as large as the honest rows' own distances allow.

    The largest distance to an honest row stays within the largest distance of two honest rows; gamma is found by
    bisection.

    Args:
        direction: `unit`: against the mean; `std`: against the entries' standard deviations; `sign`: against the mean's
            signs.
        bisections: Halvings of the interval of gamma, >= 1.

    Source:
        Shejwalkar and Houmansadr, NDSS 2021, "Manipulating the Byzantine", section IV-C and Algorithm 1 (Min-Max).
    """

    every_row: ClassVar[bool] = True

    poison_ratio: Share = 0.2
    direction: Literal["unit", "std", "sign"] = "unit"
    bisections: Annotated[int, Field(ge=1)] = 30

    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        """The same row from every hostile client."""
        rows = every_honest_row(honest)
        mean = rows.mean(0)
        rows = rows - mean
        towards = {
            "unit": -mean / torch.linalg.vector_norm(mean).clamp_min(torch.finfo(mean.dtype).tiny),
            "std": -torch.std(rows, 0, correction=0),
            "sign": -mean.sign(),
        }[self.direction]
        limit = float(torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").max())
        step = float(torch.linalg.vector_norm(towards))
        # The mean is within the limit of every row, so what lies two limits from it is too far from all of them.
        low, high = 0.0, 2 * limit / step if step > 0 else 0.0
        for _ in range(self.bisections):
            middle = (low + high) / 2
            low, high = (middle, high) if self._reach(rows, middle * towards) <= limit else (low, middle)
        row: Tensor = mean + low * towards
        return row.expand(honest.hostile, -1)

    @staticmethod
    def _reach(rows: Tensor, row: Tensor) -> float:
        return float(torch.linalg.vector_norm(rows - row, dim=1).max())
