"""Serve an average of the model's recent states instead of the newest one."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from mithridate.core.average import moved_along, weights_of
from mithridate.core.defence import Defence
from mithridate.core.past import Weights
from mithridate.core.registry import register, settings
from mithridate.core.view import Need, View


@register("defence", "ema")
@settings
class Ema(Defence):
    """Answer queries with an exponential moving average of parameters and BatchNorm statistics; learn as usual.

    The average starts at the model as it is before the first update, and takes in each committed state once:
    average = decay * average + (1 - decay) * state; a step that is rolled back never enters. Whole-number buffers are
    not averaged; the newest is served.

    What breaks it: it delays damage and does not undo it. A share 1 - decay of a trigger's step is served at once, and
    the rest follows while the attacker keeps on sending, since the model that learns is not protected at all. A decay
    near 1 serves a model that hardly learns from the stream.

    Args:
        decay: Weight of the old average in each step, in [0, 1): about 1 / (1 - decay) updates are averaged. 0 serves
            the model itself.

    Source:
        Polyak and Juditsky, SIAM J. Control Optim. 1992 (averaging iterates); Tarvainen and Valpola, NeurIPS 2017,
        arXiv:1703.01780 (mean teacher). As a defence against poisoning it is engineering practice.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL})
    neutral: ClassVar[Mapping[str, Any]] = {"decay": 0.0}
    active: ClassVar[Mapping[str, Any]] = {"decay": 0.9}

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9

    def begin(self, view: View) -> None:
        """The average starts at the model as it is before the first update."""
        if self.decay > 0 and not view.memory:
            view.memory.update(moved_along({}, view.model.module, self.decay))

    def committed(self, view: View) -> None:
        """The average takes in the state that was reached."""
        if self.decay > 0:
            view.memory.update(moved_along(view.memory, view.model.module, self.decay))

    def serve(self, view: View) -> Weights | None:
        """The average."""
        if self.decay == 0 or not view.memory:
            return None
        return weights_of(view.memory, view.model.module, f"average with decay {self.decay:g}")
