"""What poisons a stream."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.component import Component, check_moves
from mithridate.core.domain import check_domain
from mithridate.core.view import View
from mithridate.maths.norms import Ball, by_row

Power = Literal["inputs", "labels", "samples"]
"""What of a sample an attack changes: its inputs, within the ball; its label; or all of it, by sending another one."""

ASCENT = "ascent"
"""Where an attack notes its own objective, as the crafting found it and as it left it: a tensor of two numbers."""


class Attack(Component, ABC):
    """Poisons the batches of a stream, then one trigger batch.

    An author writes `craft` (and `craft_trigger` or `ready` where they differ from the defaults); the loop calls
    `poison` and `trigger`, which check what goes in and hold what comes out to the budget.
    """

    control: ClassVar[bool] = False
    """Whether it is a control, which is not meant to beat noise."""

    restrained: ClassVar[bool] = False
    """Whether it may well send less than its budget allows, or nothing, on purpose."""

    power: ClassVar[Power] = "inputs"
    """What of a sample it changes. Only inputs have a ball."""

    weight_momentum: float | None = None
    """Momentum factor that the attack imposes on the victim's optimiser in the accumulative phase; None leaves it."""

    @property
    @abstractmethod
    def ball(self) -> Ball:
        """The perturbation budget of one sample."""

    @property
    def trigger_ball(self) -> Ball:
        """That of a sample of the trigger; the same unless an attack says that its trigger leaves it."""
        return self.ball

    @property
    @abstractmethod
    def ratio(self) -> float:
        """Share of each batch that may be poisoned, in [0, 1]."""

    @abstractmethod
    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        """Perturbed inputs for one batch of the accumulative phase.

        Args:
            batch: The clean batch (n, ...), (n,).
            view: What the attack declared.
            mask: (n,) bool, the samples that may change.
            rng: The only source of randomness.

        Returns:
            Shaped like `batch.x`, inside the ball and the domain; rows that may not change are put back by the caller.
        """

    def craft_trigger(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        """Perturbed inputs for the trigger batch; by default the same as for any other batch."""
        return self.craft(batch, view, mask, rng)

    def ready(self, view: View) -> bool:
        """Whether the accumulative phase should end now; asked before every batch. By default it never should."""
        return False

    def after_step(self, view: View, rng: Generator) -> None:
        """Called after the victim has learned from a poisoned batch; `view` shows the updated model."""

    def ascent(self, view: View) -> tuple[float, float] | None:
        """What the attack's own objective was before and after it crafted the last batch; None where nobody noted it.

        Args:
            view: What the attack declared.
        """
        noted = view.memory.get(ASCENT)
        return None if noted is None else (float(noted[0]), float(noted[1]))

    def check_inputs(self, batch: AnyBatch) -> None:
        """Refuse inputs that cannot be moved, unless nothing is moved at all.

        Raises:
            ConfigError: They are not one tensor of floats.
        """
        if self.ball.eps > 0 and self.ratio > 0:
            check_moves(batch, who=type(self).__name__)

    def poison(self, batch: AnyBatch, view: View, *, rng: Generator) -> AnyBatch:
        """One batch of the accumulative phase, poisoned within the budget.

        Args:
            batch: The clean batch; not changed.
            view: What the attack declared.
            rng: The only source of randomness.

        Returns:
            A batch of the same shape, dtype, device and labels.

        Raises:
            DataError: Inputs are not what the domain allows (see `check_domain`).
            AssertionError: The attack broke its own budget; a defect in it.
        """
        return self._guarded(self.craft, self.ball, batch, view, rng)

    def trigger(self, batch: AnyBatch, view: View, *, rng: Generator) -> AnyBatch:
        """The trigger batch, poisoned within the budget; takes, returns and raises what `Attack.poison` does."""
        return self._guarded(self.craft_trigger, self.trigger_ball, batch, view, rng)

    def _guarded(
        self,
        craft: Callable[[Batch, View, Tensor, Generator], Tensor],
        ball: Ball,
        batch: AnyBatch,
        view: View,
        rng: Generator,
    ) -> AnyBatch:
        view.memory.pop(ASCENT, None)
        if self.ball.eps == 0 or self.ratio == 0:
            return batch
        name = type(self).__name__
        check_domain(batch, view.domain, where=f"batch given to {name}")
        mask = self.positions(batch.size, view, rng).to(batch.x.device)
        if not bool(mask.any()):
            return batch
        copy = batch.clone().with_class_numbers()  # it cannot change what is checked below
        x = craft(copy, view, mask.clone(), rng).detach()
        if (x.shape, x.dtype, x.device) != (batch.x.shape, batch.x.dtype, batch.x.device):
            raise AssertionError(f"{name} made {x.dtype} {tuple(x.shape)} of {batch.x.dtype} {tuple(batch.x.shape)}")
        x = torch.where(by_row(mask, x), x, batch.x)
        poisoned = Batch(x, batch.y)
        check_domain(poisoned, view.domain, where=f"batch made by {name}")
        if not ball.holds(x - batch.x, batch.x):
            raise AssertionError(f"{name} left its {ball.norm} ball of radius {ball.eps}")
        return poisoned

    def positions(self, n: int, view: View, rng: Generator) -> Tensor:
        """The positions that may change: drawn once, kept for the whole run and the trigger (Pang et al., Table 2)."""
        count = int(self.ratio * n + 0.5)
        key = f"positions.{n}"
        if key not in view.memory:
            view.memory[key] = torch.randperm(n, generator=rng)
        mask = torch.zeros(n, dtype=torch.bool)
        mask[view.memory[key][:count]] = True
        return mask
