"""Convolutions whose gradient is cheap to differentiate.

torch's own backward pass of a convolution's backward pass always computes the derivative in the weights, asked for or
not, and as a convolution whose kernel is as large as the image. Here each derivative is one of the three passes that
torch does well (forward, in the inputs, in the weights), and only those are made that are asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from mithridate.maths.graph import nodes

_WEIGHTS_WANTED: ContextVar[bool] = ContextVar("derivatives in weights are wanted", default=True)


@contextmanager
def without_weights() -> Iterator[None]:
    """Backward passes inside the block, of what was computed before, are of inputs alone.

    They stop before derivatives in the weights of convolutions, except of weights that were computed from the inputs
    (`inputs_are`).
    """
    token = _WEIGHTS_WANTED.set(False)
    try:
        yield
    finally:
        _WEIGHTS_WANTED.reset(token)


class _How(NamedTuple):
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    apart: bool
    """Whether no input of the model has a part in weights and bias."""


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Tensor:
    none = [0] * len(how.stride)
    return torch.convolution(x, weight, bias, how.stride, how.padding, how.dilation, False, none, how.groups)


def _backward(g: Tensor, x: Tensor, weight: Tensor, how: _How, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Derivatives in inputs and weights, where wanted, of <g, convolution>."""
    none = [0] * len(how.stride)
    found: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        g, x, weight, None, how.stride, how.padding, how.dilation, False, none, how.groups, [*wanted, False]
    )
    return found[:2]


class _Context(FunctionCtx):
    """What a pass keeps for the next."""

    how: _How
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = how
        return _forward(x, weight, bias, how)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, weight) = gradients, ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        asked = _WEIGHTS_WANTED.get() or not ctx.how.apart
        of_weight, of_bias = of_weight and asked, of_bias and asked
        by_x, by_weight = None, None
        if of_x or of_weight:
            by_x, by_weight = _differentiate(g, x, weight, ctx.how, (of_x, of_weight))
        return by_x, by_weight, g.transpose(0, 1).flatten(1).sum(1) if of_bias else None, None


class _Gradients(torch.autograd.Function):
    """The backward pass; <u, by_x> + <v, by_weight> is bilinear in g and the two, and so are its derivatives."""

    @staticmethod
    def forward(
        ctx: _Context, g: Tensor, x: Tensor, weight: Tensor, how: _How, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(g, x, weight)
        ctx.set_materialize_grads(False)
        ctx.how = how
        return _backward(g, x, weight, how, wanted)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _Context, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (u, v), (g, x, weight), how = gradients, ctx.saved_tensors, ctx.how
        of_g, of_x, of_weight = ctx.needs_input_grad[:3]
        by_g, by_x, by_weight = None, None, None
        if of_g and u is not None:
            by_g = _forward(u, weight, None, how)
        if of_g and v is not None:
            by_v = _forward(x, v, None, how)
            by_g = by_v if by_g is None else by_g.add_(by_v)
        if of_x and v is not None:
            by_x = _backward(g, x, v, how, (True, False))[0]
        if of_weight and u is not None and (_WEIGHTS_WANTED.get() or not how.apart):
            by_weight = _backward(g, u, weight, how, (False, True))[1]
        return by_g, by_x, by_weight, None, None


_convolve: Callable[..., Tensor] = _Convolution.apply
_differentiate: Callable[..., tuple[Tensor | None, Tensor | None]] = _Gradients.apply

_INPUTS: ContextVar[Tensor | None] = ContextVar("inputs that are differentiated in", default=None)


@contextmanager
def inputs_are(x: Tensor) -> Iterator[None]:
    """What is computed inside the block may later be differentiated in `x` alone (`without_weights`)."""
    token = _INPUTS.set(x)
    try:
        yield
    finally:
        _INPUTS.reset(token)


def _reaches_input(t: Tensor) -> bool:
    """Whether a tensor was computed from the inputs; unknown inputs are taken for reached."""
    x = _INPUTS.get()
    if x is None:
        return True
    return t is x or any(getattr(node, "variable", None) is x for node in nodes(t))


def _instead(own: Callable[..., Tensor], dimensions: int) -> Callable[..., Tensor]:
    """What is called in place of torch's function for so many dimensions."""

    def convolution(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        if isinstance(padding, str) or x.ndim != dimensions + 2:
            return own(x, weight, bias, stride, padding, dilation, groups)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)

        def each(value: int | Sequence[int]) -> Sequence[int]:
            values = [value] if isinstance(value, int) else list(value)
            return values * dimensions if len(values) == 1 else values

        apart = not _reaches_input(weight) and (bias is None or not _reaches_input(bias))
        how = _How(each(stride), each(padding), each(dilation), groups, apart)
        return _convolve(x, weight, bias, how)

    return convolution


CHEAPER_TWICE: dict[Any, Callable[..., Tensor]] = {
    F.conv1d: _instead(F.conv1d, 1),
    F.conv2d: _instead(F.conv2d, 2),
    F.conv3d: _instead(F.conv3d, 3),
}
"""By torch's own functions; for double backward alone, since forward mode does not know them."""
