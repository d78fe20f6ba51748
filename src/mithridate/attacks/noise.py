"""Random perturbations of the same size: what any attack must beat."""

from typing import ClassVar

import torch
from torch import Generator, Tensor

from mithridate.attacks.budget import Phased
from mithridate.core.batch import Batch
from mithridate.core.registry import register, settings
from mithridate.core.view import View


@register("attack", "noise")
@settings
class Noise(Phased):
    """Add a random perturbation on the surface of the ball: random signs (linf) or a random direction (l2).

    Source:
        The control of this library: equal budget, no knowledge.
    """

    control: ClassVar[bool] = True

    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        """A fresh draw for every batch."""
        draw = torch.randn(batch.x.shape, generator=rng, dtype=batch.x.dtype).to(batch.x.device)
        return view.domain.clamp(batch.x + self.eps * self.ball.direction(draw))
