"""The accumulative poisoning attack: quiet steps that make the model sensitive, then one trigger batch."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from mithridate.attacks.alignment import blend, trigger_ascent, turn_towards
from mithridate.attacks.budget import Factor, Iterated, Share
from mithridate.calculus import (
    Normalise,
    Objective,
    Parameters,
    alignment_gradient,
    gradient,
    product_gradient,
    unit,
)
from mithridate.core import Batch, BatchNormMode, Need, View
from mithridate.registry import register, settings

TRIGGER = "trigger.x"
"""Where the attack keeps its poisoned trigger between steps."""


@register(
    "attack",
    "accumulative",
    presets={
        "paper": {"steps": 100, "accuracy_floor": 0.8},
        "released": {
            "eps": 0.2,
            "steps": 2,
            "normalise": "tensor",
            "trigger_mode": "fixed",
            "trigger_update": "after_step",
            "accuracy_floor": 0.82,
        },
    },
)
@settings
class Accumulative(Iterated):
    """Poison batch after batch so that one later trigger batch breaks the model, while accuracy stays in its range.

    At each step the gradient of the poisoned batch is turned towards w = g(S_t) + lam G_t: the first term keeps
    accuracy, the second makes the trigger's gradient oppose that of the validation batch.

    Args:
        eps: Radius of the ball, in pixel units of [0, 1] (8/255 is about 0.031).
        norm: Of the ball: `linf` or `l2`.
        poison_ratio: Share of each batch that is changed, the trigger included, in [0, 1]; the positions stay the same.
        optimiser: `pgd`, `fgsm` (one step as long as the radius) or `mim` (PGD with momentum).
        steps: Number of inner steps a batch, C.
        step_size: Length of one inner step, in pixel units; unset: 2 * eps / steps.
        decay: Momentum factor of `mim`.
        random_start: Begin each batch at a uniform draw from the ball.
        trigger_mode: `clean`: the trigger batch as it is; `fixed`: poisoned once, against the burn-in model;
            `reoptimised`: poisoned further at every step ("optimizing P").
        trigger_update: How `reoptimised` works: `joint` ascends H_t in the trigger's pixels inside the same inner loop,
            with third derivatives (Algorithm 1 as printed); `after_step` descends <g_val, g_tri> from the last trigger
            once the victim has taken its step (the released code).
        lam: Weight of G_t, >= 0.
        clean_weight: Weight of g(S_t), >= 0; 0 leaves only the second-order term.
        normalise: Gradients in products as they are (`none`), at unit length (`global`), or each
            tensor of them (`tensor`).
        validation_size: Images of S_val; unset: all that the attacker has.
        resample_validation: Draw S_val anew at every step, with replacement ("re-sampling S_val").
        weight_momentum: Momentum factor that the victim's SGD is given in the accumulative phase (the paper: 1.1);
            unset: left alone. It is power over the optimiser, not over data.
        accuracy_floor: End the phase once published accuracy is below this fraction; unset: no such floor.
        max_drop: End the phase once published accuracy has fallen by more than this fraction since the start; unset:
            no such limit. The paper's floor of 80 % under a start of 83.4 % is a max_drop of 0.034.
        craft_mode: BatchNorm while crafting: running statistics (`eval`) or those of the batch (`train`).
        chunk: Samples computed at a time (bounds memory; not used with `craft_mode = "train"`).

    Source:
        Pang et al., NeurIPS 2021, section 3.2, Eqs. (7)-(9), Algorithm 1; the options from section 4.1 and Tables
        1, 2 and 7.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL, Need.VALIDATION, Need.TRIGGER, Need.ACCURACY})

    trigger_mode: Literal["clean", "fixed", "reoptimised"] = "reoptimised"
    trigger_update: Literal["joint", "after_step"] = "joint"
    lam: Factor = 1.0
    clean_weight: Factor = 1.0
    normalise: Normalise = "none"
    validation_size: Annotated[int, Field(ge=1)] | None = None
    resample_validation: bool = False
    weight_momentum: Factor | None = None
    accuracy_floor: Share | None = None
    max_drop: Share | None = None
    craft_mode: BatchNormMode = "eval"
    chunk: Annotated[int, Field(ge=1)] = 50

    def ready(self, view: View) -> bool:
        """Once published accuracy has left the range that keeps the phase secret."""
        start, now = view.accuracy
        below = self.accuracy_floor is not None and now < self.accuracy_floor
        return below or (self.max_drop is not None and start - now > self.max_drop)

    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        """One round of Algorithm 1: the accumulative batch, and with `joint` the trigger beside it."""
        parameters = view.model.parameters
        with view.model.objective(self.craft_mode) as objective:
            validation = self._validation(view, rng)
            g_validation = gradient(objective, parameters, *validation, chunk=self._chunk)
            trigger = self._current_trigger(objective, parameters, g_validation, view, rng)
            kept = unit(gradient(objective, parameters, *batch, chunk=self._chunk), self.normalise)

            def pull(trigger: Batch) -> Parameters:
                """G_t."""
                g_trigger = gradient(objective, parameters, *trigger, chunk=self._chunk)
                return product_gradient(
                    objective,
                    parameters,
                    validation,
                    trigger,
                    normalise=self.normalise,
                    gradients=(g_validation, g_trigger),
                    chunk=self._chunk,
                )

            def towards(g: Parameters) -> Parameters:
                """The direction w = g(S_t) + lam G_t."""
                return blend(kept, unit(g, self.normalise), (self.clean_weight, self.lam))

            if self.trigger_mode != "reoptimised" or self.trigger_update == "after_step":
                w = towards(pull(trigger))
                return self.climb(
                    batch.x,
                    lambda x: turn_towards(
                        objective, parameters, x, batch.y, w, normalise=self.normalise, chunk=self._chunk
                    ),
                    mask,
                    rng,
                )

            n = len(batch.x)

            def both(x: Tensor) -> Tensor:
                """Gradient of H_t in the pixels of the accumulative batch and of the trigger, stacked."""
                now = Batch(x[n:], trigger.y)
                g = pull(now)
                of_batch = turn_towards(
                    objective,
                    parameters,
                    x[:n],
                    batch.y,
                    towards(g),
                    normalise=self.normalise,
                    chunk=self._chunk,
                )
                poisoned = unit(gradient(objective, parameters, x[:n], batch.y, chunk=self._chunk), self.normalise)
                of_trigger = trigger_ascent(
                    objective,
                    parameters,
                    validation,
                    now,
                    alignment_gradient(g, poisoned, self.normalise),
                    normalise=self.normalise,
                    g_validation=g_validation,
                    chunk=self._chunk,
                )
                return torch.cat([of_batch, self.lam * of_trigger])

            clean = view.clean_trigger
            centre = torch.cat([batch.x, clean.x])
            begin = torch.cat([batch.x, trigger.x])
            if self.random_start:
                drawn = (batch.x + self.ball.sample(batch.x, rng)).clamp(0, 1)
                begin[:n] = torch.where(mask.view(-1, *[1] * (batch.x.ndim - 1)), drawn, batch.x)
            moves = torch.cat([mask, self.positions(len(clean.x), view, rng).to(mask.device)])
            found = self.climb(centre, both, moves, rng, start=begin)
            view.memory[TRIGGER] = found[n:].clone()
            return found[:n]

    def fed(self, view: View, rng: Generator) -> None:
        """With `after_step`: poison the trigger further, for the model as it is now."""
        if self.trigger_mode == "reoptimised" and self.trigger_update == "after_step" and TRIGGER in view.memory:
            parameters = view.model.parameters
            with view.model.objective(self.craft_mode) as objective:
                g_validation = gradient(objective, parameters, *self._validation(view, rng), chunk=self._chunk)
                start = view.memory[TRIGGER]
                view.memory[TRIGGER] = self._poison_trigger(objective, parameters, g_validation, view, rng, start)

    def craft_trigger(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        """The trigger as the phase has left it; crafted now if there was no phase."""
        parameters = view.model.parameters
        with view.model.objective(self.craft_mode) as objective:
            g_validation = gradient(objective, parameters, *self._validation(view, rng), chunk=self._chunk)
            return self._current_trigger(objective, parameters, g_validation, view, rng).x

    @property
    def _chunk(self) -> int | None:
        return None if self.craft_mode == "train" else self.chunk

    def _validation(self, view: View, rng: Generator) -> Batch:
        """S_val of this round."""
        pool = view.validation
        size = min(self.validation_size or len(pool.x), len(pool.x))
        if not self.resample_validation:
            return Batch(pool.x[:size], pool.y[:size])
        drawn = torch.randint(len(pool.x), (size,), generator=rng).to(pool.x.device)
        return Batch(pool.x[drawn], pool.y[drawn])

    def _current_trigger(
        self, objective: Objective, parameters: Parameters, g_validation: Parameters, view: View, rng: Generator
    ) -> Batch:
        """The trigger as it stands. `joint` begins with the clean one, the others poison it when first asked for."""
        clean = view.clean_trigger
        begins_clean = self.trigger_mode == "reoptimised" and self.trigger_update == "joint"
        if self.trigger_mode == "clean" or (begins_clean and TRIGGER not in view.memory):
            return clean
        if TRIGGER not in view.memory:
            view.memory[TRIGGER] = self._poison_trigger(objective, parameters, g_validation, view, rng, None)
        return Batch(view.memory[TRIGGER], clean.y)

    def _poison_trigger(
        self,
        objective: Objective,
        parameters: Parameters,
        g_validation: Parameters,
        view: View,
        rng: Generator,
        start: Tensor | None,
    ) -> Tensor:
        """Descend <g_val, g_tri> in the trigger's pixels, Eq. (6), from `start` or from the clean trigger."""
        clean = view.clean_trigger
        wanted = unit(g_validation, self.normalise)
        return self.climb(
            clean.x,
            lambda x: (
                -turn_towards(objective, parameters, x, clean.y, wanted, normalise=self.normalise, chunk=self._chunk)
            ),
            self.positions(len(clean.x), view, rng).to(clean.x.device),
            rng,
            start=start,
        )
