"""PGD on the loss: a greedy, delusive poisoner."""

from typing import Any

from mithridate.attacks.budget import Steps, StepSize
from mithridate.attacks.delusive import Delusive
from mithridate.core.registry import register, settings


@register("attack", "pgd")
@settings
class PGD(Delusive):
    """Ascend the loss of every batch by projected gradient steps; labels are left alone.

    Args:
        steps: Number of steps, >= 0; 0 returns the start.
        step_size: Length of one step, > 0, in pixel units; unset: 2 * eps / steps.
        random_start: Begin at a uniform draw from the ball.

    Source:
        Madry et al., ICLR 2018, arXiv:1706.06083, section 2.1; Pang et al., NeurIPS 2021, Appendix B.2, Eq. (16).
    """

    steps: Steps = 10
    step_size: StepSize | None = None
    random_start: bool = True

    def inner(self) -> dict[str, Any]:
        """Projected gradient steps."""
        return {"steps": self.steps, "step_size": self.step_size, "random_start": self.random_start}
