"""What an attacker does who knows of Memorization Discrepancy: its derivatives, and a slope that keeps it low."""

from torch import Tensor, cat, split
from torch.func import functional_call

from mithridate.attacks.losses import by_targets
from mithridate.core.errors import ConfigError
from mithridate.core.model import Weights, WhiteBox, frozen_statistics
from mithridate.core.view import View
from mithridate.maths.calculus import Parameters, gradient, input_gradient
from mithridate.maths.divergence import divergence
from mithridate.maths.norms import Ball


def old_model(view: View, epoch: int | None) -> Weights:
    """The victim's old self that the attacker expects the defence to compare with.

    Args:
        view: Of an attack that declares `Need.HISTORY`.
        epoch: Of the burn-in; None for the earliest kept.

    Raises:
        ConfigError: The burn-in kept none such.
    """
    held = view.history.checkpoint(epoch)
    if held is None:
        which = "no checkpoint" if epoch is None else f"no checkpoint of epoch {epoch}"
        raise ConfigError(
            f"{view.owner} hides from an old model (beta > 0), and the burn-in keeps {which}; add it to `checkpoints` "
            "in [burn_in], or set hide_from to one that it keeps."
        )
    return held


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
    with by_targets(box).objective("eval") as objective:
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
        return divergence(old.logits(box.module, x), functional_call(box.module, parameters, (x,))).sum()

    with frozen_statistics(box.module, "eval"):
        return cat([input_gradient(objective, box.parameters, piece, piece) for piece in split(x, chunk or len(x))])


def steer(slope: Tensor, away: Tensor, beta: float) -> Tensor:
    """Up `slope` and down `away`: each at unit l2 length, sample by sample, so that `beta` has no unit.

    Args:
        slope: (n, ...).
        away: Shaped alike.
        beta: Weight of the second, >= 0.
    """
    sphere = Ball("l2", 1.0)
    return sphere.direction(slope) - beta * sphere.direction(away)
