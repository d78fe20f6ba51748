"""What stands in front of a rule and hands it mixtures of the rows."""

import dataclasses
from abc import ABC, abstractmethod
from typing import Any

from pydantic import Field
from torch import Tensor

from mithridate.aggregators.worker_momentum import Beta, with_momentum
from mithridate.core.aggregator import Aggregator, Context
from mithridate.core.errors import ConfigError
from mithridate.core.registry import build, config_of, settings

INNER = "inner."


@settings
class Front(Aggregator, ABC):
    """Mixes rows and lets another rule aggregate the mixtures; override `mix`.

    Args:
        inner: The rule, as in a recipe: `{name = "krum", hostile = 2}`; completed with its defaults.
        worker_momentum: beta, in [0, 1), of each client's own average over its past rows, taken before they are mixed.

    Raises:
        ConfigError: The inner table is wrong, or the inner rule keeps notes on single clients.
    """

    inner: dict[str, Any] = Field(default_factory=lambda: {"name": "median"})
    worker_momentum: Beta = 0.0

    def __post_init__(self) -> None:
        where = f"[aggregator] {type(self).__name__}, inner"
        rule: Aggregator = build("aggregator", self.inner, where=where)
        if rule.remembers_clients:
            raise ConfigError(
                f"{where}: {type(rule).__name__} keeps worker momentum, but would get mixtures and no client's own "
                f"rows; set `worker_momentum` on {type(self).__name__} instead, which averages before it mixes."
            )
        # The class is frozen: these are set once, here, and follow from the fields.
        object.__setattr__(self, "inner", config_of(rule))
        object.__setattr__(self, "rule", rule)
        object.__setattr__(self, "average", rule.average)
        object.__setattr__(self, "needs_trusted", rule.needs_trusted)
        object.__setattr__(self, "unmet", rule.unmet)
        object.__setattr__(self, "remembers_clients", self.worker_momentum > 0)

    def __hash__(self) -> int:
        """Equal fronts have equal hashes; the table itself has none."""
        return hash((type(self), self.inner["name"], self.worker_momentum))

    @property
    def built(self) -> Aggregator:
        """The inner rule as a settings object."""
        rule: Aggregator = self.__dict__["rule"]
        return rule

    @abstractmethod
    def mix(self, rows: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The mixtures (m, P), and an id for each (m,)."""

    def combine(self, rows: Tensor, context: Context) -> Tensor:
        """What the inner rule makes of the mixtures; its notes are kept under `inner.`."""
        rows = with_momentum(rows, context, self.worker_momentum)
        mixed, ids = self.mix(rows, context)
        inside = inner_context(context, ids)
        made = self.built.aggregate(mixed, inside)
        for key in [key for key in context.memory if key.startswith(INNER)]:
            del context.memory[key]
        context.memory.update({INNER + key: value for key, value in inside.memory.items()})
        return made


def inner_context(context: Context, ids: Tensor) -> Context:
    """What the inner rule sees: its own notes, ids of the mixtures, and no weights."""
    notes = {key.removeprefix(INNER): value for key, value in context.memory.items() if key.startswith(INNER)}
    return dataclasses.replace(context, clients=ids, weights=None, memory=notes)
