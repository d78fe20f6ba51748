"""Rules that are told how many hostile rows to expect."""

from abc import ABC
from typing import Annotated, ClassVar

from pydantic import Field

from mithridate.core.aggregator import Aggregator
from mithridate.core.errors import ConfigError
from mithridate.core.registry import settings

HostileRows = Annotated[int, Field(ge=0)]


@settings
class Bounded(Aggregator, ABC):
    """A rule that is told how many hostile rows to expect, and needs n >= `times` * f + `besides` rows for f of them.

    Args:
        hostile: Hostile rows to expect, f; unset: as many as the bound allows among the rows of the round.
    """

    times: ClassVar[int]
    besides: ClassVar[int]

    hostile: HostileRows | None = None

    def most_hostile(self, n: int) -> int:
        """By the bound, and no more than it was told to expect."""
        allowed = max((n - self.besides) // self.times, 0)
        return allowed if self.hostile is None else min(self.hostile, allowed)

    def check(self, n: int) -> None:
        """Refuse too few rows for the hostile ones to expect.

        Raises:
            ConfigError: There are fewer than the bound needs.
        """
        super().check(n)
        f = self.hostile or 0
        fewest = self.times * f + self.besides
        if n < fewest:
            raise ConfigError(
                f"{type(self).__name__}: {n} rows are too few for {f} hostile ones: it needs n >= {self.times}f + "
                f"{self.besides} = {fewest}; ask more clients"
                + (" or expect fewer hostile ones." if f else ", or take another rule.")
            )
