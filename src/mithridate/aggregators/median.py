"""The median of each parameter on its own."""

from torch import Tensor

from mithridate.core.aggregator import Aggregator, Context, Spread
from mithridate.core.registry import register, settings
from mithridate.maths.rows import by_column, middle


@register("aggregator", "median")
@settings
class Median(Aggregator):
    """The median of each parameter over the clients; of an even number, the mean of the two in the middle.

    As long as fewer than half of the rows are hostile, the result lies in the box of the honest ones. Weights are
    ignored: every client counts as one. One sort of the matrix.

    What breaks it: half of the clients; and a minority that stays inside the honest clients' box, on the same side in
    every parameter: with P parameters that is a shift of the order of sqrt(P) honest deviations.

    Source:
        Yin et al., ICML 2018, arXiv:1803.01498, Definition 1 (Option I of Algorithm 1).
    """

    def most_hostile(self, n: int) -> int:
        """Less than half."""
        return max((n - 1) // 2, 0)

    def worst_deviation(self, honest: Spread, n: int, context: Context) -> float:
        """None: in every column some honest entry is at or below the median, and one at or above."""
        return 0.0

    def combine(self, rows: Tensor, context: Context) -> Tensor:
        """The middle of every column."""
        return by_column(rows, middle).to(rows.dtype)
