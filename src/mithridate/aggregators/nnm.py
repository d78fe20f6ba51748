"""Nearest-neighbour mixing: each row becomes the mean of those around it."""

import math

import torch
from torch import Tensor

from mithridate.aggregators.bounded import HostileRows
from mithridate.aggregators.mixing import Front, inner_context
from mithridate.core.aggregator import Context, Spread
from mithridate.core.errors import ConfigError
from mithridate.core.registry import register, settings
from mithridate.maths.rows import mixtures, squared_distances


@register("aggregator", "nnm")
@settings
class NearestNeighbourMixing(Front):
    """Each row is replaced by the mean of the n - f rows nearest to it, itself included; another rule aggregates these.

    It draws honest rows together where clients' data differ, which is what robust rules suffer from. At most f of the
    rows that an honest one is mixed with are hostile, and these are no further from it than honest ones: so with honest
    rows no further than D apart, each mixture is within f D / (n - f) of their hull. Weights are ignored and not handed
    on: a mixture is nobody's. Rows at equal distance: the lowest index. Costs n^2 P.

    What breaks it: what breaks the inner rule, on honest rows that are widened as above.

    Args:
        inner: The rule that aggregates the mixtures, as in a recipe: `{name = "trimmed_mean", hostile = 2}`; completed
            with its defaults.
        hostile: f, the hostile rows to expect, >= 0; needs n >= 2f + 1 rows, and an inner rule that stands f of n;
            unset: as many as that allows.
        worker_momentum: beta, in [0, 1): each client's rows are averaged over its own past with this weight before they
            are mixed; 0: without. The server keeps one row for each client that it ever saw.

    Raises:
        ConfigError: The inner table is wrong, or the inner rule keeps worker momentum itself.

    Source:
        Allouah et al., AISTATS 2023, arXiv:2302.01772, Algorithm 2 (NNM) and Algorithm 1 (with worker momentum).
    """

    hostile: HostileRows | None = None

    def __hash__(self) -> int:
        """Equal fronts have equal hashes; the table itself has none."""
        return hash((super().__hash__(), self.hostile))

    def most_hostile(self, n: int) -> int:
        """What both bounds allow, and no more than it was told to expect."""
        allowed = max(min((n - 1) // 2, self.built.most_hostile(n)), 0)
        return allowed if self.hostile is None else min(self.hostile, allowed)

    def check(self, n: int) -> None:
        """Refuse too few rows for the hostile ones to expect, here or in the inner rule.

        Raises:
            ConfigError: There are fewer than either bound needs.
        """
        super().check(n)
        self.built.check(n)
        f = self.hostile or 0
        if n < 2 * f + 1:
            raise ConfigError(
                f"{type(self).__name__}: {n} rows are too few for {f} hostile ones: it needs n >= 2f + 1 = "
                f"{2 * f + 1}; ask more clients or expect fewer hostile ones."
            )
        stands = self.built.most_hostile(n)
        if f > stands and not self.average:
            raise ConfigError(
                f"{type(self).__name__}: {f} hostile rows of {n}, but the inner rule {self.inner['name']} stands "
                f"{stands}; ask more clients, expect fewer hostile ones, or take another inner rule."
            )

    def worst_deviation(self, honest: Spread, n: int, context: Context) -> float:
        """The inner rule's for the widened mixtures, and how far the box of these is from that of the rows."""
        if self.average:
            return math.inf
        f = self.most_hostile(n)
        moved = f * honest.diameter / (n - f)
        inside = inner_context(context, context.clients)
        return self.built.worst_deviation(honest.widened(moved), n, inside) + moved * math.sqrt(len(honest.widths))

    def mix(self, rows: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The mean of each row's nearest."""
        count = len(rows) - self.most_hostile(len(rows))
        nearest = squared_distances(rows).argsort(dim=1, stable=True)[:, :count]
        shares = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
        return mixtures(shares.scatter_(1, nearest, 1 / count), rows), context.clients
