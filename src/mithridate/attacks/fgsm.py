"""FGSM on the loss: the one-step greedy poisoner."""

from typing import Any

from mithridate.attacks.delusive import Delusive
from mithridate.core.registry import register, settings


@register("attack", "fgsm")
@settings
class FGSM(Delusive):
    """Ascend the loss of every batch by one step as long as the radius; labels are left alone.

    Args:
        eps: Radius of the ball and length of the step, in pixel units of [0, 1] (8/255 is about 0.031).
        norm: Of the ball: `linf` or `l2`.
        poison_ratio: Share of each batch that is changed, in [0, 1].
        phase: True: every batch of the phase; False: the trigger batch alone.
        model_access: The model that is looked at: the `victim`'s own, or a `surrogate` of the attacker's.
        loss: What is ascended: `ce`, the victim's own loss; `kl`, the divergence from the model's answer to the clean
            sample (from a start beside it: at it the slope is zero); `cw`, the margin of the best other class over the
            label.
        craft_mode: BatchNorm while crafting: running statistics (`eval`) or those of the batch (`train`).

    Source:
        Goodfellow et al., ICLR 2015, arXiv:1412.6572, section 4; Pang et al., NeurIPS 2021, Appendix B.2, Eq. (15).
    """

    def inner(self) -> dict[str, Any]:
        """One step."""
        return {"optimiser": "fgsm"}
