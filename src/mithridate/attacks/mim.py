"""MIM on the loss: the greedy poisoner with momentum."""

from typing import Any

from mithridate.attacks.budget import Factor, Steps, StepSize
from mithridate.attacks.delusive import Delusive
from mithridate.core.registry import register, settings


@register("attack", "mim")
@settings
class MIM(Delusive):
    """Ascend the loss of every batch by steps along an accumulated gradient; labels are left alone.

    Args:
        eps: Radius of the ball, in pixel units of [0, 1] (8/255 is about 0.031).
        norm: Of the ball: `linf` or `l2`.
        poison_ratio: Share of each batch that is changed, in [0, 1].
        phase: True: every batch of the phase; False: the trigger batch alone.
        model_access: The model that is looked at: the `victim`'s own, or a `surrogate` of the attacker's.
        loss: What is ascended: `ce`, the victim's own loss; `kl`, the divergence from the model's answer to the clean
            sample (from a start beside it: at it the slope is zero); `cw`, the margin of the best other class over the
            label.
        craft_mode: BatchNorm while crafting: running statistics (`eval`) or those of the batch (`train`).
        steps: Number of steps; 0 returns the start.
        step_size: Length of one step, in pixel units; unset: 2 * eps / steps.
        decay: Momentum factor mu, >= 0.

    Source:
        Dong et al., CVPR 2018, arXiv:1710.06081, Algorithm 1; Pang et al., NeurIPS 2021, Appendix B.2, Eqs. (17)-(18).
    """

    steps: Steps = 10
    step_size: StepSize | None = None
    decay: Factor = 1.0

    def inner(self) -> dict[str, Any]:
        """Momentum steps."""
        return {"optimiser": "mim", "steps": self.steps, "step_size": self.step_size, "decay": self.decay}
