"""What attacks that move inputs share: the budget, and the settings of the inner optimiser."""

from abc import ABC
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from mithridate.attacks.losses import Loss, check_loss, nudged
from mithridate.core.attack import ASCENT, Attack
from mithridate.core.batch import AnyBatch
from mithridate.core.compiling import turn_towards_compiled
from mithridate.core.domain import Domain
from mithridate.core.model import PureLoss, WhiteBox
from mithridate.core.modes import BatchNormMode, Precision
from mithridate.core.registry import settings
from mithridate.core.view import Need, View
from mithridate.maths.alignment import turn_towards
from mithridate.maths.ascent import Keep, Optimiser, StepSchedule, climb
from mithridate.maths.calculus import Slope
from mithridate.maths.directions import Normalise, Parameters
from mithridate.maths.norms import Ball, Norm, by_row

Eps = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Steps = Annotated[int, Field(ge=0)]
StepSize = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Factor = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@settings
class Budgeted(Attack, ABC):
    """The budget of an attack that moves inputs.

    Args:
        eps: Radius of the ball around each clean sample, >= 0, in the unit of the inputs (pixels in [0, 1]: 8/255 is
            about 0.031).
        norm: Of the ball: `linf` or `l2`.
        poison_ratio: Share of each batch that may be changed, in [0, 1]; the positions are the same in every batch, the
            trigger included.
    """

    eps: Eps = 16 / 255
    norm: Norm = "linf"
    poison_ratio: Share = 1.0

    @property
    def ball(self) -> Ball:
        """The perturbation budget of one sample."""
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
class Sighted(Budgeted, ABC):
    """An attack that differentiates through a model: which one, and which loss.

    Args:
        model_access: The model that crafting looks at: the `victim`'s own, or a `surrogate` of the attacker's; then the
            victim's may not be looked at.
        loss: What the poisoned samples are crafted for: `ce`, the victim's own loss; `kl`, the divergence from the
            model's answer to the clean sample; `cw`, the margin of the best other class over the label. The last two
            need class numbers for targets.
        craft_mode: BatchNorm while crafting: running statistics (`eval`) or those of the batch (`train`).
        precision: Of the passes that crafting makes: `float32`; `tf32` of a GPU (elsewhere the same as `float32`); or
            `bfloat16` by autocast, which is faster where the processor has it, and many times slower where it has not.
    """

    model_access: Literal["victim", "surrogate"] = "victim"
    loss: Loss = "ce"
    craft_mode: BatchNormMode = "eval"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if self.model_access == "surrogate":  # the class is frozen: this is set once, here, and follows from the field
            object.__setattr__(self, "needs", type(self).needs - {Need.MODEL} | {Need.SURROGATE})

    def check_inputs(self, batch: AnyBatch) -> None:
        """Refuse inputs that cannot be moved, and targets that `loss` has no meaning for, unless nothing is moved.

        Raises:
            ConfigError: Inputs are not one tensor of floats, or targets no class numbers where `loss` needs them.
        """
        super().check_inputs(batch)
        if self.ball.eps > 0 and self.ratio > 0:
            check_loss(self.loss, batch, who=type(self).__name__)

    def target(self, view: View) -> WhiteBox:
        """The model that the poison is crafted on."""
        return view.model if self.model_access == "victim" else view.surrogate


@settings
class Iterated(Sighted, ABC):
    """The inner optimiser of attacks that climb a function of the pixels.

    Args:
        optimiser: `pgd`, `fgsm` (one step as long as the radius), `mim` (PGD with momentum) or `apgd` (steps that
            halve where progress stops; it keeps the best iterate).
        steps: Number of inner steps a batch, C, >= 0; 0 returns the start.
        step_size: Length of one inner step, > 0, in the unit of the inputs, the first if they fall; unset: all together
            are as long as 2 * eps (with `apgd`, the first is).
        step_schedule: Of the steps of `pgd` and `mim`: `constant` as in the paper, or `cosine`, falling over half a
            wave, which reached in 35 steps what constant ones need 100 for (`benchmarks/ascent.py`).
        keep: Which iterate is sent: the `last`, or the `best`, by the function that is climbed.
        decay: Momentum factor of `mim`, >= 0.
        random_start: Begin at a uniform draw from the ball.
        compile: Trace the second-order slope of an inner step into one graph, once, and compile it (`torch.compile`; on
            a GPU it is recorded and played as a CUDA graph): the same slope, to rounding, after minutes of compiling.
            The slope in the pixels of a jointly poisoned trigger, a third derivative, is left as it is.
    """

    optimiser: Optimiser = "pgd"
    steps: Steps = 10
    step_size: StepSize | None = None
    step_schedule: StepSchedule = "constant"
    decay: Factor = 1.0
    keep: Keep = "last"
    random_start: bool = False
    compile: bool = False

    @property
    def keeps_best(self) -> bool:
        """Whether an ascent needs the value of what it climbs, and not its slope alone."""
        return self.keep == "best" or self.optimiser == "apgd"

    def turned(
        self,
        loss: PureLoss,
        parameters: Parameters,
        x: Tensor,
        y: Tensor,
        w: Parameters,
        *,
        normalise: Normalise,
        chunk: int | None,
    ) -> Slope:
        """How inputs turn their parameter gradient towards `w`, compiled if the settings ask for that.

        Args:
            loss: Of the model that is crafted on, from its `objective`.
            parameters: Of that model.
            x: Inputs (n, ...).
            y: Their targets.
            w: The wanted direction, by parameter.
            normalise: How the gradient is divided: not (`none`), by its length (`global`), or each tensor by its own.
            chunk: Samples computed at a time; None for all at once.

        Source:
            See `maths.alignment.turn_towards`.
        """
        turn = turn_towards_compiled if self.compile else turn_towards
        return turn(loss, parameters, x, y, w, normalise=normalise, chunk=chunk)

    def beginning(self, x: Tensor, mask: Tensor, domain: Domain, rng: Generator) -> Tensor:
        """Where the climb from clean samples begins: at them, beside them (`kl`), or at a draw from the ball.

        Args:
            x: Clean inputs (n, ...).
            mask: (n,) bool, the samples that may change.
            domain: What a valid input is.
            rng: The only source of randomness.
        """
        if self.random_start:
            drawn = domain.clamp(x + self.ball.sample(x, rng))
            return torch.where(by_row(mask, x), drawn, x)
        return nudged(x, self.ball, mask, domain, rng) if self.loss == "kl" else x

    def climb(
        self,
        x: Tensor,
        slope_at: Callable[[Tensor], Slope],
        mask: Tensor,
        view: View,
        rng: Generator,
        *,
        start: Tensor | None = None,
        value_at: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Ascend with these settings; the values at both ends are noted (`ASCENT`).

        Args:
            x: Clean inputs (n, ...), the centre of the ball.
            slope_at: Inputs to the slope of the function there.
            mask: (n,) bool, the samples that may change.
            view: What the attack sees; its notes are written to.
            rng: The only source of randomness.
            start: Where to begin; unset: at the `beginning`.
            value_at: Inputs to the function's value; unset: taken from its slope where it is needed.

        Returns:
            Inputs inside the ball and the domain.

        Source:
            See `maths.ascent.climb`.
        """
        found = climb(
            x,
            slope_at,
            self.ball,
            into_domain=view.domain.clamp,
            value_at=value_at,
            optimiser=self.optimiser,
            steps=self.steps,
            step_size=self.step_size,
            schedule=self.step_schedule,
            decay=self.decay,
            keep=self.keep,
            start=self.beginning(x, mask, view.domain, rng) if start is None else start,
            mask=mask,
        )
        if found.start is not None and found.end is not None:
            view.memory[ASCENT] = torch.tensor([found.start, found.end], dtype=torch.float64)
        return found.x
