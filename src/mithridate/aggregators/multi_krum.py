"""The mean of the rows that have the nearest neighbours."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mithridate.aggregators.bounded import Bounded
from mithridate.aggregators.krum import ranking, reach
from mithridate.core.aggregator import Context, Spread
from mithridate.core.errors import ConfigError
from mithridate.core.registry import register, settings
from mithridate.maths.rows import blend, squared_distances


@register("aggregator", "multi_krum")
@settings
class MultiKrum(Bounded):
    """The plain mean of the m rows that Krum ranks best.

    Hostile rows can be among them. As for `krum`, each of the n - f best is within D sqrt((n - f - 2) / (n - 2f - 1))
    of an honest row, so their mean is that near to the convex hull of the honest rows; hence m is at most n - f.
    Weights are ignored, also in the mean: every client counts as one. Ties as in `krum`. Costs n^2 P.

    What breaks it: as for `krum`, colluding rows a little beside the honest ones; the mean dilutes them.

    Args:
        hostile: f, the hostile rows to expect, >= 0; needs n >= 2f + 3 rows; unset: as many as that allows.
        keep: m, the rows to average, in [1, n - f]; 1 is Krum; unset: n - f.

    Source:
        Blanchard et al., NeurIPS 2017, section 5, Multi-Krum.
    """

    times: ClassVar[int] = 2
    besides: ClassVar[int] = 3

    keep: Annotated[int, Field(ge=1)] | None = None

    def check(self, n: int) -> None:
        """Refuse too few rows for the hostile ones to expect, or for the ones to keep.

        Raises:
            ConfigError: There are fewer than the bound needs, or than `keep` among those taken for honest.
        """
        super().check(n)
        most = n - self.most_hostile(n)
        if self.keep is not None and self.keep > most:
            raise ConfigError(
                f"MultiKrum: keep = {self.keep}, but of {n} rows only n - f = {most} can be taken for honest; keep "
                "fewer, or expect fewer hostile ones."
            )

    def worst_deviation(self, honest: Spread, n: int, context: Context) -> float:
        """The distance from the honest rows' hull, as the class says."""
        return reach(honest.diameter, n, self.most_hostile(n))

    def combine(self, rows: Tensor, context: Context) -> Tensor:
        """The mean of the best."""
        n = len(rows)
        f = self.most_hostile(n)
        best = ranking(squared_distances(rows), f)[: self.keep or n - f]
        shares = torch.zeros(n, dtype=torch.float64)
        shares[best] = 1 / len(best)
        return blend(shares, rows).to(rows.dtype)
