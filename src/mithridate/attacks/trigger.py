"""The trigger of the accumulative attack: which one it is, and how it is poisoned."""

import math
from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from mithridate.attacks.budget import Iterated
from mithridate.attacks.hiding import Hiding
from mithridate.attacks.losses import by_targets, targets
from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.errors import ConfigError
from mithridate.core.model import PureLoss, WhiteBox
from mithridate.core.past import Epoch, Weights
from mithridate.core.registry import settings
from mithridate.core.view import Need, View
from mithridate.maths.alignment import alignment
from mithridate.maths.calculus import Curved, Slope, curved, gradient, hessian_vector_product
from mithridate.maths.directions import Normalise, Parameters, opposite, unit
from mithridate.maths.norms import Ball

TRIGGER = "trigger.x"
"""Where the attack keeps its poisoned trigger between steps."""


@dataclass
class CraftingRound:
    """What one round of crafting looks at.

    Args:
        box: The model, under a criterion that reads from the targets which loss a sample is under.
        objective: Its loss, in the craft mode.
        parameters: Its parameters.
        samples: S_val of this round, and the part of it that stands for its curvature.
        pieces: Samples computed at a time; None: all.
        trigger_y: Targets of the trigger.
        old: The old model that the poison hides from, if it hides.
    """

    box: WhiteBox
    objective: PureLoss
    parameters: Parameters
    samples: tuple[Batch, Batch]
    pieces: int | None
    trigger_y: Tensor
    old: Weights | None

    @cached_property
    def validation(self) -> Curved:
        """The loss on S_val; many a round does not ask for it."""
        whole, part = self.samples
        if part is whole:
            return curved(self.objective, self.parameters, *whole, chunk=self.pieces)
        return Curved(
            gradient(self.objective, self.parameters, *whole, chunk=self.pieces),
            lambda v: hessian_vector_product(self.objective, self.parameters, *part, v, chunk=self.pieces),
        )


@settings
class TriggerPoisoner(Hiding, Iterated, ABC):
    """An attack that prepares one trigger, and knows S_val.

    Args:
        trigger_mode: `clean`: the trigger batch as it is; `fixed`: poisoned once, against the burn-in model;
            `reoptimised`: poisoned further at every step ("optimizing P").
        trigger_update: How `reoptimised` works: `joint` ascends H_t in the trigger's pixels inside the same inner loop,
            with third derivatives (Algorithm 1 as printed); `after_step` descends <g_val, g_tri> from the last trigger
            once the victim has taken its step, in the ball around the clean trigger, so that the one that is fed was
            made for the very model that is fed it. `released` is their code's timing: before each batch but the first,
            in a ball around the last trigger, so that the trigger drifts up to eps further from the clean one in every
            step (a report says so), and the one that is fed was made for the model before the last step.
        normalise: Gradients in products as they are (`none`), at unit length (`global`), or each tensor of them
            (`tensor`).
        validation_size: Images of S_val, >= 1; unset: all that the attacker has.
        resample_validation: Draw S_val anew at every step, with replacement ("re-sampling S_val").
        validation_batch: Images of S_val, >= 1, that stand for its curvature in G_t, drawn anew at every step; its
            gradient is still that of all of it. Unset: all, which is exact.
        chunk: Samples computed at a time, >= 1 (bounds memory; not used with `craft_mode = "train"`). What is computed
            at once shares the graph of its gradient: S_val is cheapest if it is no larger than this. With 100 instead
            of 500, crafting takes a quarter of the memory and a sixth longer.

    Source:
        Pang et al., NeurIPS 2021, section 3.2 and section 4.1.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL, Need.VALIDATION, Need.TRIGGER, Need.ACCURACY})

    trigger_mode: Literal["clean", "fixed", "reoptimised"] = "reoptimised"
    trigger_update: Literal["joint", "after_step", "released"] = "joint"
    normalise: Normalise = "none"
    validation_size: Annotated[int, Field(ge=1)] | None = None
    resample_validation: bool = False
    validation_batch: Annotated[int, Field(ge=1)] | None = None
    chunk: Annotated[int, Field(ge=1)] = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_hiding()
        if self.keeps_best and self.pixels_hide():
            raise ConfigError(
                'hide = "pixels" follows two slopes at once, together that of no function, whose values apgd and '
                'keep = "best" would compare; take hide = "gradient", or optimiser = "pgd" and keep = "last".'
            )
        if self.beta > 0:
            object.__setattr__(self, "needs", self.needs | {Need.HISTORY})

    def check_inputs(self, batch: AnyBatch) -> None:
        """Refuse what it cannot move, and targets that its loss, or hiding, has no meaning for.

        Raises:
            ConfigError: Inputs are not one tensor of floats, or targets no class numbers where these are needed.
        """
        super().check_inputs(batch)
        self.check_hidden(batch)

    @property
    def old_epochs(self) -> frozenset[Epoch | None]:
        """The burn-in epoch of the model that it hides from, if it hides."""
        return frozenset({self.hide_from}) if self.beta > 0 else frozenset()

    @property
    def drifts(self) -> bool:
        """Whether the trigger's ball moves with it."""
        return self.trigger_mode == "reoptimised" and self.trigger_update == "released"

    @property
    def trigger_ball(self) -> Ball:
        """Without a bound where the trigger drifts: only the domain holds it then."""
        return Ball(self.norm, math.inf) if self.drifts else self.ball

    @property
    def joint(self) -> bool:
        """Whether the trigger is poisoned in the same inner loop as each batch."""
        return self.trigger_mode == "reoptimised" and self.trigger_update == "joint"

    def after_step(self, view: View, rng: Generator) -> None:
        """With `after_step`: poison the trigger further, for the model as it is now."""
        if self.trigger_mode == "reoptimised" and self.trigger_update == "after_step" and TRIGGER in view.memory:
            with self.round(view, rng) as at:
                view.memory[TRIGGER] = self._poisoned_trigger(at, view, rng, view.memory[TRIGGER])

    def craft_trigger(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        """The trigger as the phase has left it; crafted now if there was no phase."""
        with self.round(view, rng) as at:
            return self.current_trigger(at, view, rng)

    @property
    def pieces(self) -> int | None:
        """Samples computed at a time; None where they see each other."""
        return None if self.craft_mode == "train" else self.chunk

    @contextmanager
    def round(self, view: View, rng: Generator) -> Iterator[CraftingRound]:
        """What this round looks at, with the model in the craft mode."""
        box = by_targets(self.target(view), self.loss)
        parameters = box.parameters
        trigger_y = targets(self.loss, box, view.clean_trigger, self.craft_mode)
        old = self.hidden_from(view)
        with box.objective(self.craft_mode, self.precision) as objective:
            samples = self._validation(view, rng)
            yield CraftingRound(box, objective, parameters, samples, self.pieces, trigger_y, old)

    def _validation(self, view: View, rng: Generator) -> tuple[Batch, Batch]:
        """S_val of this round, and the part of it that stands for its curvature."""
        pool = view.validation
        size = min(self.validation_size or pool.size, pool.size)
        if self.resample_validation:
            whole = pool.take(torch.randint(pool.size, (size,), generator=rng))
        else:
            whole = pool.take(slice(size))
        if self.validation_batch is None or self.validation_batch >= size:
            return whole, whole
        return whole, whole.take(torch.randperm(size, generator=rng)[: self.validation_batch])

    def turned_at(self, at: CraftingRound, x: Tensor, y: Tensor, w: Parameters) -> Slope:
        """How pixels turn their parameter gradient towards `w`."""
        return self.turned(at.objective, at.parameters, x, y, w, normalise=self.normalise, chunk=self.pieces)

    def aligned(self, at: CraftingRound, x: Tensor, y: Tensor, w: Parameters) -> Tensor:
        """How far the parameter gradient of pixels is turned towards `w`, a scalar."""
        return alignment(at.objective, at.parameters, x, y, w, normalise=self.normalise, chunk=self.pieces)

    def current_trigger(self, at: CraftingRound, view: View, rng: Generator) -> Tensor:
        """The trigger as it stands. `joint` begins with the clean one, the others poison it when first asked for."""
        if self.trigger_mode == "clean" or (self.joint and TRIGGER not in view.memory):
            return view.clean_trigger.x
        if TRIGGER not in view.memory:
            view.memory[TRIGGER] = self._poisoned_trigger(at, view, rng, None)
        return view.memory[TRIGGER]

    def next_trigger(self, at: CraftingRound, view: View, rng: Generator) -> Tensor:
        """The trigger that a batch is crafted for; where it drifts, it moves on now, but not before the first batch."""
        if self.drifts and TRIGGER in view.memory:
            last = view.memory[TRIGGER]
            view.memory[TRIGGER] = self._poisoned_trigger(at, view, rng, last, centre=last)
        return self.current_trigger(at, view, rng)

    def _poisoned_trigger(
        self, at: CraftingRound, view: View, rng: Generator, start: Tensor | None, centre: Tensor | None = None
    ) -> Tensor:
        """Descend <g_val, g_tri> in the trigger's pixels, Eq. (6).

        Args:
            at: What this round looks at.
            view: What the attack sees.
            rng: The only source of randomness.
            start: Where to begin; unset: at the centre.
            centre: Of the ball; unset: the clean trigger.
        """
        clean = view.clean_trigger.x if centre is None else centre
        w = opposite(unit(at.validation.gradient, self.normalise))

        def slope_at(x: Tensor) -> Slope:
            slope = self.turned_at(at, x, at.trigger_y, w)
            return self.hidden_slope(slope, at.box, at.old, x, chunk=self.pieces, trigger=True)

        def value_at(x: Tensor) -> Tensor:
            return self.aligned(at, x, at.trigger_y, w)

        mask = self.positions(len(clean), view, rng).to(clean.device)
        hides = self.pixels_hide(trigger=True)
        return self.climb(clean, slope_at, mask, view, rng, start=start, value_at=None if hides else value_at)
