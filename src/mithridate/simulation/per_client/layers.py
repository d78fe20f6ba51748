"""Inputs of a model's layers and the loss's gradients in their outputs, and parameters' gradients from the two.

It works for layers that are each used once and share no parameter, in a pass in which samples do not mix (BatchNorm in
eval mode).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.grad import conv2d_weight

from mithridate.core.model import answer
from mithridate.core.modes import BatchNormMode, frozen_statistics
from mithridate.core.targets import Criterion

FEW_CHANNELS = 8
"""A CPU's convolutions take channels eight at a time; with fewer, computing weight gradients is slow."""


def trained_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that gradients are made of, by name and in the model's order."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


class Recorded(NamedTuple):
    """What the gradients of a layer's parameters are computed from.

    Args:
        name: The layer's name, as a prefix of its parameters' names.
        layer: The layer.
        inputs: (clients, samples, ...).
        grad_output: (clients, samples, ...), the gradient of all clients' summed losses in its output; None if that is
            not used.
    """

    name: str
    layer: nn.Module
    inputs: Tensor
    grad_output: Tensor | None


def _owners(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that hold trained parameters themselves, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if any(p.requires_grad for p in layer.parameters(recurse=False))
    }


def obstacle(module: nn.Module, mode: BatchNormMode) -> str:
    """Why the layered way cannot be taken, as far as it shows before the forward pass; empty if it may be tried."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and (mode == "train" or layer.running_mean is None):
            return f"BatchNorm ({name}) uses batch statistics, which mix samples"
    owners = _owners(module)
    for name, layer in owners.items():
        if type(layer) not in _FORMULAE:  # a subclass may compute anything
            return f"the layer {name} is a {type(layer).__name__}, whose formula is not known"
        if not {parameter for parameter, _ in layer.named_parameters(recurse=False)} <= {"weight", "bias"}:
            return f"the layer {name} has parameters of its own besides weight and bias"
        if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
            return f"the convolution {name} has groups or padding other than zeros"
        if isinstance(layer, nn.Conv2d) and isinstance(layer.padding, str):
            return f"the convolution {name} has its padding given as a word"
    times = Counter(id(p) for layer in owners.values() for p in layer.parameters(recurse=False))
    return "two layers share a parameter" if any(count > 1 for count in times.values()) else ""


def record(module: nn.Module, criterion: Criterion, x: Tensor, y: Tensor) -> tuple[list[Recorded], Tensor] | str:
    """Every layer's input and gradient, and the clients' losses; or why they cannot be recorded."""
    layers = _owners(module)
    inputs: dict[str, Tensor] = {}
    edges: dict[str, GradientEdge] = {}
    odd: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if name in inputs or len(args) != 1 or not output.requires_grad:
                odd.append(name)
                return
            # The place in the graph, not the tensor: what follows may write to that (an in-place ReLU).
            inputs[name], edges[name] = args[0].detach(), get_gradient_edge(output)

        return note

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(watch(name)).remove)
        stack.enter_context(frozen_statistics(module, "eval"))
        stack.enter_context(torch.enable_grad())
        # A leaf among the inputs, so that every layer's output has a graph although no parameter asks for one.
        pixels = x.flatten(0, 1).detach().requires_grad_()
        buffers = dict(module.named_buffers())
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        logits = answer(module, pixels, {**parameters, **buffers})
        if odd or layers.keys() != edges.keys():
            missing = sorted(layers.keys() - edges.keys())
            return f"the layer {(odd or missing)[0]} is not used just once, on one tensor that the loss depends on"
        losses = _losses(criterion, logits, y)
        grad_outputs = torch.autograd.grad(losses.sum(), list(edges.values()), allow_unused=True)
    recorded = [
        Recorded(
            f"{name}." if name else "",
            layers[name],
            _by_client(inputs[name], len(x)),
            None if grad_output is None else _by_client(grad_output, len(x)),
        )
        for name, grad_output in zip(edges, grad_outputs, strict=True)
    ]
    return recorded, losses.detach()


def _losses(criterion: Criterion, logits: Tensor, y: Tensor) -> Tensor:
    """(clients,), each client's mean loss."""
    if criterion is F.cross_entropy and y.shape == (len(logits), 1):
        # A sample each: a single call gives the same bits, and a call a client took a tenth of a small model's round.
        # The mean over no label but one that is ignored (-100) is NaN.
        return F.cross_entropy(logits, y[:, 0], reduction="none") / (y[:, 0] != -100)
    return torch.stack([criterion(z, labels) for z, labels in zip(torch.split(logits, y.shape[1]), y, strict=True)])


def _by_client(t: Tensor, clients: int) -> Tensor:
    return t.reshape(clients, -1, *t.shape[1:])


def write_rows(recorded: Recorded, gradients: Mapping[str, Tensor]) -> None:
    """Write the gradients of a layer's own parameters, a client a row.

    Args:
        recorded: The layer.
        gradients: Where they are written, (clients, ...): `weight`, `bias` or both.
    """
    if recorded.grad_output is None:  # computed, and then not used
        for place in gradients.values():
            place.zero_()
    else:
        _FORMULAE[type(recorded.layer)](recorded.layer, recorded.inputs, recorded.grad_output, gradients)


def padding_of(layer: nn.Conv2d) -> tuple[int, ...]:
    """Zeros on either side: (down, right)."""
    if isinstance(layer.padding, str):
        raise TypeError(f"padding = '{layer.padding}': ask `obstacle` first, which names what has no formula.")
    return layer.padding


def unfolded(layer: nn.Conv2d, inputs: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution's patches (clients, inputs * kernel, places) and gradients (clients, outputs, places)."""
    clients, samples = inputs.shape[:2]
    how = {"dilation": layer.dilation, "padding": padding_of(layer), "stride": layer.stride}
    a = F.unfold(inputs.flatten(0, 1), layer.kernel_size, **how)
    a, g = a.reshape(clients, samples, *a.shape[1:]), grad_output.flatten(3)  # (clients, samples, in * k * k, places)
    if samples == 1:
        return a[:, 0], g[:, 0]
    return a.transpose(1, 2).flatten(2), g.transpose(1, 2).flatten(2)


def _linear(_: nn.Linear, inputs: Tensor, grad_output: Tensor, gradients: Mapping[str, Tensor]) -> None:
    a, g = inputs.flatten(1, -2), grad_output.flatten(1, -2)
    if "weight" in gradients:
        torch.bmm(g.transpose(1, 2), a, out=gradients["weight"])
    if "bias" in gradients:
        torch.sum(g, 1, out=gradients["bias"])


def _convolution(layer: nn.Conv2d, inputs: Tensor, grad_output: Tensor, gradients: Mapping[str, Tensor]) -> None:
    if "weight" in gradients and layer.in_channels < FEW_CHANNELS:
        _by_offsets(layer, inputs, grad_output, gradients["weight"])
    elif "weight" in gradients and inputs.device.type == "cpu" and grad_output[0, 0, 0].numel() >= layer.out_channels:
        # One convolution with a group a client: the samples stay the batch, the clients move beside the channels.
        a, g = (t.transpose(0, 1).flatten(1, 2) for t in (inputs, grad_output))
        weight = gradients["weight"]
        shape, how = weight.flatten(0, 1).shape, (layer.stride, padding_of(layer), layer.dilation, len(inputs))
        weight.copy_(conv2d_weight(a, shape, g, *how).view_as(weight))  # type: ignore[no-untyped-call]  # torch gives it no types
    elif "weight" in gradients:
        a, g = unfolded(layer, inputs, grad_output)
        torch.bmm(g, a.transpose(1, 2), out=gradients["weight"].flatten(2))
    if "bias" in gradients:
        torch.sum(grad_output, (1, 3, 4), out=gradients["bias"])


def _by_offsets(layer: nn.Conv2d, inputs: Tensor, grad_output: Tensor, weight: Tensor) -> None:
    """A convolution's weight gradients, one entry of the kernel after the other: for the few channels of an image."""
    down, right = padding_of(layer)
    padded = F.pad(inputs, (right, right, down, down))
    rows, columns = grad_output.shape[3:]
    g = grad_output.transpose(1, 2).flatten(2).transpose(1, 2)  # (clients, places, outputs)
    for i, j, across, along in kernel_offsets(layer, rows, columns):
        a = padded[..., across, along].transpose(1, 2).flatten(2)
        weight[..., i, j].copy_(torch.bmm(a, g).transpose(1, 2))


def kernel_offsets(layer: nn.Conv2d, rows: int, columns: int) -> Iterator[tuple[int, int, slice, slice]]:
    """Row and column of each entry of a convolution's kernel, and of the padded pixels that it meets.

    Args:
        layer: The convolution.
        rows: Rows of its output.
        columns: Columns of its output.
    """
    down, right = (
        [slice(k * dilation, k * dilation + stride * (length - 1) + 1, stride) for k in range(size)]
        for size, dilation, stride, length in zip(
            layer.kernel_size, layer.dilation, layer.stride, (rows, columns), strict=True
        )
    )
    for i, across in enumerate(down):
        for j, along in enumerate(right):
            yield i, j, across, along


def _batch_norm(
    layer: nn.BatchNorm1d | nn.BatchNorm2d, inputs: Tensor, grad_output: Tensor, gradients: Mapping[str, Tensor]
) -> None:
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        raise TypeError("BatchNorm without running statistics: ask `obstacle` first, which names what has no formula.")
    others = (1, *range(3, grad_output.ndim))
    whole = grad_output.sum(others)
    if "weight" in gradients:  # of (inputs - mean) / deviation, without making it
        gradients["weight"].copy_(((inputs * grad_output).sum(others) - mean * whole) * torch.rsqrt(var + layer.eps))
    if "bias" in gradients:
        gradients["bias"].copy_(whole)


def _group_norm(layer: nn.GroupNorm, inputs: Tensor, grad_output: Tensor, gradients: Mapping[str, Tensor]) -> None:
    others = (1, *range(3, grad_output.ndim))
    if "weight" in gradients:
        normed = F.group_norm(inputs.flatten(0, 1), layer.num_groups, None, None, layer.eps).view_as(inputs)
        torch.sum(normed.mul_(grad_output), others, out=gradients["weight"])  # in place: fresh memory is slow
    if "bias" in gradients:
        torch.sum(grad_output, others, out=gradients["bias"])


_FORMULAE: dict[type, Callable[[Any, Tensor, Tensor, Mapping[str, Tensor]], None]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.GroupNorm: _group_norm,
}
