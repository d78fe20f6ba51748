"""Derivatives of a loss that is a pure function of parameters and pixels.

A second-order quantity comes either way:

- forward-over-reverse: the derivative, along a direction in parameter space, of a reverse-mode gradient. Parameters
  carry the direction (dual tensors) through an ordinary forward and backward pass, so no graph of a backward pass is
  kept; `torch.func.grad` would keep one;
- double backward: a backward pass through the graph of a backward pass. Where the gradient itself is wanted too, it
  comes with the graph and costs nothing more.

Counted in convolutions (a forward pass is 1, a gradient in the parameters 3), one gradient in the pixels is 6 forward
over reverse, and 9 with the gradient that a normalised product needs; double backward has both in 7. A Hessian-vector
product is 9 either way, and 12 with the gradient forward over reverse. So a plain product in the pixels goes forward
over reverse, and everything else by double backward, with convolutions that make no pass too many (`convolution`).

Some layers have no formula for one of the two (fused attention, LSTM, weight_norm, Hardsigmoid for forward mode); the
same quantity is then computed the other way.

Source:
    The identity d/dx <grad_theta L(x), v> = d/ds grad_x L(theta + s v, x) at s = 0 (order of differentiation
    exchanged); Pang et al., NeurIPS 2021, Algorithm 1, for where each derivative is needed.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from mithridate.maths.convolution import CHEAPER_TWICE, inputs_are, without_weights
from mithridate.maths.directions import Normalise, Parameters, add, alignment_gradient, inner, unit
from mithridate.maths.elementary import FOR_SECOND, FOR_THIRD, Instead
from mithridate.maths.graph import nodes

Objective = Callable[[Parameters, Tensor, Tensor], Tensor]
"""(parameters, x, y) -> the mean loss of the batch, a scalar."""

FOR_DOUBLE_BACKWARD = {**FOR_SECOND, **CHEAPER_TWICE}

T = TypeVar("T")


class Slope(NamedTuple):
    """A function of the pixels at one point.

    Args:
        gradient: Shaped like the pixels.
        value: A scalar, or one number a sample (n,) if no sample sees another; None if nobody computed it.
    """

    gradient: Tensor
    value: Tensor | None = None


@dataclass(frozen=True)
class Curved:
    """A mean loss around one point in parameter space, up to second order.

    Args:
        gradient: In the parameters.
        curvature: A direction to the Hessian times it.
    """

    gradient: Parameters
    curvature: Callable[[Parameters], Parameters]


class NoDerivativeError(RuntimeError):
    """Torch has no second or third derivative of the loss, neither in forward mode nor by double backward."""


_NO_FORWARD_MODE: WeakSet[Objective] = WeakSet()
"""Losses that forward mode has failed on: it is not tried again at every step of an ascent."""

_NO_DOUBLE_BACKWARD: WeakSet[Objective] = WeakSet()
"""Losses that plain double backward has failed on, likewise."""


def _either(
    objective: Objective, forward: Callable[[], T], double_backward: Callable[[], T], loss: Callable[[], Tensor]
) -> T:
    """What forward mode gives; where torch has no formula for it, what double backward gives.

    Args:
        objective: The loss.
        forward: Computes the derivative in forward mode.
        double_backward: Computes the same one.
        loss: Computes the value alone, which raises where the loss itself is wrong.

    Raises:
        NoDerivativeError: Both failed, and the loss itself can be computed.
    """
    if objective not in _NO_FORWARD_MODE:
        try:
            return forward()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            _NO_FORWARD_MODE.add(objective)
    with _differentiable_kernels():
        try:
            return double_backward()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            loss()
            raise NoDerivativeError(str(error).partition("\n")[0]) from error


@contextmanager
def _differentiable_kernels() -> Iterator[None]:
    """Without the fused attention and recurrent layers whose backward passes torch cannot differentiate."""
    backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    enabled = [backend.enabled for backend in backends]
    try:
        for backend in backends:
            backend.enabled = False
        with sdpa_kernel([SDPBackend.MATH]):
            yield
    finally:
        for backend, before in zip(backends, enabled, strict=True):
            backend.enabled = before


_make_dual: Callable[[Tensor, Tensor], Tensor] = forward_ad.make_dual
_unpack_dual: Callable[[Tensor], tuple[Tensor, Tensor | None]] = forward_ad.unpack_dual


@functools.cache
def _load_forward_mode() -> None:
    """Make the first dual tensor, at which torch compiles some formulas with torch.jit and warns of its own doing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with forward_ad.dual_level():
            _make_dual(torch.zeros(()), torch.zeros(()))


@contextmanager
def _moving(parameters: Parameters, v: Parameters) -> Iterator[Parameters]:
    """Parameters that carry the direction `v`; whatever is computed from them carries its derivative along `v`."""
    _load_forward_mode()
    with Instead(FOR_SECOND), forward_ad.dual_level():
        yield {name: _make_dual(p, v[name]) for name, p in parameters.items()}


def _along(t: Tensor) -> Tensor:
    """The derivative that a tensor carries."""
    tangent = _unpack_dual(t)[1]
    return torch.zeros_like(t) if tangent is None else tangent


def _detached(parameters: Parameters) -> Parameters:
    return {name: p.detach() for name, p in parameters.items()}


def _leaves(parameters: Parameters) -> Parameters:
    return {name: p.detach().requires_grad_() for name, p in parameters.items()}


def _backward(value: Tensor, by: Parameters, *, keep_graph: bool = False) -> Parameters:
    if not value.requires_grad:  # a gradient that is constant
        return {name: torch.zeros_like(t) for name, t in by.items()}
    gradients = torch.autograd.grad(
        value, list(by.values()), allow_unused=True, materialize_grads=True, create_graph=keep_graph
    )
    return dict(zip(by, gradients, strict=True))


def _along_by_backward(objective: Objective, leaves: Parameters, x: Tensor, y: Tensor, v: Parameters) -> Tensor:
    """<grad_theta L(x), v>, a scalar that can be differentiated."""
    with Instead(FOR_SECOND):
        along = inner(_backward(objective(leaves, x, y), leaves, keep_graph=True), v)
    refuse_once_differentiable(along)
    return along


def refuse_once_differentiable(value: Tensor) -> None:
    """Raise where a function may be differentiated only once: torch then drops its part of a derivative unsaid."""
    if any(node.name() == "torch::autograd::Error" for node in nodes(value)):
        raise NoDerivativeError("a function that was marked with @once_differentiable")


class _Graph(NamedTuple):
    """A parameter gradient that can be differentiated."""

    gradient: Parameters
    leaves: Parameters


def _graph(objective: Objective, parameters: Parameters, x: Tensor, y: Tensor) -> _Graph | None:
    """The gradient of the mean loss with its graph; None where that cannot be differentiated again."""
    if objective in _NO_DOUBLE_BACKWARD:
        return None
    try:
        with torch.enable_grad(), Instead(FOR_DOUBLE_BACKWARD):
            leaves = _leaves(parameters)
            g = _backward(objective(leaves, x, y), leaves, keep_graph=True)
            refuse_once_differentiable(torch.stack([t.sum() for t in g.values()]))
            return _Graph(g, leaves)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        _NO_DOUBLE_BACKWARD.add(objective)
        return None


def _hessian_at_once(
    objective: Objective,
    parameters: Parameters,
    x: Tensor,
    y: Tensor,
    v: Parameters,
    graph: _Graph | None,
    *,
    again: bool = False,
) -> Parameters:
    """The Hessian times `v`: by double backward, which here is faster, or the other way where that does not work.

    Args:
        objective: The loss, a pure function.
        parameters: Where to differentiate.
        x: Inputs, all computed at once.
        y: Targets.
        v: The direction.
        graph: Of the gradient, if there is one.
        again: Whether the graph is kept.
    """
    if graph is not None:
        entries = [name for name, t in graph.gradient.items() if t.requires_grad]
        try:
            found = torch.autograd.grad(
                [graph.gradient[name] for name in entries],
                list(graph.leaves.values()),
                [v[name] for name in entries],
                retain_graph=again,
                allow_unused=True,
                materialize_grads=True,
            )
            return dict(zip(graph.leaves, found, strict=True))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            _NO_DOUBLE_BACKWARD.add(objective)
    leaves = _leaves(parameters)

    def forward() -> Parameters:
        with _moving(leaves, v) as moving:
            gradients = _backward(objective(moving, x, y), leaves)
            return {name: _along(g) for name, g in gradients.items()}

    def double_backward() -> Parameters:
        return _backward(_along_by_backward(objective, leaves, x, y, v), leaves)

    with torch.enable_grad():
        return _either(objective, forward, double_backward, lambda: objective(leaves, x, y))


def _chunks(x: Tensor, y: Tensor, chunk: int | None) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Pieces of a batch with their share of it; the mean loss is the share-weighted sum over pieces."""
    size = chunk or len(x)
    for piece_x, piece_y in zip(torch.split(x, size), torch.split(y, size), strict=True):
        yield len(piece_x) / len(x), piece_x, piece_y


def _over_chunks(term: Callable[[Tensor, Tensor], Parameters], x: Tensor, y: Tensor, chunk: int | None) -> Parameters:
    """The sum of the chunks' terms, each times its share of the samples."""
    total: Parameters = {}
    for share, piece_x, piece_y in _chunks(x, y, chunk):
        with torch.enable_grad():
            values = term(piece_x, piece_y)
        if not total:
            total = values if share == 1.0 else {name: share * t for name, t in values.items()}
            continue
        for name, t in values.items():
            total[name].add_(t, alpha=share)
    return total


def gradient(
    objective: Objective, parameters: Parameters, x: Tensor, y: Tensor, *, chunk: int | None = None
) -> Parameters:
    """Gradient of the mean loss in the parameters.

    Args:
        objective: The loss, a pure function.
        parameters: Where to differentiate.
        x: Inputs (n, ...).
        y: Targets (n, ...).
        chunk: Samples computed at a time (bounds memory); None for all at once. Exact only where the samples do not see
            each other, that is not with BatchNorm in train mode.

    Returns:
        One tensor a parameter, detached.
    """

    def term(piece_x: Tensor, piece_y: Tensor) -> Parameters:
        leaves = _leaves(parameters)
        return _backward(objective(leaves, piece_x, piece_y), leaves)

    return _over_chunks(term, x, y, chunk)


def hessian_vector_product(
    objective: Objective, parameters: Parameters, x: Tensor, y: Tensor, v: Parameters, *, chunk: int | None = None
) -> Parameters:
    """Hessian of the mean loss in the parameters, times `v`.

    Args:
        objective: The loss, a pure function.
        parameters: Where to differentiate.
        x: Inputs (n, ...).
        y: Targets (n, ...).
        v: The direction, shaped like the parameters.
        chunk: Samples computed at a time (bounds memory); None for all at once. See `gradient` for its limits.

    Returns:
        One tensor a parameter, detached.

    Raises:
        NoDerivativeError: Torch has no second derivative of the loss.
    """

    def term(piece_x: Tensor, piece_y: Tensor) -> Parameters:
        return _hessian_at_once(
            objective, parameters, piece_x, piece_y, v, _graph(objective, parameters, piece_x, piece_y)
        )

    return _over_chunks(term, x, y, chunk)


def curved(objective: Objective, parameters: Parameters, x: Tensor, y: Tensor, *, chunk: int | None = None) -> Curved:
    """Gradient of the mean loss in the parameters, and its Hessian.

    Args:
        objective: The loss, a pure function.
        parameters: Where to differentiate.
        x: Inputs (n, ...).
        y: Targets (n, ...).
        chunk: Samples computed at a time; None for all at once. If all are, the graph of the gradient is kept for the
            product with the Hessian as long as the result lives. See `gradient` for its limits.

    Raises:
        NoDerivativeError: (from `curvature`) torch has no second derivative of the loss.
    """
    if (chunk is None or len(x) <= chunk) and (graph := _graph(objective, parameters, x, y)) is not None:
        return Curved(
            _detached(graph.gradient), lambda v: _hessian_at_once(objective, parameters, x, y, v, graph, again=True)
        )
    return Curved(
        gradient(objective, parameters, x, y, chunk=chunk),
        lambda v: hessian_vector_product(objective, parameters, x, y, v, chunk=chunk),
    )


def input_gradient(objective: Objective, parameters: Parameters, x: Tensor, y: Tensor) -> Slope:
    """The mean loss, and its gradient in the inputs.

    Args:
        objective: The loss, a pure function.
        parameters: At which it is differentiated; constants here.
        x: Inputs (n, ...), all computed at once.
        y: Targets (n, ...).
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        loss = objective(_detached(parameters), x, y)
        return Slope(_backward(loss, {"x": x})["x"], loss.detach())


def slope_of_gradient(
    objective: Objective, parameters: Parameters, x: Tensor, y: Tensor, f: Callable[[Parameters], Tensor]
) -> Slope | None:
    """f(grad_theta L(x)) and its gradient in the pixels, by double backward.

    Args:
        objective: The loss, a pure function.
        parameters: Where to differentiate.
        x: Inputs (n, ...), all computed at once.
        y: Targets (n, ...).
        f: A differentiable function of a parameter gradient, a scalar.

    Returns:
        None where torch has no such derivative of the loss.
    """
    if objective in _NO_DOUBLE_BACKWARD:
        return None
    leaf, leaves = x.detach().requires_grad_(), _leaves(parameters)
    try:
        with torch.enable_grad(), Instead(FOR_DOUBLE_BACKWARD), inputs_are(leaf):
            value = f(_backward(objective(leaves, leaf, y), leaves, keep_graph=True))
            refuse_once_differentiable(value)
            with without_weights():
                return Slope(_backward(value, {"x": leaf})["x"], value.detach())
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        _NO_DOUBLE_BACKWARD.add(objective)
        return None


def derivative_along(
    objective: Objective, parameters: Parameters, x: Tensor, y: Tensor, v: Parameters, *, chunk: int | None = None
) -> Slope:
    """<grad_theta L(x), v>, and its gradient in pixel space: what turns the parameter gradient towards `v`.

    Args:
        objective: The loss, a pure function.
        parameters: Where to differentiate.
        x: Inputs (n, ...).
        y: Targets (n, ...).
        v: A fixed direction, shaped like the parameters.
        chunk: Samples computed at a time (bounds memory); None for all at once. See `gradient` for its limits.

    Raises:
        NoDerivativeError: Torch has no second derivative of the loss.

    Source:
        Pang et al., NeurIPS 2021, Algorithm 1: H_t and its gradient in the pixels of the accumulative batch.
    """

    def term(piece_x: Tensor, piece_y: Tensor) -> tuple[Tensor, Tensor]:
        leaf = piece_x.detach().requires_grad_()

        def forward() -> tuple[Tensor, Tensor]:
            with _moving(_detached(parameters), v) as moving:
                loss = objective(moving, leaf, piece_y)
                return _along(_backward(loss, {"x": leaf})["x"]), _along(loss).detach()

        def double_backward() -> tuple[Tensor, Tensor]:
            along = _along_by_backward(objective, _leaves(parameters), leaf, piece_y, v)
            return _backward(along, {"x": leaf})["x"], along.detach()

        return _either(objective, forward, double_backward, lambda: objective(parameters, leaf, piece_y))

    gradients, values = [], []
    for share, piece_x, piece_y in _chunks(x, y, chunk):
        with torch.enable_grad():
            gradient_there, value = term(piece_x, piece_y)
        gradients.append(gradient_there if share == 1.0 else share * gradient_there)
        values.append(share * value)
    return Slope(torch.cat(gradients), torch.stack(values).sum())


def mixed_partial(
    objective: Objective, parameters: Parameters, x: Tensor, y: Tensor, v: Parameters, *, chunk: int | None = None
) -> Tensor:
    """d/dx <grad_theta L(x), v>: the gradient of `derivative_along`, which takes the same."""
    return derivative_along(objective, parameters, x, y, v, chunk=chunk).gradient


def mixed_partial_of_curvature(
    objective: Objective,
    parameters: Parameters,
    x: Tensor,
    y: Tensor,
    u: Parameters,
    v: Parameters,
    *,
    chunk: int | None = None,
) -> Tensor:
    """d/dx <u, Hessian_theta L(x) v>: two forward passes nested over one reverse pass, or three reverse passes.

    Args:
        objective: The loss, a pure function.
        parameters: Where to differentiate.
        x: Inputs (n, ...).
        y: Targets (n, ...).
        u: First direction, shaped like the parameters.
        v: Second direction, shaped like the parameters; the result is symmetric in the two.
        chunk: Samples computed at a time (bounds memory); None for all at once. See `gradient` for its limits.

    Returns:
        A tensor shaped like `x`.

    Raises:
        NoDerivativeError: Torch has no third derivative of the loss.

    Source:
        Pang et al., NeurIPS 2021, Algorithm 1: H_t depends on the trigger's pixels through G_t, a second derivative.
    """

    def curvature_of(piece_x: Tensor, piece_y: Tensor) -> Tensor:
        def along_v(p: Parameters) -> Tensor:
            out: Tensor = jvp(lambda q: grad(objective, argnums=1)(q, piece_x, piece_y), (p,), (v,))[1]
            return out

        def forward() -> Tensor:
            out: Tensor = jvp(along_v, (_detached(parameters),), (u,))[1]
            return out

        def double_backward() -> Tensor:
            leaves, leaf = _leaves(parameters), piece_x.requires_grad_()
            along = _backward(_along_by_backward(objective, leaves, leaf, piece_y, v), leaves, keep_graph=True)
            return _backward(inner(along, u), {"x": leaf})["x"]

        return _either(objective, forward, double_backward, lambda: objective(parameters, piece_x, piece_y))

    _load_forward_mode()
    with torch.enable_grad(), Instead(FOR_THIRD):  # without gradients, `Instead` would take all for constants
        return torch.cat([share * curvature_of(px.detach(), py) for share, px, py in _chunks(x, y, chunk)])


def product_gradient(first: Curved, second: Curved, *, normalise: Normalise) -> Parameters:
    """grad_theta of <unit(grad_theta L(first)), unit(grad_theta L(second))>: G_t of Algorithm 1.

    By the chain rule it is two Hessian-vector products, one a batch, along the derivative of the product in that
    batch's gradient.

    Args:
        first: The loss on one batch (S_val).
        second: The loss on the other batch (the trigger).
        normalise: How the two gradients enter their product.

    Returns:
        One tensor a parameter.

    Source:
        Pang et al., NeurIPS 2021, Algorithm 1, line "Compute G_t".
    """
    a, b = first.gradient, second.gradient
    return add(
        first.curvature(alignment_gradient(a, unit(b, normalise), normalise)),
        second.curvature(alignment_gradient(b, unit(a, normalise), normalise)),
    )
