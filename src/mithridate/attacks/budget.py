"""What attacks on images share: the budget, and the settings of the inner optimiser."""

from abc import ABC
from collections.abc import Callable
from typing import Annotated

from pydantic import Field
from torch import Generator, Tensor

from mithridate.ascent import Optimiser, climb
from mithridate.core import Attack, View
from mithridate.norms import Ball, Norm
from mithridate.registry import settings

Eps = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Steps = Annotated[int, Field(ge=0)]
StepSize = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Factor = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@settings
class Budgeted(Attack, ABC):
    """The budget of an attack on images.

    Args:
        eps: Radius of the ball around each clean image, in pixel units of [0, 1] (8/255 is about 0.031).
        norm: Of the ball: `linf` or `l2`.
        poison_ratio: Share of each batch that may be changed, in [0, 1]; the positions are the same in every batch.
    """

    eps: Eps = 16 / 255
    norm: Norm = "linf"
    poison_ratio: Share = 1.0

    @property
    def ball(self) -> Ball:
        """The perturbation budget of one image."""
        return Ball(self.norm, self.eps)

    @property
    def ratio(self) -> float:
        """Share of each batch that may be poisoned."""
        return self.poison_ratio


@settings
class Phased(Budgeted, ABC):
    """A baseline that treats every batch alike, with or without a phase before the trigger.

    Args:
        phase: True: every batch of the accumulative phase is treated like the trigger; False: the trigger batch alone.
    """

    phase: bool = True

    def ready(self, view: View) -> bool:
        """At once when there is no phase."""
        return not self.phase


@settings
class Iterated(Budgeted, ABC):
    """The inner optimiser of attacks that climb a function of the pixels.

    Args:
        optimiser: `pgd`, `fgsm` (one step as long as the radius) or `mim` (PGD with momentum).
        steps: Number of inner steps, C.
        step_size: Length of one inner step, in pixel units; unset: 2 * eps / steps.
        decay: Momentum factor of `mim`.
        random_start: Begin at a uniform draw from the ball.
    """

    optimiser: Optimiser = "pgd"
    steps: Steps = 10
    step_size: StepSize | None = None
    decay: Factor = 1.0
    random_start: bool = False

    def climb(
        self,
        x: Tensor,
        gradient_at: Callable[[Tensor], Tensor],
        mask: Tensor,
        rng: Generator,
        *,
        start: Tensor | None = None,
    ) -> Tensor:
        """Ascend with these settings (see `mithridate.ascent.climb`); a given `start` replaces a random one."""
        return climb(
            x,
            gradient_at,
            self.ball,
            optimiser=self.optimiser,
            steps=self.steps,
            step_size=self.step_size,
            decay=self.decay,
            start=start,
            random_start=self.random_start and start is None,
            mask=mask,
            rng=rng,
        )
