"""The greedy baselines share one idea: feed the victim adversarial examples of its current model."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Generator, Tensor

from mithridate.ascent import climb
from mithridate.attacks.budget import Phased
from mithridate.calculus import input_gradient
from mithridate.core import Batch, BatchNormMode, Need, View
from mithridate.registry import settings


@settings
class Delusive(Phased, ABC):
    """Ascend the loss of each batch at the current model; labels are left alone.

    Args:
        craft_mode: BatchNorm while crafting: running statistics (`eval`) or those of the batch (`train`).
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL})

    craft_mode: BatchNormMode = "eval"

    @abstractmethod
    def inner(self) -> dict[str, Any]:
        """The inner optimiser: keyword arguments of `mithridate.ascent.climb`."""

    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        """Adversarial examples of the current model."""
        parameters = view.model.parameters
        with view.model.objective(self.craft_mode) as objective:
            return climb(
                batch.x,
                lambda x: input_gradient(objective, parameters, x, batch.y),
                self.ball,
                mask=mask,
                rng=rng,
                **self.inner(),
            )
