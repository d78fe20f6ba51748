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
        steps: Number of steps, >= 0; 0 returns the start.
        step_size: Length of one step, > 0, in pixel units; unset: 2 * eps / steps.
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
