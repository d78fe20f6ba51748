"""The accumulative poisoning attack on federated rounds."""

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor
from torch.nn.functional import cosine_similarity

from mithridate.core.modes import BatchNormMode
from mithridate.core.registry import register, settings
from mithridate.core.secrecy import Secrecy
from mithridate.core.update_attack import Honest
from mithridate.core.updates import Updates
from mithridate.core.view import Need, View
from mithridate.maths.calculus import curved, gradient, product_gradient
from mithridate.maths.directions import Normalise, Parameters, alignment_gradient, unit
from mithridate.maths.norms import Norm, clip_rows
from mithridate.update_attacks.hostile import Factor, HostileShare, Length, Share, scaled, shared_out, zero_sum

TRIGGER, VELOCITY = "trigger", "velocity"
"""Where the attack keeps its poisoned trigger (1 or clients, parameters) and its velocity (parameters,)."""


@register(
    "update_attack",
    "accumulative",
    presets={
        "paper": {
            "trigger": "reoptimised",
            "trigger_rows": "each",
            "normalise": "none",
            "clean_weight": 1.0,
            "sums": True,
            "spread": 1.0,
            "how": "project",
            "craft_mode": "eval",
        },
        "released": {
            "trigger": "reoptimised",
            "alpha": 0.01,
            "normalise": "global",
            "clean_weight": 0.0,
            "lam": 0.08,
            "norm": "l2",
            "trigger_bound": "linf",
            "how": "scale",
            "craft_mode": "train",
        },
    },
)
@settings
class AccumulativeUpdates(Secrecy, HostileShare):
    """Round after round move the model to where the trigger's update is harmful, at unchanged accuracy; then send it.

    Each round's mean update becomes clean_weight * (honest mean) + lam * G_t, where G_t is the gradient, in the
    model's parameters, of the product of the validation gradient and the trigger's update: stepping against it turns
    the two against each other. What the honest clients send is taken away again (recovered offset). A single hostile
    client is enough where single updates are not bounded (Appendix C.1, C.2).

    The preset `paper` is Algorithm 2 as printed, on a server that takes the mean: its beta is lr / N for N clients.
    As printed, every client sends the whole sum H_t, so that a round of the phase is N times as long as an honest one
    and only eta holds it; eta has no value in the text, so set `radius`, or `sums = false` for rounds of honest length.
    `released` is the main script of their code: the honest term is left out, products are cosines of whole gradients,
    and bounds shorten the whole update, in l2 in the phase and by the largest entry at the trigger; set `radius` to
    their clip value. Tables 3 to 5 have `trigger = "clean"`.

    Args:
        trigger: What is sent in the trigger round. `clean`: the honest update on the trigger batch, which the phase
            makes harmful; `reversed`: minus that update, taken at the model of the trigger round; `reoptimised`: minus
            the update at the start, from which alpha times the current one is taken at the beginning of every round:
            in the first one the model of the start is used twice, and the last model never (Algorithm 2).
        trigger_rows: With `reoptimised`: what is kept and bounded, the `mean` update alone or that of `each` client (a
            row as long as the model for each, as printed).
        alpha: Step of `reoptimised`, >= 0.
        trigger_scale: The trigger's update is multiplied by this, >= 0 ("loss scaling" of a poisoned trigger).
        trigger_norm: l2 length that the trigger's update is given, > 0, so that triggers can be compared at equal
            length; unset: its own times trigger_scale.
        lam: Weight of G_t, >= 0 ("loss scaling" in the accumulative rows of Tables 3 to 5).
        momentum: Of G_t, >= 0: the share of the last round's pull that stays in this one's, for servers whose
            optimiser has no momentum of its own (FedAvg); the released code's server has 0.9.
        clean_weight: Weight of the honest mean, >= 0; the released code leaves it out.
        sums: H_t is a sum over the round's clients and G_t of the sum of the trigger's updates, as printed, and not of
            their means.
        normalise: How the two enter their product: as they are (`none`), at unit length (`global`: their cosine, as in
            the released code), or one cosine a tensor (`tensor`).
        spread: Length of the zero-sum random vectors that make hostile clients differ, relative to their updates; >= 0.
        radius: The attacker keeps every row within this length, > 0; `inf` does not. Eta in the text.
        norm: In which norm: `l2`, or `linf` (every entry).
        trigger_radius: Of the trigger's rows, > 0; unset: `radius`.
        trigger_bound: In which norm those are bounded; unset: `norm`.
        how: `project`: to the nearest row within the radius, which for `linf` clamps every entry; `scale`: the whole
            row is shortened. The two agree in l2.
        validation_size: Images of S_val, >= 1; unset: all that the attacker has.
        resample_validation: Draw S_val anew in every round, with replacement.
        rest: Hostile clients send their honest updates in rounds that begin with the published accuracy more than this
            fraction under that of the start, in [0, 1], so that the phase stays quiet; unset: they never do.
        max_rounds: End the phase after so many rounds, >= 0; unset: only when the run does.
        craft_mode: BatchNorm in the attacker's gradients: running statistics (`eval`), or those of the batch (`train`,
            as in the released code).
        chunk: Samples computed at a time, >= 1; bounds memory (not used with `craft_mode = "train"`).

    Source:
        Pang et al., NeurIPS 2021, section 3.3, Eqs. (10)-(14), Algorithm 2, Appendix C; `released`: their code, which
        steps on lam times the cosine alone.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL, Need.VALIDATION, Need.TRIGGER, Need.ACCURACY})

    poison_ratio: Share = 1.0
    trigger: Literal["clean", "reversed", "reoptimised"] = "clean"
    trigger_rows: Literal["mean", "each"] = "mean"
    alpha: Factor = 0.1
    trigger_scale: Factor = 1.0
    trigger_norm: Length | None = None
    lam: Factor = 0.02
    momentum: Factor = 0.0
    clean_weight: Factor = 0.0
    sums: bool = False
    normalise: Normalise = "global"
    spread: Factor = 0.0
    radius: Annotated[float, Field(gt=0)] = math.inf
    norm: Norm = "l2"
    trigger_radius: Annotated[float, Field(gt=0)] | None = None
    trigger_bound: Norm | None = None
    how: Literal["project", "scale"] = "project"
    validation_size: Annotated[int, Field(ge=1)] | None = None
    resample_validation: bool = False
    rest: Annotated[float, Field(ge=0, le=1)] | None = None
    max_rounds: Annotated[int, Field(ge=0)] | None = None
    craft_mode: BatchNormMode = "train"
    chunk: Annotated[int, Field(ge=1)] = 100

    def ready(self, view: View) -> bool:
        """After the rounds that it was given, or once published accuracy has left the range that keeps it secret."""
        return (self.max_rounds is not None and view.step >= self.max_rounds) or self.noticed(view)

    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        """One round of Algorithm 2, or of rest."""
        if self.rest is not None:
            start, now = view.accuracy
            if start - now > self.rest:
                return honest.own
        if self.trigger == "reoptimised":
            view.memory[TRIGGER] = self._reoptimised(honest, view)
        pull = self.lam * self.pull(view, rng)
        if self.momentum > 0:
            pull = pull + self.momentum * view.memory.get(VELOCITY, torch.zeros_like(pull))
            view.memory[VELOCITY] = pull
        wanted = (honest.clients if self.sums else 1) * (self.clean_weight * honest.mean + pull)
        rows = shared_out(wanted, honest)
        if self.spread > 0:
            rows = rows + zero_sum(rows, self.spread, rng)
        return clip_rows(rows, self.radius, self.norm, how=self.how)

    def craft_trigger(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        """Rows that make the round's mean the trigger's update."""
        updates = self._trigger(view, honest)
        mean = updates.mean(0)
        wanted = scaled(mean, self.trigger_scale, self.trigger_norm)
        if honest.n_honest == 0 and len(updates) == honest.hostile:  # every client sends its own
            longer = self.trigger_scale if self.trigger_norm is None else float(wanted.norm() / mean.norm())
            return self._bounded_trigger(longer * updates)
        return self._bounded_trigger(shared_out(wanted, honest))

    def pull(self, view: View, rng: Generator) -> Tensor:
        """G_t (parameters,): the gradient of product(g_val, trigger's update) in the model's parameters."""
        parameters = view.model.parameters
        validation = self._validation(view, rng)
        with view.model.objective(self.craft_mode) as objective:
            if self.trigger != "reoptimised":
                sign = 1 if self.trigger == "clean" else -1
                both = (curved(objective, parameters, *b, chunk=self._chunk) for b in (validation, view.clean_trigger))
                return sign * _flat(product_gradient(*both, normalise=self.normalise))
            update = self._trigger(view).mean(0, keepdim=True)
            held = Updates(update, {name: p.shape for name, p in parameters.items()})
            at = curved(objective, parameters, *validation, chunk=self._chunk)
            along = alignment_gradient(at.gradient, unit(held.named(), self.normalise), self.normalise)
            return _flat(at.curvature(along))

    def alignment(self, view: View) -> float:
        """Cosine of the validation gradient and the trigger's update: below zero, the trigger does harm."""
        with view.model.objective(self.craft_mode) as objective:
            g = _flat(gradient(objective, view.model.parameters, *view.validation, chunk=self._chunk))
        return float(cosine_similarity(g, self._trigger(view).mean(0), dim=0))

    @property
    def _chunk(self) -> int | None:
        return None if self.craft_mode == "train" else self.chunk

    def _trigger(self, view: View, honest: Honest | None = None) -> Tensor:
        """The trigger's updates as they would be sent now, before scaling: (1 or clients, parameters)."""
        if self.trigger == "reoptimised" and TRIGGER in view.memory:
            return view.memory[TRIGGER]
        if self.trigger == "reoptimised":
            return self._bounded_trigger(-self._clean_trigger(view, honest))
        return self._clean_trigger(view, None) * (1 if self.trigger == "clean" else -1)

    def _reoptimised(self, honest: Honest, view: View) -> Tensor:
        """The poisoned trigger, moved on by the current update of the clean one; at first the reversed one."""
        now = self._clean_trigger(view, honest)
        before = view.memory[TRIGGER] if TRIGGER in view.memory else self._bounded_trigger(-now)
        return self._bounded_trigger(before - self.alpha * now)

    def _bounded_trigger(self, rows: Tensor) -> Tensor:
        radius = self.radius if self.trigger_radius is None else self.trigger_radius
        return clip_rows(rows, radius, self.trigger_bound or self.norm, how=self.how)

    def _clean_trigger(self, view: View, honest: Honest | None) -> Tensor:
        """The honest updates on the trigger: their mean (1, parameters), or one a client as the round computes it."""
        if self.trigger_rows == "mean" or honest is None:
            return _flat(self._trigger_gradient(view)).unsqueeze(0)
        x, y = view.clean_trigger
        samples = honest.x.shape[1] if len(x) % honest.x.shape[1] == 0 else len(x)  # else it is no round of clients
        return honest.gradients(x.view(-1, samples, *x.shape[1:]), y.view(-1, samples))

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
