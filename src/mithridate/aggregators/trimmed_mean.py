"""The mean of each parameter without its extremes."""

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from mithridate.aggregators.bounded import Bounded
from mithridate.core.aggregator import Context, Spread
from mithridate.core.registry import register, settings
from mithridate.maths.rows import by_column


@register("aggregator", "trimmed_mean")
@settings
class TrimmedMean(Bounded):
    """The mean of each parameter over the clients without the f largest and the f smallest entries.

    With at most f hostile rows, n > 2f, the result lies in the box of the honest ones. Weights are ignored: every
    client counts as one. One sort of the matrix.

    What breaks it: more hostile rows than are trimmed; and as for `median`, rows inside the honest box that all lean to
    the same side.

    Args:
        hostile: f, the entries cut off at either end, >= 0; unset: `trim` times the number of rows, rounded down.
        trim: Share of the rows that is cut off at either end, in [0, 0.5), where `hostile` is unset; the beta of the
            paper.

    Source:
        Yin et al., ICML 2018, arXiv:1803.01498, Definition 2 (Option II of Algorithm 1).
    """

    times: ClassVar[int] = 2
    besides: ClassVar[int] = 1

    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.2

    def most_hostile(self, n: int) -> int:
        """As many as are cut off at either end."""
        return int(self.trim * n) if self.hostile is None else super().most_hostile(n)

    def worst_deviation(self, honest: Spread, n: int, context: Context) -> float:
        """None: f entries cut off at each end leave none beyond the honest extremes."""
        return 0.0

    def combine(self, rows: Tensor, context: Context) -> Tensor:
        """The mean of what is left of every column."""
        return by_column(rows, lambda ordered: trimmed(ordered, self.most_hostile(len(rows)))).to(rows.dtype)


def trimmed(ordered: Tensor, cut: int) -> Tensor:
    """The mean of sorted columns without `cut` entries at either end, 2 * cut < n: (n, p) -> (p,)."""
    kept = ordered[cut : len(ordered) - cut]
    return kept.mean(0).clamp(kept[0], kept[-1])  # the mean of equal numbers can be off by a rounding
