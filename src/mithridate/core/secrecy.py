"""When an accumulative phase ends, so that nobody notices it: what attacks on streams and on rounds share."""

from typing import Annotated

from pydantic import Field

from mithridate.core.registry import settings
from mithridate.core.view import View


@settings
class Secrecy:
    """The range in which published accuracy may move while the phase goes on; asked after its steps, never before one.

    A phase that was asked for so has one step at least, as in the released code, which takes a step before it reads an
    accuracy; the text's Algorithm 1 reads none. A floor above the accuracy of the start ends the phase after that step.

    Args:
        accuracy_floor: End the phase once published accuracy is below this fraction; unset: no such floor.
        max_drop: End the phase once published accuracy has fallen by more than this fraction since the start; unset:
            no such limit. For another model than the paper's take this one: its floor of 80 % under a start of 83.4 %
            is a max_drop of 0.034.
    """

    accuracy_floor: Annotated[float, Field(ge=0, le=1)] | None = None
    max_drop: Annotated[float, Field(ge=0, le=1)] | None = None

    def noticed(self, view: View) -> bool:
        """Whether published accuracy has left its range, after one step at least; only looked at where it matters."""
        if self.accuracy_floor is None and self.max_drop is None:
            return False
        start, now = view.accuracy  # looked at before the first step too: whoever has none finds out at once
        if view.step == 0:
            return False
        below = self.accuracy_floor is not None and now < self.accuracy_floor
        return below or (self.max_drop is not None and start - now > self.max_drop)
