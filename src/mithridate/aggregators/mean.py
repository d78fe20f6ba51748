"""The plain average of all updates, which one client can move anywhere."""

import math
from typing import ClassVar

from torch import Tensor

from mithridate.core.aggregator import Aggregator, Context, Spread
from mithridate.core.registry import register, settings
from mithridate.maths.rows import blend


@register("aggregator", "mean")
@settings
class Mean(Aggregator):
    """The average of all rows, weighted if the clients have weights (federated averaging).

    Declared not robust: the result is linear in every row, so a single client that knows the others' rows makes it
    whatever it wants (the recovered offset of Pang et al., Appendix C.1). It is what the other rules are compared with.

    Source:
        McMahan et al., AISTATS 2017, Algorithm 1; Blanchard et al., NeurIPS 2017, Lemma 1 (no linear rule stands one
        hostile row).
    """

    average: ClassVar[bool] = True
    weighted: ClassVar[bool] = True

    def most_hostile(self, n: int) -> int:
        """None."""
        return 0

    def worst_deviation(self, honest: Spread, n: int, context: Context) -> float:
        """Any distance."""
        return math.inf

    def combine(self, rows: Tensor, context: Context) -> Tensor:
        """The weighted average."""
        return blend(context.shares(), rows).to(rows.dtype)
