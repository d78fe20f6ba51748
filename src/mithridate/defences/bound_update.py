"""Bound the step that is applied, whatever the optimiser made of the gradient."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from mithridate.core.defence import ADMITTED, Defence, Verdict
from mithridate.core.past import Weights
from mithridate.core.registry import register, settings
from mithridate.core.updates import Updates
from mithridate.core.view import Need, View
from mithridate.maths.norms import Norm, clip_rows


@register("defence", "bound_update")
@settings
class BoundUpdate(Defence):
    """Shorten the applied step (parameters after minus before) to a bound, momentum and weight decay included.

    Gradient clipping bounds what goes into the optimiser; momentum adds up ten clipped gradients to a step ten times as
    long (at 0.9). This bounds what comes out. A step that is NaN or infinite is refused.

    What breaks it: many small steps the same way, as the accumulative phase makes them; BatchNorm statistics, which
    move in the forward pass and are not bounded; and the optimiser's own memory: a huge gradient stays in the momentum
    and pulls the following steps its way too, each of them bounded (about log(size) / log(1 / momentum) steps). Chain
    it after `clip` or `skip` to keep that short.

    Args:
        clip_norm: The longest step, > 0, in the units of the parameters, up to rounding; `inf` never clips. No value
            fits all models, since learning rate, momentum and number of parameters make a step long or short: look how
            long steps are on clean batches of your own (column `update_norm` of a trace), and take once or twice the
            longest. The default is a seat belt against explosions: on digits clean steps are 0.13 long at most (seeds
            10 to 13) and those of the attacks 0.7, so that it does not act. A bound of 0.13 does: the worst attack
            leaves 56 % there, where it leaves 11 % without a defence (`results/leaderboard`).
        norm: In which norm the step over all parameters is measured: `l2`, or `linf` (the largest change of one). The
            whole step is scaled in both.

    Source:
        Norm bounding of a whole update: Sun et al., 2019, arXiv:1911.07963, section 4 (federated rounds); here on every
        single step, which is engineering practice.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL})
    neutral: ClassVar[Mapping[str, Any]] = {"clip_norm": math.inf}
    active: ClassVar[Mapping[str, Any]] = {"clip_norm": 0.01}

    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    norm: Norm = "l2"

    @torch.no_grad()
    def admit(self, before: Weights, view: View) -> Verdict:
        """The step, no longer than the bound."""
        if math.isinf(self.clip_norm):
            return ADMITTED
        now = dict(view.model.module.named_parameters())
        step = Updates.of({name: p - before.parameters[name] for name, p in now.items()})
        if not bool(step.rows.isfinite().all()):
            return Verdict(admit=False, reason="bound_update: the step is not finite")
        rows = clip_rows(step.rows, self.clip_norm, self.norm)
        if torch.equal(rows, step.rows):
            return ADMITTED
        shorter = step.with_rows(rows).named()
        return Verdict(admit=True, parameters={name: before.parameters[name] + shorter[name] for name in now})
