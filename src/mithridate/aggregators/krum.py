"""The row that has the nearest neighbours."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from mithridate.aggregators.bounded import Bounded
from mithridate.core.aggregator import Context, Spread
from mithridate.core.registry import register, settings
from mithridate.maths.rows import squared_distances


@register("aggregator", "krum")
@settings
class Krum(Bounded):
    """The row with the smallest sum of squared distances to its n - f - 2 nearest other rows.

    The result is one of the rows. It can be a hostile one, and then may lie outside the box of the honest rows, but
    not far: of its n - f - 2 neighbours at least n - 2f - 1 are honest, and its sum is no larger than an honest row's,
    which is at most (n - f - 2) D^2 for honest rows no further than D apart; so it is within
    D sqrt((n - f - 2) / (n - 2f - 1)) of an honest row. Weights are ignored: every client counts as one.

    What breaks it: f colluding clients that send the same row, a little beside the honest ones: they are each other's
    nearest neighbours, and are chosen. And a choice of one row throws away what the others know.

    Where two rows have the same sum (always so for a mutual nearest pair if one neighbour counts), the paper leaves the
    choice open (it says the smallest index). Here the nearer next neighbour decides, and so on, which does not depend
    on the order of the clients; only if all distances agree it is the lowest index. Costs n^2 P.

    Args:
        hostile: f, the hostile rows to expect, >= 0; needs n >= 2f + 3 rows; unset: as many as that allows.

    Source:
        Blanchard et al., NeurIPS 2017, section 4; the bound 2f + 2 < n is that of Proposition 1.
    """

    times: ClassVar[int] = 2
    besides: ClassVar[int] = 3

    def worst_deviation(self, honest: Spread, n: int, context: Context) -> float:
        """The distance from the nearest honest row, as the class says."""
        return reach(honest.diameter, n, self.most_hostile(n))

    def combine(self, rows: Tensor, context: Context) -> Tensor:
        """The best row."""
        return rows[ranking(squared_distances(rows), self.most_hostile(len(rows)))[0]].clone()


def sums(distances: Tensor, hostile: int) -> Tensor:
    """Each row's sum of squared distances to its n - f - 2 nearest others, at least one: (n, n) -> (n,)."""
    near = distances.sort(dim=1).values[:, 1:]  # the first is the row itself, or one equal to it
    return near[:, : max(len(distances) - hostile - 2, 1)].sum(1)


def ranking(distances: Tensor, hostile: int) -> list[int]:
    """All rows, the best first: by their sums, then by their sorted distances, then by index."""
    profiles = torch.cat([sums(distances, hostile).unsqueeze(1), distances.sort(dim=1).values], dim=1).tolist()
    return sorted(range(len(profiles)), key=profiles.__getitem__)


def reach(diameter: float, n: int, hostile: int) -> float:
    """How far from all honest rows a row among the n - f best can lie."""
    return diameter * math.sqrt((n - hostile - 2) / (n - 2 * hostile - 1))
