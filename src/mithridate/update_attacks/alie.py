"""A little is enough: hide within the spread of the honest updates."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from scipy.stats import norm as normal
from torch import Generator, Tensor

from mithridate.core.registry import register, settings
from mithridate.core.update_attack import Honest
from mithridate.core.view import View
from mithridate.update_attacks.hostile import HostileShare, Share, every_honest_row

LARGEST_SHARE = 1 - 1e-6
"""Of the honest clients; the quantile of 1 is infinite."""


@register("update_attack", "alie")
@settings
class Alie(HostileShare):
    """All hostile clients send mean - z * std of the honest updates, entry by entry.

    Args:
        z: How many standard deviations, > 0; unset: the largest at which enough honest clients lie further out, by the
            paper's formula.

    Source:
        Baruch et al., NeurIPS 2019, arXiv:1902.06156, Algorithm 3 ("A Little Is Enough").
    """

    every_row: ClassVar[bool] = True

    poison_ratio: Share = 0.2
    z: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        """The same row from every hostile client."""
        rows = every_honest_row(honest)
        z = self.z if self.z is not None else largest_z(honest.clients, honest.hostile)
        row = rows.mean(0) - z * torch.std(rows, 0, correction=0)
        return row.expand(honest.hostile, -1)


def largest_z(clients: int, hostile: int) -> float:
    """How far out the hostile row may lie, in standard deviations, if that many clients are hostile.

    The published share of honest clients that may lie nearer is kept between a half (z = 0: too few hostile clients to
    win a vote from anywhere but the middle) and `LARGEST_SHARE` (a hostile majority needs nobody).

    Args:
        clients: Of the round.
        hostile: Of them, fewer than all.

    >>> round(largest_z(50, 24), 2)
    1.43
    """
    supporters = clients // 2 + 1 - hostile
    share = (clients - hostile - supporters) / (clients - hostile)
    return float(normal.ppf(min(max(share, 0.5), LARGEST_SHARE)))
