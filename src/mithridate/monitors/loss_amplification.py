"""An alarm when the training loss of a batch is far above what the stream had so far."""

import math
from collections.abc import Sequence
from itertools import islice
from statistics import median
from typing import Annotated

from pydantic import Field

from mithridate.core.registry import register, settings
from mithridate.core.watch import Monitor, Reading


@register("monitor", "loss_amplification")
@settings
class LossAmplification(Monitor):
    """Alarm when the loss of a batch exceeds a multiple of the first batch's loss, or is not finite.

    Args:
        factor: The multiple, > 1.
        slack: Added to the bound, >= 0, in the unit of the loss; keeps a model with almost no loss from alarming at
            trifles.
        window: Compare with the median of so many last batches, >= 1, instead; unset: with the first batch.

    Source:
        Zhu et al., ICML 2023, section 4.2: batches are counted until the training loss is amplified to a monitored
        threshold. The paper states no value; these defaults are ours.
    """

    factor: Annotated[float, Field(gt=1)] = 3.0
    slack: Annotated[float, Field(ge=0)] = 0.5
    window: Annotated[int, Field(ge=1)] | None = None

    def alarm(self, readings: Sequence[Reading]) -> str | None:
        """The newest batch loss against those before it."""
        now = readings[-1].batch_loss
        if now is None or readings[-1].step == 0:
            return None
        if not math.isfinite(now):
            return "training loss is not finite"
        # Only as many readings are looked at as count: a step costs the same however long the run.
        earlier = islice(reversed(readings), 1, None) if self.window else islice(readings, len(readings) - 1)
        losses = (r.batch_loss for r in earlier if r.step > 0)
        before = list(islice((loss for loss in losses if loss is not None), self.window or 1))
        if not before:
            return None
        usual = median(before)
        bound = self.factor * usual + self.slack
        return f"training loss {now:.3g} above {bound:.3g}" if now > bound else None
