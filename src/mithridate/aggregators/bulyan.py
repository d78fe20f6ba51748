"""Rows chosen by Krum, then the middle entries of each parameter."""

from typing import ClassVar

import torch
from torch import Tensor

from mithridate.aggregators.bounded import Bounded
from mithridate.aggregators.krum import ranking
from mithridate.core.aggregator import Context, Spread
from mithridate.core.registry import register, settings
from mithridate.maths.rows import by_column, middle, squared_distances


@register("aggregator", "bulyan")
@settings
class Bulyan(Bounded):
    """Krum chooses n - 2f rows, one by one; each parameter is the mean of the n - 4f entries nearest to their median.

    The median of the chosen is in the box of the honest rows. An averaged entry can lie outside, but not further from
    that median than an honest one: so in every parameter the result is at most the width of the honest entries outside
    them. Weights are ignored: every client counts as one.

    What breaks it: more than a quarter of the clients; and rows inside the honest box that all lean to the same side.

    As rows are taken, ever fewer are left for Krum, at last 2f + 1; the paper does not say how many neighbours count
    then. Here always n' - f - 2 of the n' left, and at least one. Equal distances from the median: the smaller entry is
    taken. Ties of Krum as in `krum`. Costs n^2 P and a sort.

    Args:
        hostile: f, the hostile rows to expect, >= 0; needs n >= 4f + 3 rows; unset: as many as that allows.

    Source:
        El Mhamdi et al., ICML 2018, arXiv:1802.07927, section 4.
    """

    times: ClassVar[int] = 4
    besides: ClassVar[int] = 3

    def worst_deviation(self, honest: Spread, n: int, context: Context) -> float:
        """The width of the box in every parameter, as the class says."""
        return honest.diagonal

    def combine(self, rows: Tensor, context: Context) -> Tensor:
        """The middle of the chosen."""
        n, f = len(rows), self.most_hostile(len(rows))
        chosen = choose(squared_distances(rows), f)
        return by_column(rows[chosen], lambda ordered: around_median(ordered, n - 4 * f)).to(rows.dtype)


def choose(distances: Tensor, hostile: int) -> list[int]:
    """The n - 2f rows that Krum takes, one after the other, from those that are left."""
    left = list(range(len(distances)))
    chosen = []
    for _ in range(len(distances) - 2 * hostile):
        among = torch.tensor(left, device=distances.device)
        chosen.append(left.pop(ranking(distances[among][:, among], hostile)[0]))
    return sorted(chosen)


def around_median(ordered: Tensor, count: int) -> Tensor:
    """The mean of the entries nearest to the median of sorted columns: (n, p) -> (p,)."""
    nearest = (ordered - middle(ordered)).abs().argsort(dim=0, stable=True)[:count]
    kept = ordered.gather(0, nearest)
    return kept.mean(0).clamp(kept.amin(0), kept.amax(0))  # the mean of equal numbers can be off by a rounding
