"""The accumulative poisoning attack: quiet steps that make the model sensitive, then one trigger batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from mithridate.attacks.budget import Factor, Iterated, Share
from mithridate.attacks.hiding import discrepancy_gradient, discrepancy_slope, old_model, steer
from mithridate.attacks.losses import by_targets, nudged, targets
from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError
from mithridate.core.model import Weights, WhiteBox
from mithridate.core.registry import register, settings
from mithridate.core.view import Need, View
from mithridate.maths.alignment import blend, trigger_ascent, turn_towards
from mithridate.maths.calculus import (
    Normalise,
    Objective,
    Parameters,
    add,
    alignment_gradient,
    gradient,
    product_gradient,
    unit,
)

TRIGGER = "trigger.x"
"""Where the attack keeps its poisoned trigger between steps."""


@dataclass(frozen=True)
class _Round:
    """What one round of crafting looks at.

    Args:
        box: The model, under a criterion that reads from the targets which loss a sample is under.
        objective: Its loss, in the craft mode.
        parameters: Its parameters.
        validation: S_val of this round.
        g_validation: grad_theta L(S_val).
        trigger_y: Targets of the trigger.
        old: The old model that the poison hides from, if it hides.
    """

    box: WhiteBox
    objective: Objective
    parameters: Parameters
    validation: Batch
    g_validation: Parameters
    trigger_y: Tensor
    old: Weights | None


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
        model_access: The model that is looked at: the `victim`'s own, or a `surrogate` of the attacker's (S_val, the
            published accuracy and, with beta, the victim's old checkpoint are still seen).
        loss: Whose parameter gradient the poisoned samples, the trigger's too, are taken to offer: `ce`, the victim's
            own loss; `kl`, the divergence from the model's answer to the clean sample (a climb from clean samples then
            begins beside them, where its gradient is not zero); `cw`, the margin of the best other class over the
            label. The papers do not say where another loss enters; S_val and g(S_t) keep the victim's own, since they
            stand for what the victim really computes.
        beta: Weight of the attempt to hide from Memorization Discrepancy, >= 0; 0: none.
        hide_from: Burn-in epoch of the old model that the defence is expected to use; unset: the earliest kept.
        hide: `gradient`: w gains beta * grad_theta D, normalised like its other terms, so that the victim's step lowers
            the discrepancy D = KL(old || now) of the batch (Eq. (21) as printed). It is taken at the poisoned batch as
            it is at each inner step, and held constant while the pixels are differentiated, as w is elsewhere. It acts
            on the model after the step, whereas the defence looks before it. `pixels`: the pixels climb H_t and descend
            D, each gradient at unit length a sample: what the defence looks at. D is taken in eval mode, as there.
        hide_trigger: With `pixels`: the trigger hides too.
        craft_mode: BatchNorm while crafting: running statistics (`eval`) or those of the batch (`train`).
        chunk: Samples computed at a time (bounds memory; not used with `craft_mode = "train"`).

    Raises:
        ConfigError: `hide_trigger` without `hide = "pixels"`; or, while crafting, beta > 0 and no such old model.

    Source:
        Pang et al., NeurIPS 2021, section 3.2, Eqs. (7)-(9), Algorithm 1; the options from section 4.1 and Tables
        1, 2 and 7. Losses, surrogates and hiding: Zhu et al., ICML 2023, Tables 2, 11 and 3, C.12, Eq. (21).
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
    beta: Factor = 0.0
    hide_from: Annotated[int, Field(ge=0)] | None = None
    hide: Literal["gradient", "pixels"] = "gradient"
    hide_trigger: bool = False
    chunk: Annotated[int, Field(ge=1)] = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hide_trigger and self.hide != "pixels":
            raise ConfigError('[attack] accumulative: hide_trigger works on pixels; set hide = "pixels" with it.')
        if self.beta > 0:
            object.__setattr__(self, "needs", self.needs | {Need.HISTORY})

    def ready(self, view: View) -> bool:
        """Once published accuracy has left the range that keeps the phase secret."""
        start, now = view.accuracy
        below = self.accuracy_floor is not None and now < self.accuracy_floor
        return below or (self.max_drop is not None and start - now > self.max_drop)

    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        """One round of Algorithm 1: the accumulative batch, and with `joint` the trigger beside it."""
        with self._round(view, rng) as at:
            first = TRIGGER not in view.memory
            trigger_x = self._current_trigger(at, view, rng)
            own = gradient(at.objective, at.parameters, *batch, chunk=self._chunk)
            kept = unit(own, self.normalise)
            y = targets(self.loss, at.box, batch, self.craft_mode)

            def towards(x: Tensor, g: Parameters) -> Parameters:
                """The direction w = g(S_t) + lam G_t, with Eq. (21)'s third term if the poison hides by it."""
                w = blend(kept, unit(g, self.normalise), (self.clean_weight, self.lam))
                if at.old is None or self.hide != "gradient":
                    return w
                seen = discrepancy_gradient(at.box, at.old, x, chunk=self._chunk)
                return add(w, unit(seen, self.normalise), scale=self.beta)

            def of_batch(x: Tensor, g: Parameters) -> Tensor:
                """Gradient of H_t in the pixels of the accumulative batch."""
                return self._hidden(at, x, self._turned(at, x, y, towards(x, g)))

            if self.trigger_mode != "reoptimised" or self.trigger_update == "after_step":
                g = self._pull(at, trigger_x)
                return self.climb(batch.x, lambda x: of_batch(x, g), mask, view.domain, rng)

            n = len(batch.x)

            def both(x: Tensor) -> Tensor:
                """Gradient of H_t in the pixels of the accumulative batch and of the trigger, stacked."""
                g = self._pull(at, x[n:])
                poisoned = unit(gradient(at.objective, at.parameters, x[:n], y, chunk=self._chunk), self.normalise)
                of_trigger = trigger_ascent(
                    at.objective,
                    at.parameters,
                    at.validation,
                    (x[n:], at.trigger_y),
                    alignment_gradient(g, poisoned, self.normalise),
                    normalise=self.normalise,
                    g_validation=at.g_validation,
                    chunk=self._chunk,
                )
                return torch.cat([of_batch(x[:n], g), self._hidden(at, x[n:], self.lam * of_trigger, trigger=True)])

            clean = view.clean_trigger
            begin = self.beginning(batch.x, mask, view.domain, rng)
            trigger_mask = self.positions(len(clean.x), view, rng).to(mask.device)
            if first and self.loss == "kl":
                trigger_x = nudged(trigger_x, self.ball, trigger_mask, view.domain, rng)
            found = self.climb(
                torch.cat([batch.x, clean.x]),
                both,
                torch.cat([mask, trigger_mask]),
                view.domain,
                rng,
                start=torch.cat([begin, trigger_x]),
            )
            view.memory[TRIGGER] = found[n:].clone()
            return found[:n]

    def after_step(self, view: View, rng: Generator) -> None:
        """With `after_step`: poison the trigger further, for the model as it is now."""
        if self.trigger_mode == "reoptimised" and self.trigger_update == "after_step" and TRIGGER in view.memory:
            with self._round(view, rng) as at:
                view.memory[TRIGGER] = self._poison_trigger(at, view, rng, view.memory[TRIGGER])

    def craft_trigger(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        """The trigger as the phase has left it; crafted now if there was no phase."""
        with self._round(view, rng) as at:
            return self._current_trigger(at, view, rng)

    @property
    def _chunk(self) -> int | None:
        return None if self.craft_mode == "train" else self.chunk

    @contextmanager
    def _round(self, view: View, rng: Generator) -> Iterator[_Round]:
        """What this round looks at, with the model in the craft mode."""
        box = by_targets(self.target(view))
        parameters = box.parameters
        trigger_y = targets(self.loss, box, view.clean_trigger, self.craft_mode)
        old = old_model(view, self.hide_from) if self.beta > 0 else None
        with box.objective(self.craft_mode) as objective:
            validation = self._validation(view, rng)
            g_validation = gradient(objective, parameters, *validation, chunk=self._chunk)
            yield _Round(box, objective, parameters, validation, g_validation, trigger_y, old)

    def _validation(self, view: View, rng: Generator) -> Batch:
        """S_val of this round."""
        pool = view.validation
        size = min(self.validation_size or len(pool.x), len(pool.x))
        if not self.resample_validation:
            return Batch(pool.x[:size], pool.y[:size])
        drawn = torch.randint(len(pool.x), (size,), generator=rng).to(pool.x.device)
        return Batch(pool.x[drawn], pool.y[drawn])

    def _pull(self, at: _Round, trigger_x: Tensor) -> Parameters:
        """G_t."""
        trigger = (trigger_x, at.trigger_y)
        g_trigger = gradient(at.objective, at.parameters, *trigger, chunk=self._chunk)
        return product_gradient(
            at.objective,
            at.parameters,
            at.validation,
            trigger,
            normalise=self.normalise,
            gradients=(at.g_validation, g_trigger),
            chunk=self._chunk,
        )

    def _turned(self, at: _Round, x: Tensor, y: Tensor, w: Parameters) -> Tensor:
        """How pixels turn their parameter gradient towards `w`."""
        return turn_towards(at.objective, at.parameters, x, y, w, normalise=self.normalise, chunk=self._chunk)

    def _hidden(self, at: _Round, x: Tensor, slope: Tensor, *, trigger: bool = False) -> Tensor:
        """The slope that is followed: away from the discrepancy, where the pixels hide from it."""
        if at.old is None or self.hide != "pixels" or (trigger and not self.hide_trigger):
            return slope
        return steer(slope, discrepancy_slope(at.box, at.old, x, chunk=self._chunk), self.beta)

    def _current_trigger(self, at: _Round, view: View, rng: Generator) -> Tensor:
        """The trigger as it stands. `joint` begins with the clean one, the others poison it when first asked for."""
        begins_clean = self.trigger_mode == "reoptimised" and self.trigger_update == "joint"
        if self.trigger_mode == "clean" or (begins_clean and TRIGGER not in view.memory):
            return view.clean_trigger.x
        if TRIGGER not in view.memory:
            view.memory[TRIGGER] = self._poison_trigger(at, view, rng, None)
        return view.memory[TRIGGER]

    def _poison_trigger(self, at: _Round, view: View, rng: Generator, start: Tensor | None) -> Tensor:
        """Descend <g_val, g_tri> in the trigger's pixels, Eq. (6), from `start` or from the clean trigger."""
        clean = view.clean_trigger.x
        wanted = unit(at.g_validation, self.normalise)

        def down(x: Tensor) -> Tensor:
            return self._hidden(at, x, -self._turned(at, x, at.trigger_y, wanted), trigger=True)

        mask = self.positions(len(clean), view, rng).to(clean.device)
        return self.climb(clean, down, mask, view.domain, rng, start=start)
