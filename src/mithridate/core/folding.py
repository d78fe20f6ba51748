"""BatchNorm in eval mode as part of the layer before it: fewer passes over the activations, in every derivative."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Names = tuple[str, str]
"""Of a convolution or linear layer, and of the BatchNorm that alone sees its outputs."""

_FOUND: WeakKeyDictionary[nn.Module, tuple[object, Sequence[Names]]] = WeakKeyDictionary()


@contextmanager
def folded(module: nn.Module) -> Iterator[None]:
    """Let a model in eval mode compute each convolution and the BatchNorm after it in one, inside the block.

    The scale of BatchNorm is multiplied into the weights at every pass, from the parameters and buffers of that pass,
    so that derivatives in all of them are what they were, to rounding. A model whose layers torch.fx cannot trace (one
    that looks at its data, say), and a pair that anything is hooked to, are computed as they are.

    Args:
        module: In eval mode; comes back as it was.

    Source:
        Jacob et al., CVPR 2018, arXiv:1712.05877, section 3.2, for the folded weights.
    """
    pairs = [(module.get_submodule(first), module.get_submodule(norm)) for first, norm in _pairs(module)]
    try:
        for first, norm in pairs:
            object.__setattr__(first, "forward", _together(first, norm))
            object.__setattr__(norm, "forward", _untouched)
        yield
    finally:
        for pair in pairs:
            for m in pair:
                m.__dict__.pop("forward", None)


def _untouched(x: Tensor) -> Tensor:
    return x


def _together(first: nn.Module, norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the two layers compute, in one."""

    def forward(x: Tensor) -> Tensor:
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            scale = norm.weight * scale
        shift = -norm.running_mean * scale
        if norm.bias is not None:
            shift = norm.bias + shift
        if first.bias is not None:
            shift = torch.addcmul(shift, first.bias, scale)
        weight = first.weight * scale.view(-1, *[1] * (first.weight.ndim - 1))
        if isinstance(first, nn.Linear):
            return nn.functional.linear(x, weight, shift)
        return first._conv_forward(x, weight, shift)

    return forward


def _pairs(module: nn.Module) -> Sequence[Names]:
    """The pairs of layers that can be computed in one."""
    layers = dict(module.named_modules())
    structure = tuple((name, type(m)) for name, m in layers.items())
    known = _FOUND.get(module)
    if known is None or known[0] != structure:
        known = _FOUND[module] = (structure, _trace(module))
    return [pair for pair in known[1] if all(_as_written(layers[name]) for name in pair)]


def _trace(module: nn.Module) -> Sequence[Names]:
    try:
        graph = fx.Tracer().trace(module)
    except Exception:
        return []
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = [node.target for node in calls]
    found = []
    for node in calls:
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        first, norm = module.get_submodule(before.target), module.get_submodule(node.target)
        once = times.count(before.target) == times.count(node.target) == 1
        if once and type(first) in _WEIGHTED and type(norm) in _NORMS and norm.running_mean is not None:
            found.append((before.target, node.target))
    return found


def _as_written(layer: nn.Module) -> bool:
    """Whether a layer computes what its class does, and nobody looks at what goes in or out."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return "forward" not in layer.__dict__ and not any(hooks) and not layer.training
