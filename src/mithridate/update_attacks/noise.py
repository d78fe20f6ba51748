"""Send noise: what any attack must beat."""

from typing import ClassVar

import torch
from torch import Generator, Tensor

from mithridate.core.registry import register, settings
from mithridate.core.update_attack import Honest
from mithridate.core.view import View
from mithridate.update_attacks.hostile import Factor, HostileShare, Share


@register("update_attack", "noise")
@settings
class NoiseUpdates(HostileShare):
    """Each hostile client sends a random direction as long as its honest update, scaled.

    Args:
        scale: Length relative to the honest update, >= 0.

    Source:
        The control of this library; "Gaussian attack" of Blanchard et al., NeurIPS 2017, at a stated length.
    """

    control: ClassVar[bool] = True

    poison_ratio: Share = 1.0
    scale: Factor = 1.0

    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        """A fresh draw for every client."""
        drawn = torch.randn(honest.own.shape, generator=rng, dtype=honest.own.dtype).to(honest.own.device)
        lengths = torch.linalg.vector_norm(honest.own, dim=1, keepdim=True)
        sent: Tensor = self.scale * drawn * lengths / torch.linalg.vector_norm(drawn, dim=1, keepdim=True)
        return sent
