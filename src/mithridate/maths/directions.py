"""Directions in parameter space: what gradients, and anything shaped like the parameters, are put together by."""

from typing import Literal

import torch
from torch import Tensor

Parameters = dict[str, Tensor]
"""Trainable parameters, or anything shaped like them (gradients, directions), by name."""

Normalise = Literal["none", "global", "tensor"]
"""How gradients enter a product: as they are, as one unit vector, or as one unit vector a parameter tensor."""


def inner(a: Parameters, b: Parameters) -> Tensor:
    """Inner product over all parameters, a scalar."""
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def add(a: Parameters, b: Parameters, *, scale: float = 1.0) -> Parameters:
    """`a + scale * b`, tensor by tensor."""
    return {name: a[name] + scale * b[name] for name in a}


def _norms(a: Parameters, normalise: Normalise) -> dict[str, Tensor]:
    """The length that `unit` divides each tensor of `a` by."""
    lengths = {name: torch.linalg.vector_norm(t) for name, t in a.items()}
    if normalise == "global":
        whole = torch.linalg.vector_norm(torch.stack(list(lengths.values())))
        return dict.fromkeys(a, whole)
    return lengths


def _divide(a: Tensor, by: Tensor) -> Tensor:
    """Division that leaves zero, in derivatives too, where the divisor is: a tensor of zeros has no direction."""
    return torch.where(by > 0, a / torch.where(by > 0, by, 1.0), 0.0)


def unit(a: Parameters, normalise: Normalise) -> Parameters:
    """`a` at unit length: as a whole (`global`), tensor by tensor (`tensor`), or untouched (`none`)."""
    if normalise == "none":
        return a
    norms = _norms(a, normalise)
    return {name: _divide(t, norms[name]) for name, t in a.items()}


def alignment_gradient(a: Parameters, w: Parameters, normalise: Normalise) -> Parameters:
    """Derivative in `a` of <unit(a), w>, with `w` fixed and taken as it is.

    Args:
        a: A gradient.
        w: The direction it is compared with, shaped alike. If it is `unit(b, normalise)`, the product is a cosine
            (`global`), or a sum of one cosine a tensor (`tensor`).
        normalise: How `unit` divides `a`.

    Returns:
        `w` itself for `none`; else (w - <â, w> â) / |a|, whole or tensor by tensor, and zero where |a| is zero.
    """
    if normalise == "none":
        return w
    norms = _norms(a, normalise)
    hats = unit(a, normalise)
    if normalise == "global":
        along = dict.fromkeys(a, inner(hats, w))
    else:
        along = {name: (hats[name] * w[name]).sum() for name in a}
    return {name: _divide(w[name] - along[name] * hats[name], norms[name]) for name in a}


def blend(first: Parameters, second: Parameters, weights: tuple[float, float]) -> Parameters:
    """The weighted sum of two directions; a weight of zero leaves its term out, even if that is not finite."""
    zero = {name: torch.zeros_like(t) for name, t in first.items()}
    total = add(zero, first, scale=weights[0]) if weights[0] else zero
    return add(total, second, scale=weights[1]) if weights[1] else total


def opposite(direction: Parameters) -> Parameters:
    """The direction that points the other way."""
    return {name: -t for name, t in direction.items()}
