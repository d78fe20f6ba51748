"""Pixel gradients that turn the parameter gradient of a batch: the maths of `vanilla` and `accumulative`."""

from torch import Tensor
from torch.func import grad

from mithridate.maths.calculus import (
    Curved,
    Objective,
    Slope,
    derivative_along,
    gradient,
    mixed_partial,
    mixed_partial_of_curvature,
    slope_of_gradient,
)
from mithridate.maths.directions import Normalise, Parameters, add, alignment_gradient, inner, unit


def turn_towards(
    objective: Objective,
    parameters: Parameters,
    x: Tensor,
    y: Tensor,
    w: Parameters,
    *,
    normalise: Normalise,
    chunk: int | None = None,
) -> Slope:
    """<unit(grad_theta L(x)), w> and its gradient: follow it upwards and the batch's gradient turns towards `w`.

    Args:
        objective: The loss, a pure function.
        parameters: Where to differentiate.
        x: Inputs (n, ...).
        y: Targets (n, ...).
        w: The wanted direction, shaped like the parameters.
        normalise: How `unit` divides the gradient; `none` needs no gradient at `x` and costs a pass less.
        chunk: Samples computed at a time (bounds memory); None for all at once, which is cheaper if `normalise` asks
            for the gradient (`calculus`). See `calculus.gradient`.

    Raises:
        NoDerivativeError: Torch has no second derivative of the loss.

    Source:
        Pang et al., NeurIPS 2021, Algorithm 1, "Compute H_t" and its gradient in the pixels.
    """
    if normalise == "none":
        return derivative_along(objective, parameters, x, y, w, chunk=chunk)
    if chunk is None or len(x) <= chunk:
        found = slope_of_gradient(objective, parameters, x, y, lambda g: inner(unit(g, normalise), w))
        if found is not None:
            return found
    g = gradient(objective, parameters, x, y, chunk=chunk)
    v = alignment_gradient(g, w, normalise)
    return Slope(mixed_partial(objective, parameters, x, y, v, chunk=chunk), inner(unit(g, normalise), w))


def alignment(
    objective: Objective,
    parameters: Parameters,
    x: Tensor,
    y: Tensor,
    w: Parameters,
    *,
    normalise: Normalise,
    chunk: int | None = None,
) -> Tensor:
    """<unit(grad_theta L(x)), w> alone, a scalar; arguments as in `turn_towards`."""
    return inner(unit(gradient(objective, parameters, x, y, chunk=chunk), normalise), w)


def approach(
    objective: Objective, parameters: Parameters, x: Tensor, y: Tensor, wanted: Parameters, *, chunk: int | None = None
) -> Slope:
    """-|grad_theta L(x) - wanted|^2 and its gradient: follow it upwards and the batch's gradient comes to `wanted`.

    Args:
        objective: The loss, a pure function.
        parameters: Where to differentiate.
        x: Inputs (n, ...).
        y: Targets (n, ...).
        wanted: A gradient, shaped like the parameters.
        chunk: Samples computed at a time (bounds memory); None for all at once, which is cheaper. See
            `calculus.gradient`.

    Raises:
        NoDerivativeError: Torch has no second derivative of the loss.

    Source:
        Inversion of a gradient: Bouaziz, El-Mhamdi and Usunier, arXiv:2410.21453.
    """
    if chunk is None or len(x) <= chunk:
        found = slope_of_gradient(objective, parameters, x, y, lambda g: _nearness(g, wanted))
        if found is not None:
            return found
    g = gradient(objective, parameters, x, y, chunk=chunk)
    v = {name: 2 * t for name, t in add(wanted, g, scale=-1.0).items()}
    return Slope(mixed_partial(objective, parameters, x, y, v, chunk=chunk), _nearness(g, wanted))


def nearness(
    objective: Objective, parameters: Parameters, x: Tensor, y: Tensor, wanted: Parameters, *, chunk: int | None = None
) -> Tensor:
    """-|grad_theta L(x) - wanted|^2 alone, a scalar; arguments as in `approach`."""
    return _nearness(gradient(objective, parameters, x, y, chunk=chunk), wanted)


def _nearness(g: Parameters, wanted: Parameters) -> Tensor:
    apart = add(g, wanted, scale=-1.0)
    return -inner(apart, apart)


def trigger_ascent(
    objective: Objective,
    parameters: Parameters,
    validation: Curved,
    trigger: tuple[Tensor, Tensor],
    at_trigger: Curved,
    u: Parameters,
    *,
    normalise: Normalise,
    chunk: int | None = None,
) -> Tensor:
    """d/dx_T <u, G(x_T)>, where G = grad_theta <unit(g_val), unit(g_tri(x_T))>: how the trigger's pixels move H_t.

    <u, G> is the derivative of the product along `u`. With b = g_tri(x_T), h = Hessian_tri(x_T) u, a' = Hessian_val u
    it is q(b, h) = <dP/da, a'> + <dP/db, h>, so the chain rule needs one mixed partial (along dq/db) and one of the
    curvature (along dq/dh = dP/db and u).

    Args:
        objective: The loss, a pure function.
        parameters: Where to differentiate.
        validation: The loss on S_val.
        trigger: Inputs and targets of the trigger.
        at_trigger: The loss on the trigger.
        u: A fixed direction, shaped like the parameters.
        normalise: How the two gradients enter their product.
        chunk: Samples computed at a time (bounds memory); None for all at once. See `calculus.gradient`.

    Returns:
        A tensor shaped like the trigger's pixels.

    Raises:
        NoDerivativeError: Torch has no third derivative of the loss.

    Source:
        Pang et al., NeurIPS 2021, Algorithm 1, "update P(S_T)", read literally: H_t is not stopped at G_t.
    """
    b, g_validation = at_trigger.gradient, validation.gradient
    h, a_along_u = at_trigger.curvature(u), validation.curvature(u)

    def q(b: Parameters) -> Tensor:
        by_a = alignment_gradient(g_validation, unit(b, normalise), normalise)
        by_b = alignment_gradient(b, unit(g_validation, normalise), normalise)
        return inner(by_a, a_along_u) + inner(by_b, h)

    dq_db: Parameters = grad(q)(b)
    dp_db = alignment_gradient(b, unit(g_validation, normalise), normalise)
    return mixed_partial(objective, parameters, *trigger, dq_db, chunk=chunk) + mixed_partial_of_curvature(
        objective, parameters, *trigger, u, dp_db, chunk=chunk
    )
