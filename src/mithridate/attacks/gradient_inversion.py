"""Poison whose gradient is the one that the attacker wants: a gradient attack, sent as data."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Generator, Tensor

from mithridate.attacks.budget import Iterated, Phased
from mithridate.attacks.losses import by_targets, targets
from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError
from mithridate.core.registry import register, settings
from mithridate.core.view import Need, View
from mithridate.maths.alignment import alignment, approach, nearness
from mithridate.maths.calculus import Slope, gradient
from mithridate.maths.directions import opposite, unit


@register("attack", "gradient_inversion")
@settings
class GradientInversion(Phased, Iterated):
    """Invert a wanted gradient: every batch's gradient is brought to `strength` times that of S_val, turned round.

    Who learns from such a batch climbs the loss on S_val, as if the attacker had sent the gradient itself. Unlike
    `vanilla`, which makes the product with S_val's gradient as low as it goes, it aims at one vector, so that
    `strength` says how far one step moves the model.

    Args:
        strength: Length of the wanted gradient, in units of that of S_val, > 0. Of `cosine` it decides nothing.
        match: `l2`: the squared distance to the wanted gradient descends; `cosine`: the angle alone counts, and the
            length is as it comes.
        chunk: Samples computed at a time, >= 1 (bounds memory; not used with `craft_mode = "train"`).

    Raises:
        ConfigError: `compile` with `match = "l2"`, whose slope is no graph that is compiled.

    Source:
        Bouaziz, El-Mhamdi and Usunier, arXiv:2410.21453: a malicious gradient (there gradient ascent among others) is
        inverted into data. Theirs are free to leave the ball and to be a few samples of a batch; here the ball and
        `poison_ratio` hold, and labels stay.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL, Need.VALIDATION})

    strength: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    match: Literal["l2", "cosine"] = "l2"
    chunk: Annotated[int, Field(ge=1)] = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile and self.match == "l2":
            raise ConfigError(
                '[attack] gradient_inversion: compile = true works on a product of gradients, and match = "l2" follows '
                'a distance; set match = "cosine", or compile = false.'
            )

    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        """Bring the gradient of the whole batch, clean samples included, to the wanted one."""
        box = by_targets(self.target(view), self.loss)
        parameters, y = box.parameters, targets(self.loss, box, batch, self.craft_mode)
        with box.objective(self.craft_mode, self.precision) as objective:
            chunk = None if self.craft_mode == "train" else self.chunk
            g_validation = gradient(objective, parameters, *view.validation, chunk=chunk)
            if self.match == "cosine":
                wanted = opposite(unit(g_validation, "global"))
            else:
                wanted = {name: -self.strength * g for name, g in g_validation.items()}

            def slope_at(x: Tensor) -> Slope:
                if self.match == "cosine":
                    return self.turned(objective, parameters, x, y, wanted, normalise="global", chunk=chunk)
                return approach(objective, parameters, x, y, wanted, chunk=chunk)

            def value_at(x: Tensor) -> Tensor:
                if self.match == "cosine":
                    return alignment(objective, parameters, x, y, wanted, normalise="global", chunk=chunk)
                return nearness(objective, parameters, x, y, wanted, chunk=chunk)

            return self.climb(batch.x, slope_at, mask, view, rng, value_at=value_at)
