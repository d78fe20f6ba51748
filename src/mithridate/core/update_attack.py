"""What hostile clients of a federation send in place of honest updates."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Generator, Tensor

from mithridate.core.component import Component
from mithridate.core.view import View


@dataclass(frozen=True)
class Honest:
    """What the honest part of a federated round looks like to an attacker who sees every update.

    Args:
        total: (parameters,), sum of the honest clients' rows.
        bounded_total: (parameters,), sum of those rows after the server's bound on each; `total` where it bounds none.
        n_honest: How many honest clients there are.
        x: Inputs of the hostile clients' own samples (hostile clients, samples, ...).
        y: Their targets (hostile clients, samples, ...).
        rows: (honest clients, parameters), after the server's bound on single rows; not to be written to. Only
            an attack that declares `every_row` is sure to see them; for others they may be None.
        gradients: (inputs, targets) of all hostile clients -> the updates that they would send, a row each, as the
            round computes them.
        summed: (inputs, targets) -> the sum of these updates, for which a model may need no rows; None: of the rows.
    """

    total: Tensor
    bounded_total: Tensor
    n_honest: int
    x: Tensor
    y: Tensor
    rows: Tensor | None
    gradients: Callable[[Tensor, Tensor], Tensor]
    summed: Callable[[Tensor, Tensor], Tensor] | None = None

    @cached_property
    def own(self) -> Tensor:
        """(hostile clients, parameters), the updates of the hostile clients' data; computed when first looked at."""
        return self.gradients(self.x, self.y)

    @property
    def own_total(self) -> Tensor:
        """(parameters,), the sum of `own`, which is formed for it only if it must be."""
        if self.summed is None or "own" in vars(self):
            return self.own.sum(0)
        return self.summed(self.x, self.y)

    @property
    def hostile(self) -> int:
        """How many hostile clients there are."""
        return len(self.x)

    @property
    def clients(self) -> int:
        """All clients of the round."""
        return self.n_honest + self.hostile

    @property
    def mean(self) -> Tensor:
        """(parameters,), the mean update of the round if every client were honest and no row bounded."""
        return (self.total + self.own_total) / self.clients


class UpdateAttack(Component, ABC):
    """Sends model updates in place of honest ones: the attack of a federated round.

    An author writes `craft` (and `craft_trigger` or `ready` where they differ from the defaults).
    """

    control: ClassVar[bool] = False
    """Whether it is a control, which is not meant to do harm."""

    every_row: ClassVar[bool] = False
    """Whether it looks at each honest row (`Honest.rows`), not only at their sum."""

    @property
    @abstractmethod
    def ratio(self) -> float:
        """Share of a round's clients that are hostile, in [0, 1]; rounded up to a whole client."""

    @abstractmethod
    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        """(hostile clients, parameters), sent in one round before the trigger; they may be views of a single row."""

    def craft_trigger(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        """(hostile clients, parameters), sent in the trigger round; by default as in any other."""
        return self.craft(honest, view, rng)

    def ready(self, view: View) -> bool:
        """Whether the trigger should come now; asked before every round. By default never."""
        return False

    def after_step(self, view: View, rng: Generator) -> None:
        """Called after a round before the trigger; `view` shows the updated model."""
