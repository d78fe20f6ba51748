"""Pixel gradients that turn the parameter gradient of a batch: the maths of `vanilla` and `accumulative`."""

import torch
from torch import Tensor
from torch.func import grad

from mithridate.maths.calculus import (
    Normalise,
    Objective,
    Parameters,
    add,
    alignment_gradient,
    gradient,
    hessian_vector_product,
    inner,
    mixed_partial,
    mixed_partial_of_curvature,
    unit,
)


def turn_towards(
    objective: Objective,
    parameters: Parameters,
    x: Tensor,
    y: Tensor,
    w: Parameters,
    *,
    normalise: Normalise,
    chunk: int | None = None,
) -> Tensor:
    """d/dx <unit(grad_theta L(x)), w>: follow it upwards and the batch's gradient turns towards `w`.

    Args:
        objective: The loss, a pure function.
        parameters: Where to differentiate.
        x: Pixels (n, c, h, w).
        y: Labels (n,).
        w: The wanted direction, shaped like the parameters.
        normalise: How `unit` divides the gradient; `none` needs no gradient at `x` and costs one pass less.
        chunk: Samples computed at a time (bounds memory); None for all at once. See `calculus.gradient`.

    Source:
        Pang et al., NeurIPS 2021, Algorithm 1, "Compute H_t" and its gradient in the pixels.
    """
    if normalise == "none":
        return mixed_partial(objective, parameters, x, y, w, chunk=chunk)
    v = alignment_gradient(gradient(objective, parameters, x, y, chunk=chunk), w, normalise)
    return mixed_partial(objective, parameters, x, y, v, chunk=chunk)


def trigger_ascent(
    objective: Objective,
    parameters: Parameters,
    validation: tuple[Tensor, Tensor],
    trigger: tuple[Tensor, Tensor],
    u: Parameters,
    *,
    normalise: Normalise,
    g_validation: Parameters,
    chunk: int | None = None,
) -> Tensor:
    """d/dx_T <u, G(x_T)>, where G = grad_theta product(g_val, g_tri(x_T)): how the trigger's pixels move H_t.

    <u, G> is the derivative of the product along `u`. With b = g_tri(x_T), h = Hessian_tri(x_T) u, a' = Hessian_val u
    it is q(b, h) = <dP/da, a'> + <dP/db, h>, so the chain rule needs one mixed partial (along dq/db) and one of the
    curvature (along dq/dh = dP/db and u).

    Args:
        objective: The loss, a pure function.
        parameters: Where to differentiate.
        validation: Pixels and labels of S_val.
        trigger: Pixels and labels of the trigger.
        u: A fixed direction, shaped like the parameters.
        normalise: How the two gradients enter their product.
        g_validation: grad_theta L(S_val).
        chunk: Samples computed at a time (bounds memory); None for all at once. See `calculus.gradient`.

    Returns:
        A tensor shaped like the trigger's pixels.

    Source:
        Pang et al., NeurIPS 2021, Algorithm 1, "update P(S_T)", read literally: H_t is not stopped at G_t.
    """
    b = gradient(objective, parameters, *trigger, chunk=chunk)
    h = hessian_vector_product(objective, parameters, *trigger, u, chunk=chunk)
    a_along_u = hessian_vector_product(objective, parameters, *validation, u, chunk=chunk)

    def q(b: Parameters) -> Tensor:
        by_a = alignment_gradient(g_validation, unit(b, normalise), normalise)
        by_b = alignment_gradient(b, unit(g_validation, normalise), normalise)
        return inner(by_a, a_along_u) + inner(by_b, h)

    dq_db: Parameters = grad(q)(b)
    dp_db = alignment_gradient(b, unit(g_validation, normalise), normalise)
    return mixed_partial(objective, parameters, *trigger, dq_db, chunk=chunk) + mixed_partial_of_curvature(
        objective, parameters, *trigger, u, dp_db, chunk=chunk
    )


def blend(first: Parameters, second: Parameters, weights: tuple[float, float]) -> Parameters:
    """The weighted sum of two directions; a weight of zero leaves its term out, even if that is not finite."""
    zero = {name: torch.zeros_like(t) for name, t in first.items()}
    total = add(zero, first, scale=weights[0]) if weights[0] else zero
    return add(total, second, scale=weights[1]) if weights[1] else total
