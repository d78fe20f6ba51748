"""FGSM on the loss: the one-step greedy poisoner."""

from typing import Any

from mithridate.attacks.delusive import Delusive
from mithridate.core.registry import register, settings


@register("attack", "fgsm")
@settings
class FGSM(Delusive):
    """Ascend the loss of every batch by one step as long as the radius; labels are left alone.

    Args:
        eps: Radius of the ball and length of the step, >= 0, in pixel units of [0, 1] (8/255 is about 0.031).

    Source:
        Goodfellow et al., ICLR 2015, arXiv:1412.6572, section 4; Pang et al., NeurIPS 2021, Appendix B.2, Eq. (15).
    """

    def inner(self) -> dict[str, Any]:
        """One step."""
        return {"optimiser": "fgsm"}
