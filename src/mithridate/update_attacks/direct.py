"""The federated poisoner without memory: a reversed trigger update, scaled."""

from typing import ClassVar

from torch import Generator, Tensor

from mithridate.core.registry import register, settings
from mithridate.core.update_attack import Honest
from mithridate.core.view import Need, View
from mithridate.update_attacks.hostile import Factor, HostileShare, Length, Share, scaled, shared_out


@register("update_attack", "direct")
@settings
class Direct(HostileShare):
    """In the trigger round alone, make the round's mean a multiple of minus the honest update.

    Args:
        trigger_scale: The multiple, >= 0 ("loss scaling" in the rows "Poisoned trigger" of Tables 3 to 5); 1 keeps the
            norm of the honest update.
        trigger_norm: l2 length that the update is given instead, > 0, so that triggers can be compared at equal length.

    Source:
        Pang et al., NeurIPS 2021, Tables 3 to 5, rows "Poisoned trigger".
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    poison_ratio: Share = 1.0
    trigger_scale: Factor = 1.0
    trigger_norm: Length | None = None

    def ready(self, view: View) -> bool:
        """At once: there is no phase."""
        return True

    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        """Up the loss."""
        return shared_out(scaled(-honest.mean, self.trigger_scale, self.trigger_norm), honest)
