"""Learning around a corrected sample: what the variants of adversarial training with a loss of their own share."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated

from pydantic import Field
from torch import Tensor

from mithridate.core.batch import Batch
from mithridate.core.defence import Screened
from mithridate.core.discrepancy import distance
from mithridate.core.registry import settings
from mithridate.core.view import View
from mithridate.defences.correction import Correcting
from mithridate.maths.ascent import climb
from mithridate.maths.calculus import Slope, input_gradient
from mithridate.maths.directions import Parameters
from mithridate.maths.norms import Ball


@settings
class AdversariallyLearned(Correcting, ABC):
    """Correct every received sample by reverse PGD, then learn from what lies around the corrected one.

    Ascents run in eval mode on the model as it is before the update and leave it alone; only the passes whose loss is
    differentiated run, and record BatchNorm statistics, in update mode.

    Args:
        eps: Radius of the ball in which a sample may be corrected, >= 0, in pixel units of [0, 1].
        norm: Of both balls: `linf` or `l2`.
        step_size: Length of one step of the correction, > 0, in pixel units.
        adv_steps: Steps of the ascent around the corrected sample, >= 0; 0 stays at it.
        adv_step_size: Length of one step of that ascent, > 0, in pixel units; unset: twice the radius over `adv_steps`.
    """

    adv_steps: Annotated[int, Field(ge=0)] = 10
    adv_step_size: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @property
    @abstractmethod
    def neighbourhood(self) -> Ball:
        """Where around the corrected sample is looked."""

    @property
    def searches(self) -> bool:
        """Whether any other point than the corrected sample can be found."""
        return self.adv_steps > 0 and self.neighbourhood.eps > 0

    def screen(self, batch: Batch, view: View) -> Screened:
        """The batch, every sample corrected."""
        return self.all_corrected(batch, view)

    def up_the_loss(self, batch: Batch, view: View) -> Tensor:
        """Pixels near each sample of which the current model's loss is high."""
        return self._ascended(batch.x, lambda x: Slope(self.loss_gradient(Batch(x, batch.y), view)), view)

    def up_the_divergence(self, batch: Batch, view: View) -> Tensor:
        """Pixels near each sample to which the current model answers unlike: up KL(f(sample) || f(pixels))."""
        box = view.model
        clean = self.says(batch.x, view)

        def from_clean(p: Parameters, x: Tensor, y: Tensor) -> Tensor:
            now = box.logits(x, parameters=p, precision=self.precision)
            return distance(clean, now, y, criterion=box.criterion).mean()

        def slope_at(x: Tensor) -> Slope:
            return input_gradient(from_clean, box.parameters, x, batch.y)

        return self._ascended(batch.x, slope_at, view)

    def _ascended(self, x: Tensor, slope_at: Callable[[Tensor], Slope], view: View) -> Tensor:
        """The end of the ascent, which starts beside each sample."""
        if not self.searches:
            return x
        return climb(
            x,
            slope_at,
            self.neighbourhood,
            into_domain=view.domain.clamp,
            steps=self.adv_steps,
            step_size=self.adv_step_size,
            start=self.beside(x, self.neighbourhood, view),
        ).x
