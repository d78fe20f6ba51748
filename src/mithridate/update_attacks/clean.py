"""No attack: the control of a federation."""

from typing import ClassVar

from torch import Generator, Tensor

from mithridate.core.registry import register, settings
from mithridate.core.update_attack import Honest
from mithridate.core.view import View
from mithridate.update_attacks.hostile import HostileShare, Share


@register("update_attack", "clean")
@settings
class CleanUpdates(HostileShare):
    """Every client is honest.

    Args:
        poison_ratio: In [0, 1], and of no effect here: nobody is hostile, whatever the other attacks of a grid are set
            to.
        phase: True: rounds as usual before the trigger round; False: the trigger round alone.

    Source:
        The control of this library.
    """

    control: ClassVar[bool] = True

    poison_ratio: Share = 0.0
    phase: bool = True

    @property
    def ratio(self) -> float:
        """None."""
        return 0.0

    def ready(self, view: View) -> bool:
        """At once when there is no phase."""
        return not self.phase

    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        """The honest rows."""
        return honest.own
