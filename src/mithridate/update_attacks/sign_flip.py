"""Send the honest update with its sign turned."""

from torch import Generator, Tensor

from mithridate.core.registry import register, settings
from mithridate.core.update_attack import Honest
from mithridate.core.view import View
from mithridate.update_attacks.hostile import Factor, HostileShare, Share


@register("update_attack", "sign_flip")
@settings
class SignFlip(HostileShare):
    """Each hostile client sends minus its own honest update, scaled.

    Args:
        scale: What it is multiplied by, >= 0.

    Source:
        Li et al., RSA, AAAI 2019, arXiv:1811.03761, section 5 ("sign-flipping attack").
    """

    poison_ratio: Share = 0.2
    scale: Factor = 4.0

    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        """Turned around."""
        return -self.scale * honest.own
