"""The greedy baselines share one idea: feed the victim adversarial examples of its current model."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Generator, Tensor

from mithridate.attacks.budget import Phased, Sighted
from mithridate.attacks.losses import by_targets, nudged, targets
from mithridate.core.batch import Batch
from mithridate.core.registry import settings
from mithridate.core.view import Need, View
from mithridate.maths.ascent import climb
from mithridate.maths.calculus import input_gradient


@settings
class Delusive(Phased, Sighted, ABC):
    """Ascend the loss of each batch at the current model; labels are left alone.

    Args:
        loss: What is ascended: `ce`, the victim's own loss; `kl`, the divergence from the model's answer to the clean
            sample (at the sample itself its slope is zero: without a random start the ascent begins beside it); `cw`,
            the margin of the best other class over the label.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL})

    @abstractmethod
    def inner(self) -> dict[str, Any]:
        """The inner optimiser: keyword arguments of `mithridate.maths.ascent.climb`."""

    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        """Adversarial examples of the current model."""
        box, how = by_targets(self.target(view), self.loss), self.inner()
        parameters, y = box.parameters, targets(self.loss, box, batch, self.craft_mode)
        if self.loss == "kl" and not how.get("random_start"):
            how["start"] = nudged(batch.x, self.ball, mask, view.domain, rng)
        with box.objective(self.craft_mode, self.precision) as objective:
            return climb(
                batch.x,
                lambda x: input_gradient(objective, parameters, x, y),
                self.ball,
                into_domain=view.domain.clamp,
                mask=mask,
                rng=rng,
                **how,
            ).x
