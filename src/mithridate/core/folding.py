"""BatchNorm in eval mode as part of the layer before it: fewer passes over the activations, in every derivative."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from mithridate.maths.norms import by_row

Weighted = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

Names = tuple[str, str]
"""Of a convolution or linear layer, and of the BatchNorm that alone sees its outputs."""

_FOUND: WeakKeyDictionary[nn.Module, tuple[object, Sequence[Names]]] = WeakKeyDictionary()


@contextmanager
def folded(module: nn.Module, *, once: bool = False) -> Iterator[None]:
    """Let a model in eval mode compute each convolution and the BatchNorm after it in one, inside the block.

    The scale of BatchNorm is multiplied into the weights at every pass, from the parameters and buffers of that pass,
    so that derivatives in all of them are what they were, to rounding. A model whose layers torch.fx cannot trace (one
    that looks at its data, say), and a pair that anything is hooked to, are computed as they are.

    Args:
        module: In eval mode; comes back as it was.
        once: Multiply once for every set of weights that the model is given inside the block, not at every pass, if no
            derivative in these is asked for: of a few images that is a fifth of a pass.

    Source:
        Jacob et al., CVPR 2018, arXiv:1712.05877, section 3.2, for the folded weights.
    """
    pairs = _pairs(module)
    try:
        for first, norm in pairs:
            object.__setattr__(first, "forward", _together(first, norm, once=once))
            object.__setattr__(norm, "forward", _untouched)
        yield
    finally:
        for pair in pairs:
            for m in pair:
                m.__dict__.pop("forward", None)


def _untouched(x: Tensor) -> Tensor:
    return x


def _together(first: Weighted, norm: Norm, *, once: bool) -> Callable[[Tensor], Tensor]:
    """What the two layers compute, in one."""
    known: dict[tuple[tuple[int, int], ...], tuple[Sequence[Tensor | None], tuple[Tensor, Tensor]]] = {}

    def weights() -> tuple[Tensor, Tensor]:
        read = (first.weight, first.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        if not once or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in read)):
            return _folded_weights(first, norm)
        place = tuple((id(t), 0 if t is None else t._version) for t in read)
        if place not in known:  # with what was read, so that no other tensor can take its place
            known[place] = (read, _folded_weights(first, norm))
        return known[place][1]

    def forward(x: Tensor) -> Tensor:
        weight, shift = weights()
        if isinstance(first, nn.Linear):
            return nn.functional.linear(x, weight, shift)
        out: Tensor = first._conv_forward(x, weight, shift)
        return out

    return forward


def _folded_weights(first: Weighted, norm: Norm) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one layer that computes what the two do."""
    assert norm.running_mean is not None and norm.running_var is not None  # noqa: S101, PT018  (`_trace` looked)
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else norm.weight * scale
    shift = -norm.running_mean * scale
    shift = shift if norm.bias is None else norm.bias + shift
    shift = shift if first.bias is None else torch.addcmul(shift, first.bias, scale)
    return first.weight * by_row(scale, first.weight), shift


def _pairs(module: nn.Module) -> Sequence[tuple[Weighted, Norm]]:
    """The pairs of layers that can be computed in one."""
    layers = dict(module.named_modules())
    structure = tuple((name, type(m)) for name, m in layers.items())
    known = _FOUND.get(module)
    if known is None or known[0] != structure:
        known = _FOUND[module] = (structure, _trace(module, layers))
    found = ((layers[first], layers[norm]) for first, norm in known[1])
    return [
        (first, norm)
        for first, norm in found
        if isinstance(first, Weighted) and isinstance(norm, Norm) and _as_written(first) and _as_written(norm)
    ]


def _trace(module: nn.Module, layers: Mapping[str, nn.Module]) -> Sequence[Names]:
    if not any(isinstance(m, Norm) for m in layers.values()):  # a large language model, say: nothing to copy it for
        return []
    try:
        graph = fx.Tracer().trace(copy.deepcopy(module))  # what its layers write to themselves stays in the copy
    except Exception:  # a model may raise whatever it likes when it is given no tensor
        return []
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(str(node.target) for node in calls)
    found = []
    for node in calls:
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        names = str(before.target), str(node.target)
        first, norm = (layers.get(name) for name in names)
        exact = type(first) in get_args(Weighted) and type(norm) in get_args(Norm)  # a subclass may compute otherwise
        if exact and times[names[0]] == times[names[1]] == 1 and getattr(norm, "running_mean", None) is not None:
            found.append(names)
    return found


def _as_written(layer: nn.Module) -> bool:
    """Whether a layer computes what its class does, and nobody looks at what goes in or out."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return "forward" not in layer.__dict__ and not any(hooks) and not layer.training
