"""Bucketing: rows are averaged in small random groups."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mithridate.aggregators.mixing import Front, inner_context
from mithridate.core.aggregator import Context, Spread
from mithridate.core.errors import ConfigError
from mithridate.core.registry import register, settings
from mithridate.maths.rows import mixtures


@register("aggregator", "bucketing")
@settings
class Bucketing(Front):
    """The rows, in random order, are averaged s at a time; another rule aggregates these ceil(n / s) averages.

    The averages differ less than the rows where clients' data differ, and each hostile row spoils one bucket: so the
    inner rule must stand as many hostile rows of ceil(n / s) as there are of n. Its `hostile` counts buckets. Buckets
    without hostile rows lie in the hull of the honest ones. Weights are ignored and not handed on.

    The order is drawn for the clients by id, so that it does not depend on who answered first. If s does not divide n,
    the last bucket is smaller.

    What breaks it: what breaks the inner rule, and s times sooner: f hostile rows spoil up to f of only ceil(n / s)
    buckets.

    Args:
        inner: The rule that aggregates the buckets, as in a recipe: `{name = "krum", hostile = 2}`; completed with its
            defaults.
        bucket_size: s, rows in a bucket, >= 1; 1 hands the rows on; the paper advises 2.
        worker_momentum: beta, in [0, 1): each client's rows are averaged over its own past with this weight before they
            are put in buckets; 0: without. The server keeps one row for each client that it ever saw.

    Raises:
        ConfigError: The inner table is wrong, or the inner rule keeps worker momentum itself.

    Source:
        Karimireddy, He and Jaggi, ICLR 2022, arXiv:2006.09365, Algorithm 1 (s-bucketing) and Algorithm 2 (with worker
        momentum).
    """

    bucket_size: Annotated[int, Field(ge=1)] = 2

    def __hash__(self) -> int:
        """Equal fronts have equal hashes; the table itself has none."""
        return hash((super().__hash__(), self.bucket_size))

    def buckets(self, n: int) -> int:
        """How many buckets `n` rows fill."""
        return -(-n // self.bucket_size)

    def most_hostile(self, n: int) -> int:
        """As many as the inner rule stands buckets."""
        return self.built.most_hostile(self.buckets(n))

    def check(self, n: int) -> None:
        """Refuse too few rows to fill the buckets that the inner rule needs.

        Raises:
            ConfigError: The inner rule has too few.
        """
        super().check(n)
        m = self.buckets(n)
        try:
            self.built.check(m)
        except ConfigError as error:
            raise ConfigError(
                f"{type(self).__name__}: {n} rows fill {m} buckets of {self.bucket_size}, which are the inner rule's "
                f"rows. {error}"
            ) from None

    def worst_deviation(self, honest: Spread, n: int, context: Context) -> float:
        """The inner rule's: the honest buckets are no further apart than the honest rows."""
        m = self.buckets(n)
        return self.built.worst_deviation(honest, m, inner_context(context, torch.arange(m)))

    def mix(self, rows: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The average of each bucket."""
        n, m = len(rows), self.buckets(len(rows))
        order = context.clients.cpu().argsort()[torch.randperm(n, generator=context.rng)]
        members = torch.zeros(m, n, dtype=torch.float64)
        members[torch.arange(n) // self.bucket_size, order] = 1
        return mixtures(members / members.sum(1, keepdim=True), rows), torch.arange(m)
