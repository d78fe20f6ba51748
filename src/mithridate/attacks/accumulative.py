"""The accumulative poisoning attack: quiet steps that make the model sensitive, then one trigger batch."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from mithridate.attacks.budget import Factor
from mithridate.attacks.losses import nudged, targets
from mithridate.attacks.trigger import TRIGGER, CraftingRound, TriggerPoisoner
from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError
from mithridate.core.registry import register, settings
from mithridate.core.secrecy import Secrecy
from mithridate.core.view import View
from mithridate.maths.alignment import trigger_ascent
from mithridate.maths.calculus import Curved, Slope, curved, gradient, product_gradient
from mithridate.maths.directions import Parameters, alignment_gradient, blend, unit

PULL, AGE = "pull.", "pull age"
"""Where G_t is kept by parameter, and how many batches it has served."""


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
            "trigger_update": "released",
            "accuracy_floor": 0.82,
        },
    },
)
@settings
class Accumulative(Secrecy, TriggerPoisoner):
    """Poison batch after batch so that one later trigger batch breaks the model, while accuracy stays in its range.

    At each step the gradient of the poisoned batch is turned towards w = g(S_t) + lam G_t: the first term keeps
    accuracy, the second makes the trigger's gradient oppose that of the validation batch.

    The trigger is `attacks.trigger`'s part, hiding from Memorization Discrepancy that of `attacks.hiding`. With another
    `loss`, the poisoned samples and the trigger are taken to offer its parameter gradient; the papers do not say where
    it enters. S_val and g(S_t) keep the victim's own, since they stand for what the victim really computes. With
    `model_access = "surrogate"`, S_val, the published accuracy and (to hide) the victim's old checkpoint are seen too.

    Args:
        lam: Weight of G_t, >= 0.
        clean_weight: Weight of g(S_t), >= 0; 0 leaves only the second-order term.
        pull_every: Batches that one G_t serves, >= 1; 1 computes it for each, which is exact. Not with a trigger that
            is poisoned jointly, on which G_t depends in every inner step.
        weight_momentum: Momentum factor, >= 0, that the victim's SGD is given in the accumulative phase (the paper:
            1.1); unset: left alone. It is power over the optimiser, not over data.

    Source:
        Pang et al., NeurIPS 2021, section 3.2, Eqs. (7)-(9), Algorithm 1; the options from section 4.1 and Tables
        1, 2 and 7. Losses, surrogates and hiding: Zhu et al., ICML 2023, Tables 2, 11 and 3, C.12, Eq. (21).
    """

    lam: Factor = 1.0
    clean_weight: Factor = 1.0
    pull_every: Annotated[int, Field(ge=1)] = 1
    weight_momentum: Factor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pull_every > 1 and self.joint:
            raise ConfigError(
                "[attack] accumulative: pull_every keeps G_t for several batches, and a jointly poisoned trigger "
                'has another in every inner step; take trigger_mode = "fixed", or trigger_update = "after_step".'
            )

    def ready(self, view: View) -> bool:
        """Once published accuracy has left the range that keeps the phase secret."""
        return self.noticed(view)

    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        """One round of Algorithm 1: the accumulative batch, and with `joint` the trigger beside it."""
        with self.round(view, rng) as at:
            first = TRIGGER not in view.memory
            trigger_x = self.next_trigger(at, view, rng)
            clean = unit(gradient(at.objective, at.parameters, *batch, chunk=self.pieces), self.normalise)
            y = targets(self.loss, at.box, batch, self.craft_mode)

            def wanted(x: Tensor, g: Parameters) -> Parameters:
                """What the gradient is turned towards: g(S_t) + lam G_t, less what hides the batch."""
                w = blend(clean, unit(g, self.normalise), (self.clean_weight, self.lam))
                return self.hidden_direction(w, at.box, at.old, x, normalise=self.normalise, chunk=self.pieces)

            def of_batch(x: Tensor, g: Parameters) -> Slope:
                """H_t, and its gradient in the pixels of the accumulative batch."""
                slope = self.turned_at(at, x, y, wanted(x, g))
                return self.hidden_slope(slope, at.box, at.old, x, chunk=self.pieces)

            def value(x: Tensor, g: Parameters) -> Tensor:
                return self.aligned(at, x, y, wanted(x, g))

            if not self.joint:
                g = self._pull(at, trigger_x, view)
                return self.climb(
                    batch.x,
                    lambda x: of_batch(x, g),
                    mask,
                    view,
                    rng,
                    value_at=None if self.pixels_hide() else lambda x: value(x, g),
                )

            n = batch.size

            def both(x: Tensor) -> Slope:
                """H_t, and its gradient in the pixels of the accumulative batch and of the trigger, stacked."""
                at_trigger = self._at_trigger(at, x[n:])
                g = product_gradient(at.validation, at_trigger, normalise=self.normalise)
                poisoned = unit(gradient(at.objective, at.parameters, x[:n], y, chunk=self.pieces), self.normalise)
                of_trigger = trigger_ascent(
                    at.objective,
                    at.parameters,
                    at.validation,
                    (x[n:], at.trigger_y),
                    at_trigger,
                    alignment_gradient(g, poisoned, self.normalise),
                    normalise=self.normalise,
                    chunk=self.pieces,
                )
                slope = Slope(self.lam * of_trigger)
                hidden = self.hidden_slope(slope, at.box, at.old, x[n:], chunk=self.pieces, trigger=True)
                poison = of_batch(x[:n], g)
                return Slope(torch.cat([poison.gradient, hidden.gradient]), poison.value)

            def value_of_both(x: Tensor) -> Tensor:
                g = product_gradient(at.validation, self._at_trigger(at, x[n:]), normalise=self.normalise)
                return value(x[:n], g)

            trigger = view.clean_trigger.x
            begin = self.beginning(batch.x, mask, view.domain, rng)
            trigger_mask = self.positions(len(trigger), view, rng).to(mask.device)
            if first and self.loss == "kl":
                trigger_x = nudged(trigger_x, self.ball, trigger_mask, view.domain, rng)
            found = self.climb(
                torch.cat([batch.x, trigger]),
                both,
                torch.cat([mask, trigger_mask]),
                view,
                rng,
                start=torch.cat([begin, trigger_x]),
                value_at=None if self.pixels_hide() else value_of_both,
            )
            view.memory[TRIGGER] = found[n:].clone()
            return found[:n]

    def _pull(self, at: CraftingRound, trigger_x: Tensor, view: View) -> Parameters:
        """G_t; that of an earlier batch where it is kept for several."""
        age = view.memory.get(AGE)
        if age is not None and int(age) < self.pull_every:
            view.memory[AGE] = age + 1
            return {name: view.memory[PULL + name] for name in at.parameters}
        g = product_gradient(at.validation, self._at_trigger(at, trigger_x), normalise=self.normalise)
        if self.pull_every > 1:
            view.memory.update({AGE: torch.tensor(1), **{PULL + name: t for name, t in g.items()}})
        return g

    def _at_trigger(self, at: CraftingRound, trigger_x: Tensor) -> Curved:
        """The loss on the poisoned trigger."""
        return curved(at.objective, at.parameters, trigger_x, at.trigger_y, chunk=self.pieces)
