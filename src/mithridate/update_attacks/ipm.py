"""Inner-product manipulation: turn the mean update against the honest one."""

from torch import Generator, Tensor

from mithridate.core.registry import register, settings
from mithridate.core.update_attack import Honest
from mithridate.core.view import View
from mithridate.update_attacks.hostile import Factor, HostileShare, Share


@register("update_attack", "ipm")
@settings
class InnerProductManipulation(HostileShare):
    """All hostile clients send -scale times the mean of the honest updates.

    Args:
        scale: The multiple, >= 0; small ones pass distance-based rules, large ones turn the mean.

    Source:
        Xie et al., UAI 2019, arXiv:1903.03936, section 4 ("Fall of Empires").
    """

    poison_ratio: Share = 0.2
    scale: Factor = 4.0

    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        """The same row from every hostile client."""
        mean = honest.total / max(honest.n_honest, 1)
        return (-self.scale * mean).expand(honest.hostile, -1)
