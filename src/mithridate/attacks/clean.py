"""No attack: the control that every other row is read against."""

from typing import ClassVar

from torch import Generator, Tensor

from mithridate.attacks.budget import Phased
from mithridate.core.batch import Batch
from mithridate.core.registry import register, settings
from mithridate.core.view import View
from mithridate.maths.norms import Ball


@register("attack", "clean")
@settings
class Clean(Phased):
    """Change nothing: the same stream and the clean trigger batch, as the control.

    Args:
        phase: True: learn from the clean batches of the phase first; False: from the trigger batch alone.

    Source:
        Pang et al., NeurIPS 2021, Table 1, row "Clean trigger".
    """

    control: ClassVar[bool] = True

    @property
    def ball(self) -> Ball:
        """Radius zero."""
        return Ball(self.norm, 0.0)

    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        """The batch as it is."""
        return batch.x
