"""What an attacker does who knows of Memorization Discrepancy: its derivatives, and a slope that keeps it low."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, cat, split

from mithridate.attacks.losses import by_targets
from mithridate.core.batch import AnyBatch
from mithridate.core.component import check_classes
from mithridate.core.errors import ConfigError
from mithridate.core.model import WhiteBox
from mithridate.core.past import Epoch, Weights
from mithridate.core.registry import settings
from mithridate.core.view import View
from mithridate.maths.calculus import Slope, gradient, input_gradient
from mithridate.maths.directions import Normalise, Parameters, add, unit
from mithridate.maths.divergence import divergence
from mithridate.maths.norms import Ball


@settings
class Hiding:
    """How poison hides from Memorization Discrepancy.

    Args:
        beta: Weight of the attempt to hide, >= 0; 0: none.
        hide_from: Burn-in epoch, before the last, of the old model that the defence is expected to use; `half`: that at
            half of the burn-in; unset: the earliest kept.
        hide: `gradient`: the direction w that the batch's gradient is turned towards gains beta * grad_theta D,
            normalised like its other terms, so that the victim's step lowers the discrepancy D = KL(old || now) of the
            batch (Eq. (21) as printed). It is taken at the poisoned batch as it is at each inner step, and held
            constant while the pixels are differentiated, as w is elsewhere. It acts on the model after the step,
            whereas the defence looks before it. `pixels`: the pixels climb H_t and descend D, each gradient at unit
            length a sample: what the defence looks at. D is taken in eval mode, as there.
        hide_trigger: With `pixels`: the trigger hides too.

    Raises:
        ConfigError: `hide_trigger` without `hide = "pixels"`.

    Source:
        Zhu et al., ICML 2023, Table 3, C.12, Eq. (21).
    """

    beta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    hide_from: Epoch | None = None
    hide: Literal["gradient", "pixels"] = "gradient"
    hide_trigger: bool = False

    def check_hiding(self) -> None:
        """Refuse settings that contradict each other."""
        if self.hide_trigger and self.hide != "pixels":
            raise ConfigError('hide_trigger works on pixels; set hide = "pixels" with it.')

    def check_hidden(self, batch: AnyBatch) -> None:
        """Refuse targets of a model whose answers are not one distribution over classes, unless nothing is hidden.

        Raises:
            ConfigError: They are no class numbers, one a sample.
        """
        if self.beta > 0:
            check_classes(batch, who=f"{type(self).__name__} with beta > 0")

    def pixels_hide(self, *, trigger: bool = False) -> bool:
        """Whether the pixels of a batch, or of the trigger, descend the discrepancy."""
        return self.beta > 0 and self.hide == "pixels" and (self.hide_trigger or not trigger)

    def hidden_from(self, view: View) -> Weights | None:
        """The victim's old self that the defence is expected to compare with; None if nothing is hidden.

        Args:
            view: Of an attack that declares `Need.HISTORY`.

        Raises:
            ConfigError: The burn-in kept none such.
        """
        if self.beta == 0:
            return None
        return view.history.checkpoint(self.hide_from, who=f"{view.owner}, which hides from an old model (beta > 0),")

    def hidden_direction(
        self,
        w: Parameters,
        box: WhiteBox,
        old: Weights | None,
        x: Tensor,
        *,
        normalise: Normalise,
        chunk: int | None,
    ) -> Parameters:
        """The direction that the batch's gradient is turned towards, with Eq. (21)'s third term if it hides by that.

        Args:
            w: The direction without it, by parameter.
            box: The model now.
            old: Its earlier self (`hidden_from`); None hides nothing.
            x: The poisoned inputs (n, ...) as they are.
            normalise: As the other terms of `w` are.
            chunk: Samples computed at a time; None for all at once.
        """
        if old is None or self.hide != "gradient":
            return w
        return add(w, unit(discrepancy_gradient(box, old, x, chunk=chunk), normalise), scale=self.beta)

    def hidden_slope(
        self, slope: Slope, box: WhiteBox, old: Weights | None, x: Tensor, *, chunk: int | None, trigger: bool = False
    ) -> Slope:
        """The slope that is followed in the pixels: away from the discrepancy, where these hide from it.

        Two slopes at unit length are together that of no function, so it has no value then.

        Args:
            slope: Of what the attack climbs.
            box: The model now.
            old: Its earlier self (`hidden_from`); None hides nothing.
            x: The poisoned inputs (n, ...) as they are.
            chunk: Samples computed at a time; None for all at once.
            trigger: The inputs are the trigger's, which hide only with `hide_trigger`.
        """
        if old is None or not self.pixels_hide(trigger=trigger):
            return slope
        return Slope(steer(slope.gradient, discrepancy_slope(box, old, x, chunk=chunk), self.beta))


def discrepancy_gradient(box: WhiteBox, old: Weights, x: Tensor, *, chunk: int | None = None) -> Parameters:
    """grad_theta of the mean KL(f(x; old) || f(x; theta)), both in eval mode: a step along it makes `x` stand out.

    Args:
        box: The model now.
        old: Its earlier self; a constant here, so cross-entropy with its answers as targets has the same gradient.
        x: Pixels (n, c, h, w).
        chunk: As in `calculus.gradient`.

    Source:
        Zhu et al., ICML 2023, Eq. (21), the term "keep imperceptibility".
    """
    answers = old.logits(box.module, x).softmax(1).detach()
    with by_targets(box, "kl").objective("eval") as objective:
        return gradient(objective, box.parameters, x, answers, chunk=chunk)


def discrepancy_slope(box: WhiteBox, old: Weights, x: Tensor, *, chunk: int | None = None) -> Tensor:
    """d/dx of each sample's KL(f(x; old) || f(x; theta)), both in eval mode and both moving with the pixels.

    Args:
        box: The model now.
        old: Its earlier self.
        x: Pixels (n, c, h, w).
        chunk: Samples computed at a time; None for all at once.

    Returns:
        A tensor shaped like `x`.
    """

    def objective(parameters: Parameters, x: Tensor, _: Tensor) -> Tensor:
        return divergence(old.logits(box.module, x), box.logits(x, parameters=parameters)).sum()

    pieces = split(x, chunk or len(x))
    return cat([input_gradient(objective, box.parameters, piece, piece).gradient for piece in pieces])


def steer(slope: Tensor, away: Tensor, beta: float) -> Tensor:
    """Up `slope` and down `away`: each at unit l2 length, sample by sample, so that `beta` has no unit.

    Args:
        slope: (n, ...).
        away: Shaped alike.
        beta: Weight of the second, >= 0.
    """
    sphere = Ball("l2", 1.0)
    return sphere.direction(slope) - beta * sphere.direction(away)
