"""The point with the smallest sum of distances to all rows."""

import math
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from mithridate.core.aggregator import Aggregator, Context, Spread
from mithridate.core.registry import register, settings
from mithridate.maths.rows import blend, by_column, lengths, middle


@register("aggregator", "geometric_median", presets={"paper": {"iterations": 3}})
@settings
class GeometricMedian(Aggregator):
    """The geometric median of the rows (RFA), by the smoothed Weiszfeld algorithm; weighted if the clients are.

    The paper starts from the mean, which one client moves anywhere: with honest rows far from it, an iteration brings
    the point nearer by a factor of about f / (n - f) only, so that a long enough row wins against any fixed number of
    iterations. Here it starts from the coordinate-wise median (unweighted), and no iteration raises the smoothed sum of
    distances. So, with a the hostile rows' share of the weights and less than half of them in number, honest rows no
    further than D apart and a box of diagonal B around them, the result is within
    ((1 - a) D + B + nu / 2) / (1 - 2a) of every honest row after any number of iterations.

    What breaks it: half of the clients, or of the weights; rows that lean to the same side, inside the honest spread.

    Args:
        iterations: Weiszfeld iterations, >= 1; each reads all rows twice. Three are the paper's, to save communication
            which a server that holds the rows does not need.
        nu: Distances below it count as it, > 0, in the units of the rows: keeps an iterate off the rows themselves.

    Source:
        Pillutla, Kakade and Harchaoui, IEEE Transactions on Signal Processing 2022, arXiv:1912.13445, Algorithm 2.
    """

    weighted: ClassVar[bool] = True

    iterations: Annotated[int, Field(ge=1)] = 30
    nu: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-6

    def most_hostile(self, n: int) -> int:
        """Less than half, if all weights are alike."""
        return max((n - 1) // 2, 0)

    def worst_deviation(self, honest: Spread, n: int, context: Context) -> float:
        """The distance from every honest row, as the class says, if the hostile rows have the largest weights."""
        a = float(context.shares().sort(descending=True).values[: self.most_hostile(n)].sum())
        if a >= 0.5:
            return math.inf
        return ((1 - a) * honest.diameter + honest.diagonal + self.nu / 2) / (1 - 2 * a)

    def combine(self, rows: Tensor, context: Context) -> Tensor:
        """The last iterate."""
        shares = context.shares().to(rows.device)
        point = by_column(rows, middle)
        for _ in range(self.iterations):
            pull = shares / lengths(rows, point).clamp_min(self.nu)
            point = blend(pull / pull.sum(), rows)
        return point.to(rows.dtype)
