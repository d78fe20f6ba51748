"""A robust aggregator as a defence of a federated round."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mithridate.core.aggregator import Aggregator, Context
from mithridate.core.defence import Defence
from mithridate.core.errors import ConfigError
from mithridate.core.registry import build, config_of, register, settings
from mithridate.core.seeding import generator
from mithridate.core.update import Gradient
from mithridate.core.view import Need, View
from mithridate.maths.calculus import gradient as loss_gradient

CHUNK = 500
"""Trusted samples whose gradient is computed at once."""


@register("defence", "robust")
@settings
class Robust(Defence):
    """Make one update of a round's clients by a robust rule instead of the mean.

    It acts in federated rounds alone: an online learner has one client, and every rule gives that one's update. For a
    rule that needs the server's own update (`fltrust`) that is the gradient on the trusted set, BatchNorm in eval mode.

    What breaks it: more hostile clients than the rule stands; attacks that need no update to stand out in its round, as
    the accumulative one, since a rule looks at one round at a time; and clients whose data really differ, which look
    like outliers.

    Args:
        rule: Its table, as in a recipe: `{name = "krum", hostile = 2}`; completed with the rule's defaults.

    Raises:
        ConfigError: The rule's name, key or value is wrong; or (from `aggregate`) it needs a trusted update while some
            parameters are left out of distances.

    Source:
        Each rule names its own; `mithridate list aggregators`.
    """

    neutral: ClassVar[Mapping[str, Any]] = {}
    active: ClassVar[Mapping[str, Any]] = {}

    rule: dict[str, Any] = Field(default_factory=lambda: {"name": "median"})

    def __post_init__(self) -> None:
        built: Aggregator = build("aggregator", self.rule, where="[defence] robust, rule")
        # The class is frozen: these are set once, here, and follow from `rule`.
        object.__setattr__(self, "rule", config_of(built))
        object.__setattr__(self, "aggregator", built)
        if built.needs_trusted:
            object.__setattr__(self, "needs", frozenset({Need.MODEL, Need.TRUSTED}))

    def __hash__(self) -> int:
        """Equal rules have equal hashes; the table itself has none."""
        return hash(self.rule["name"])

    @property
    def built(self) -> Aggregator:
        """The rule as a settings object."""
        built: Aggregator = self.__dict__["aggregator"]
        return built

    def check(self, clients: int) -> None:
        """Refuse a number of clients with which the rule does not hold.

        Raises:
            ConfigError: Names the bound.
        """
        self.built.check(clients)

    def aggregate(self, gradient: Gradient, view: View) -> Gradient:
        """One row by the rule."""
        built = self.built
        clients = gradient.clients if gradient.clients is not None else torch.arange(len(gradient.rows))
        context = Context(
            clients=clients,
            rng=generator("aggregator", self.rule["name"], view.step),
            trusted=self._trusted(gradient, view) if built.needs_trusted else None,
            memory=view.memory,
        )
        return gradient.with_rows(built.aggregate(gradient.rows, context).unsqueeze(0))

    def _trusted(self, gradient: Gradient, view: View) -> Tensor:
        box = view.model
        with box.objective("eval") as objective:
            own = Gradient.of(loss_gradient(objective, box.parameters, *view.trusted, chunk=CHUNK)).rows[0]
        if len(own) != gradient.rows.shape[1]:
            raise ConfigError(
                f"robust: {self.rule['name']} compares with the server's own update, of {len(own)} parameters, and the "
                f'rows have {gradient.rows.shape[1]}; give distances = "all" in [federated].'
            )
        return own
