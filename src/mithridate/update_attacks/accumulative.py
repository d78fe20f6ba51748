"""The accumulative poisoning attack on federated rounds."""

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor
from torch.nn.functional import cosine_similarity

from mithridate.core.model import BatchNormMode
from mithridate.core.registry import register, settings
from mithridate.core.update_attack import Honest
from mithridate.core.updates import Updates
from mithridate.core.view import Need, View
from mithridate.maths.calculus import (
    Normalise,
    Parameters,
    alignment_gradient,
    gradient,
    hessian_vector_product,
    product_gradient,
    unit,
)
from mithridate.maths.norms import Norm
from mithridate.update_attacks.hostile import Factor, HostileShare, Length, Share, scaled, shared_out, within, zero_sum

TRIGGER, VELOCITY = "trigger", "velocity"
"""Where the attack keeps its poisoned trigger and its velocity between rounds, (parameters,) each."""


@register(
    "update_attack",
    "accumulative",
    presets={
        "paper": {"trigger": "reversed", "normalise": "none", "clean_weight": 1.0},
        "released": {"trigger": "clean", "normalise": "global", "clean_weight": 0.0, "lam": 0.02},
    },
)
@settings
class AccumulativeUpdates(HostileShare):
    """Round after round move the model to where the trigger's update is harmful, at unchanged accuracy; then send it.

    Each round's mean update becomes clean_weight * (honest mean) + lam * G_t, where G_t is the gradient, in the
    model's parameters, of the product of the validation gradient and the trigger's update: stepping against it turns
    the two against each other. What the honest clients send is taken away again (recovered offset). A single hostile
    client is enough where single updates are not bounded (Appendix C.1, C.2).

    Args:
        trigger: What is sent in the trigger round. `clean`: the honest update on the trigger batch, which the phase
            makes harmful; `reversed`: minus that update, taken at the model of the trigger round; `reoptimised`: minus
            the update at the start, from which alpha times the current one is taken in every round (Algorithm 2).
        alpha: Step of `reoptimised`, >= 0.
        trigger_scale: The trigger's update is multiplied by this, >= 0 ("loss scaling" of a poisoned trigger).
        trigger_norm: l2 length that the trigger's update is given, > 0, so that triggers can be compared at equal
            length; unset: its own times trigger_scale.
        lam: Weight of G_t, >= 0 ("loss scaling" in the accumulative rows of Tables 3 to 5).
        momentum: Of G_t, >= 0: the share of the last round's pull that stays in this one's, for servers whose
            optimiser has no momentum of its own (FedAvg); the released code's server has 0.9.
        clean_weight: Weight of the honest mean, >= 0; the released code leaves it out.
        normalise: How the two enter their product: as they are (`none`), at unit length (`global`: their cosine, as in
            the released code), or one cosine a tensor (`tensor`).
        spread: Length of the zero-sum random vectors that make hostile clients differ, relative to their updates; >= 0.
        radius: The attacker keeps every row within this length, > 0; `inf` does not.
        norm: In which norm: `l2`, or `linf` (every entry).
        validation_size: Images of S_val; unset: all that the attacker has.
        resample_validation: Draw S_val anew in every round, with replacement.
        max_rounds: End the phase after so many rounds, >= 0; unset: only when the run does.
        accuracy_floor: End the phase once published accuracy is below this fraction; unset: no such floor.
        max_drop: End the phase once published accuracy has fallen by more than this fraction since the start; unset:
            no such limit.
        craft_mode: BatchNorm in the attacker's gradients: running statistics (`eval`), or those of the batch (`train`,
            as in the released code).
        chunk: Samples computed at a time; bounds memory (not used with `craft_mode = "train"`).

    Source:
        Pang et al., NeurIPS 2021, section 3.3, Eqs. (10)-(14), Algorithm 2, Appendix C; `released`: their code, which
        steps on lam times the cosine alone.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL, Need.VALIDATION, Need.TRIGGER, Need.ACCURACY})

    poison_ratio: Share = 1.0
    trigger: Literal["clean", "reversed", "reoptimised"] = "clean"
    alpha: Factor = 0.1
    trigger_scale: Factor = 1.0
    trigger_norm: Length | None = None
    lam: Factor = 0.02
    momentum: Factor = 0.0
    clean_weight: Factor = 0.0
    normalise: Normalise = "global"
    spread: Factor = 0.0
    radius: Annotated[float, Field(gt=0)] = math.inf
    norm: Norm = "l2"
    validation_size: Annotated[int, Field(ge=1)] | None = None
    resample_validation: bool = False
    max_rounds: Annotated[int, Field(ge=0)] | None = None
    accuracy_floor: Share | None = None
    max_drop: Share | None = None
    craft_mode: BatchNormMode = "train"
    chunk: Annotated[int, Field(ge=1)] = 100

    def ready(self, view: View) -> bool:
        """After the rounds that it was given, or once published accuracy has left the range that keeps it secret."""
        if self.max_rounds is not None and view.step >= self.max_rounds:
            return True
        if self.accuracy_floor is None and self.max_drop is None:
            return False
        start, now = view.accuracy
        below = self.accuracy_floor is not None and now < self.accuracy_floor
        return below or (self.max_drop is not None and start - now > self.max_drop)

    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        """One round of Algorithm 2."""
        pull = self.lam * self.pull(view, rng)
        if self.momentum > 0:
            pull = pull + self.momentum * view.memory.get(VELOCITY, torch.zeros_like(pull))
            view.memory[VELOCITY] = pull
        wanted = self.clean_weight * honest.mean + pull
        rows = shared_out(wanted, honest)
        if self.spread > 0:
            rows = rows + zero_sum(rows, self.spread, rng)
        return within(rows, self.radius, self.norm)

    def craft_trigger(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        """Rows that make the round's mean the trigger's update."""
        update = scaled(self._update(view), self.trigger_scale, self.trigger_norm)
        return within(shared_out(update, honest), self.radius, self.norm)

    def pull(self, view: View, rng: Generator) -> Tensor:
        """G_t (parameters,): the gradient of product(g_val, trigger's update) in the model's parameters."""
        parameters = view.model.parameters
        validation = self._validation(view, rng)
        with view.model.objective(self.craft_mode) as objective:
            if self.trigger != "reoptimised":
                sign = 1 if self.trigger == "clean" else -1
                g = product_gradient(
                    objective, parameters, validation, view.clean_trigger, normalise=self.normalise, chunk=self._chunk
                )
                return sign * _flat(g)
            held = Updates(self._poisoned(view).unsqueeze(0), {name: p.shape for name, p in parameters.items()})
            g_validation = gradient(objective, parameters, *validation, chunk=self._chunk)
            along = alignment_gradient(g_validation, unit(held.named(), self.normalise), self.normalise)
            return _flat(hessian_vector_product(objective, parameters, *validation, along, chunk=self._chunk))

    def after_step(self, view: View, rng: Generator) -> None:
        """With `reoptimised`: take alpha times the trigger's current update away from the poisoned one."""
        if self.trigger == "reoptimised":
            moved = self._poisoned(view) - self.alpha * _flat(self._trigger_gradient(view))
            view.memory[TRIGGER] = within(moved.unsqueeze(0), self.radius, self.norm)[0]

    def alignment(self, view: View) -> float:
        """Cosine of the validation gradient and the trigger's update: below zero, the trigger does harm."""
        with view.model.objective(self.craft_mode) as objective:
            g = _flat(gradient(objective, view.model.parameters, *view.validation, chunk=self._chunk))
        return float(cosine_similarity(g, self._update(view), dim=0))

    @property
    def _chunk(self) -> int | None:
        return None if self.craft_mode == "train" else self.chunk

    def _update(self, view: View) -> Tensor:
        """The trigger's update as it would be sent now, before scaling."""
        if self.trigger == "reoptimised":
            return self._poisoned(view)
        return _flat(self._trigger_gradient(view)) * (1 if self.trigger == "clean" else -1)

    def _poisoned(self, view: View) -> Tensor:
        """The poisoned trigger; at first the reversed clean one."""
        if TRIGGER not in view.memory:
            reverse = -_flat(self._trigger_gradient(view))
            view.memory[TRIGGER] = within(reverse.unsqueeze(0), self.radius, self.norm)[0]
        return view.memory[TRIGGER]

    def _trigger_gradient(self, view: View) -> Parameters:
        with view.model.objective(self.craft_mode) as objective:
            return gradient(objective, view.model.parameters, *view.clean_trigger, chunk=self._chunk)

    def _validation(self, view: View, rng: Generator) -> tuple[Tensor, Tensor]:
        """S_val of this round."""
        x, y = view.validation
        size = min(self.validation_size or len(x), len(x))
        if not self.resample_validation:
            return x[:size], y[:size]
        drawn = torch.randint(len(x), (size,), generator=rng).to(x.device)
        return x[drawn], y[drawn]


def _flat(tensors: Parameters) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors.values()])
