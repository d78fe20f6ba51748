"""Layers in elementary operations, for derivatives that torch's fused ones lack or get wrong."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    by_channel = [-1 if d == 1 else 1 for d in range(x.ndim)]
    x = x if weight is None else x * weight.view(by_channel)
    return x if bias is None else x + bias.view(by_channel)


def _standardised(x: Tensor, over: list[int], eps: float) -> Tensor:
    centred = x - x.mean(over, keepdim=True)
    return centred * (centred.square().mean(over, keepdim=True) + eps).rsqrt()


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    return _affine(_standardised(x.reshape(len(x), num_groups, -1), [2], eps).view(x.shape), weight, bias)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    fused: bool = True,
) -> Tensor:
    """With running statistics, in one operation; with those of the batch, as torch has it if `fused`."""
    if training or running_mean is None or running_var is None:
        if fused:
            return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        return _affine(_standardised(x, [d for d in range(x.ndim) if d != 1], eps), weight, bias)
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else weight * scale
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    by_channel = [-1 if d == 1 else 1 for d in range(x.ndim)]
    return torch.addcmul(shift.view(by_channel), x, scale.view(by_channel))


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    x = _standardised(x, list(range(-len(normalized_shape), 0)), eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _affine(_standardised(x, list(range(2, x.ndim)), eps), weight, bias)


FOR_SECOND: dict[Any, Callable[..., Tensor]] = {
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
    F.silu: lambda x, inplace=False: x * torch.sigmoid(x),
    F.hardsigmoid: lambda x, inplace=False: F.relu6(x + 3) / 6,
    F.mish: lambda x, inplace=False: x * torch.tanh(F.softplus(x)),
}
"""Layers whose fused backward pass torch cannot differentiate, in elementary operations; and BatchNorm with running
statistics, which one multiplication and addition does faster than torch's own derivatives of derivatives."""

FOR_THIRD: dict[Any, Callable[..., Tensor]] = {
    F.batch_norm: partial(_batch_norm, fused=False),
    F.layer_norm: _layer_norm,
    F.instance_norm: _instance_norm,
}
"""Layers whose third derivative torch gets wrong by some per cent and without a word (2.13; autograd and torch.func
alike): those that standardise by statistics of the data in one fused operation. A test holds the functions here to
finite differences."""


class Instead(TorchFunctionMode):
    """Calls other functions in place of some of torch's, and takes what is computed without gradients for a constant.

    Forward mode would differentiate through `torch.no_grad`, where reverse mode does not: the two would differ.
    """

    def __init__(self, functions: Mapping[Any, Callable[..., Tensor]]) -> None:
        super().__init__()
        self.functions = functions

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        call = self.functions.get(func, func)
        if torch.is_grad_enabled():
            return call(*args, **(kwargs or {}))
        with forward_ad._set_fwd_grad_enabled(False):
            return call(*args, **(kwargs or {}))
