"""An alarm when accuracy leaves the range that a service tolerates."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from mithridate.core.registry import register, settings
from mithridate.core.watch import Monitor, Reading

Share = Annotated[float, Field(ge=0, le=1)]


@register("monitor", "accuracy_floor")
@settings
class AccuracyFloor(Monitor):
    """Alarm when accuracy is below a floor, or has fallen too far since the start.

    Args:
        floor: Lowest tolerated accuracy, a fraction in [0, 1]; unset: none.
        max_drop: Largest tolerated loss of accuracy since the start, a fraction in [0, 1]; unset: none.

    Source:
        Pang et al., NeurIPS 2021, section 4 "Poisoning target" and section 4.1 (80 % on CIFAR-10, from 83.4 %).
    """

    floor: Share | None = None
    max_drop: Share | None = None

    def alarm(self, readings: Sequence[Reading]) -> str | None:
        """The newest accuracy against the floor and the start; nothing where none was measured."""
        start, now = readings[0].accuracy, readings[-1].accuracy
        if start is None or now is None:
            return None
        if self.floor is not None and now < self.floor:
            return f"accuracy {now:.1%} below the floor of {self.floor:.1%}"
        if self.max_drop is not None and start - now > self.max_drop:
            return f"accuracy {now:.1%}, {100 * (start - now):.1f} points below the start"
        return None
