"""One parameter gradient a client, for many clients at once.

Two ways that give the same numbers. `layered` runs all clients' samples through the model as one batch, keeps what each
layer was fed and the loss's gradient in what it gave, and forms every client's weight gradient from the two by batched
matrix products; it knows the layers below, each used once and alone the owner of its parameters, and needs samples that
do not mix (BatchNorm in eval mode). `mapped` is
`torch.func.vmap` over `torch.func.grad`: any model whose forward pass vmap knows, and each client's own batch
statistics, at several times the cost (`benchmarks/federated.py`).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, grad, vmap
from torch.nn.grad import conv2d_weight

from mithridate.core import BatchNormMode, Criterion, frozen_statistics
from mithridate.errors import ConfigError, DataError

Way = Literal["auto", "layered", "mapped"]
"""`auto`: `layered` where that can be done, else `mapped`."""

PASS = 64
"""Samples that go through the model at once, unless one client has more: bounds memory."""


def client_gradients(
    module: nn.Module,
    criterion: Criterion,
    x: Tensor,
    y: Tensor,
    *,
    mode: BatchNormMode = "eval",
    way: Way = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """The loss gradient of each client, a row each: parameters laid end to end, in the model's order.

    Args:
        module: The model; parameters, buffers, flags and `.grad` are left alone.
        criterion: (logits, labels) -> mean loss, a mean over samples.
        x: Pixels (clients, samples, channels, height, width).
        y: Labels (clients, samples).
        mode: BatchNorm: the running statistics (`eval`), or those of each client's own samples (`train`).
        way: How; see `Way`.
        out: Where to write, (clients, parameters); most of the time of many small gradients goes into fresh memory, so
            a caller that works in pieces should give the same one again.

    Shape:
        Returns (clients, parameters).

    Raises:
        ConfigError: `layered` was asked for and cannot be done: it says why.
        DataError: Clients have too few samples for batch statistics of their own.
    """
    width = sum(p.numel() for p in _trained(module).values())
    rows = x.new_empty(len(x), width) if out is None else out
    clients = max(1, PASS // x.shape[1])
    for pixels, labels, part in zip(*(torch.split(t, clients) for t in (x, y, rows)), strict=True):
        if way != "mapped":
            why_not = _obstacle(module, mode) or _layered(module, criterion, pixels, labels, part)
            if not why_not:
                continue
            if way == "layered":
                raise ConfigError(f"per-client gradients, layered: {why_not}; use `mapped`.")
        _mapped(module, criterion, pixels, labels, mode, part)
    return rows


def _trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def _places(module: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """Each parameter's columns of the rows, as views."""
    trained = _trained(module)
    pieces = torch.split(rows, [p.numel() for p in trained.values()], dim=1)
    return {name: piece.view(len(rows), *p.shape) for (name, p), piece in zip(trained.items(), pieces, strict=True)}


def _mapped(module: nn.Module, criterion: Criterion, x: Tensor, y: Tensor, mode: BatchNormMode, rows: Tensor) -> None:
    def loss(parameters: dict[str, Tensor], pixels: Tensor, labels: Tensor) -> Tensor:
        return criterion(functional_call(module, parameters, (pixels,)), labels)

    with frozen_statistics(module, mode):
        try:
            found: dict[str, Tensor] = vmap(grad(loss), in_dims=(None, 0, 0))(_trained(module), x, y)
        except ValueError as error:  # torch's word on a channel with a single value
            if mode == "train":
                raise DataError(
                    f"BatchNorm with each client's own statistics, {x.shape[1]} samples a client: {error}; give "
                    "clients more samples, or use the running statistics."
                ) from error
            raise
    for name, place in _places(module, rows).items():
        place.copy_(found.pop(name))


def _owners(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that hold trained parameters themselves, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if any(p.requires_grad for p in layer.parameters(recurse=False))
    }


def _obstacle(module: nn.Module, mode: BatchNormMode) -> str:
    """Why the layered way cannot be taken; empty if nothing is known before the forward pass."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and (mode == "train" or layer.running_mean is None):
            return f"BatchNorm ({name}) uses batch statistics, which mix samples"
    for name, layer in _owners(module).items():
        if type(layer) not in _FORMULAE:  # a subclass may compute anything
            return f"the layer {name} is a {type(layer).__name__}, whose formula is not known"
        if not {own for own, _ in layer.named_parameters(recurse=False)} <= {"weight", "bias"}:
            return f"the layer {name} has parameters of its own besides weight and bias"
        if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
            return f"the convolution {name} has groups or padding other than zeros"
        if isinstance(layer, nn.Conv2d) and isinstance(layer.padding, str):
            return f"the convolution {name} has its padding given as a word"
    times = Counter(id(p) for layer in _owners(module).values() for p in layer.parameters(recurse=False))
    return "two layers share a parameter" if any(count > 1 for count in times.values()) else ""


def _layered(module: nn.Module, criterion: Criterion, x: Tensor, y: Tensor, rows: Tensor) -> str:
    """Write the rows; or say why it cannot be done, nothing having been written then."""
    layers = _owners(module)
    fed: dict[str, Tensor] = {}
    given: dict[str, GradientEdge] = {}
    odd: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if name in fed or len(inputs) != 1 or not output.requires_grad:
                odd.append(name)
                return
            # The place in the graph, not the tensor: what follows may write to that (an in-place ReLU).
            fed[name], given[name] = inputs[0].detach(), get_gradient_edge(output)

        return note

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(watch(name)).remove)
        stack.enter_context(frozen_statistics(module, "eval"))
        stack.enter_context(torch.enable_grad())
        # A leaf among the inputs, so that every layer's output has a graph although no parameter asks for one.
        pixels = x.flatten(0, 1).detach().requires_grad_()
        buffers = dict(module.named_buffers())
        held = {name: p.detach() for name, p in module.named_parameters()}
        logits = functional_call(module, {**held, **buffers}, (pixels,))
        if odd or layers.keys() != given.keys():
            missing = sorted(layers.keys() - given.keys())
            return f"the layer {(odd or missing)[0]} is not used just once, on one tensor that the loss depends on"
        losses = [criterion(z, labels) for z, labels in zip(logits.split(y.shape[1]), y, strict=True)]
        outputs = torch.autograd.grad(torch.stack(losses).sum(), list(given.values()), allow_unused=True)
    places = _places(module, rows)
    for (name, layer), back in zip(((n, layers[n]) for n in given), outputs, strict=True):
        prefix = f"{name}." if name else ""
        own = {n: places[prefix + n] for n in ("weight", "bias") if prefix + n in places}
        if back is None:  # computed, and then not used
            for place in own.values():
                place.zero_()
            continue
        _FORMULAE[type(layer)](layer, _by_client(fed.pop(name), len(x)), _by_client(back, len(x)), own)
    return ""


def _by_client(t: Tensor, clients: int) -> Tensor:
    return t.reshape(clients, -1, *t.shape[1:])


def _linear(layer: nn.Module, fed: Tensor, back: Tensor, own: Mapping[str, Tensor]) -> None:
    a, g = fed.flatten(1, -2), back.flatten(1, -2)
    if "weight" in own:
        torch.bmm(g.transpose(1, 2), a, out=own["weight"])
    if "bias" in own:
        torch.sum(g, 1, out=own["bias"])


def _convolution(layer: nn.Module, fed: Tensor, back: Tensor, own: Mapping[str, Tensor]) -> None:
    assert isinstance(layer, nn.Conv2d)  # noqa: S101  (chosen by type)
    padding = layer.padding
    assert not isinstance(padding, str)  # noqa: S101  (checked in _obstacle)
    clients, samples = fed.shape[:2]
    size, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if "weight" in own and fed.device.type == "cpu" and back[0, 0, 0].numel() >= layer.out_channels:
        # One convolution with a group a client: the samples stay the batch, the clients move beside the channels.
        a, g = (t.transpose(0, 1).flatten(1, 2) for t in (fed, back))
        shape = own["weight"].flatten(0, 1).shape
        found = conv2d_weight(  # type: ignore[no-untyped-call]  # torch gives it no types
            a, shape, g, stride=stride, padding=padding, dilation=dilation, groups=clients
        )
        own["weight"].copy_(found.view_as(own["weight"]))
    elif "weight" in own:
        a = F.unfold(fed.flatten(0, 1), size, dilation=dilation, padding=padding, stride=stride)
        a, g = a.reshape(clients, samples, *a.shape[1:]), back.flatten(3)  # (clients, samples, in * k * k, places)
        if samples == 1:
            a, g = a[:, 0], g[:, 0]
        else:
            a, g = a.transpose(1, 2).flatten(2), g.transpose(1, 2).flatten(2)
        torch.bmm(g, a.transpose(1, 2), out=own["weight"].flatten(2))
    if "bias" in own:
        torch.sum(back, (1, 3, 4), out=own["bias"])


def _batch_norm(layer: nn.Module, fed: Tensor, back: Tensor, own: Mapping[str, Tensor]) -> None:
    assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)  # noqa: S101  (chosen by type)
    mean, var = layer.running_mean, layer.running_var
    normed = F.batch_norm(fed.flatten(0, 1), mean, var, None, None, training=False, eps=layer.eps)
    _scale_and_shift(normed.view_as(fed), back, own)


def _group_norm(layer: nn.Module, fed: Tensor, back: Tensor, own: Mapping[str, Tensor]) -> None:
    assert isinstance(layer, nn.GroupNorm)  # noqa: S101  (chosen by type)
    normed = F.group_norm(fed.flatten(0, 1), layer.num_groups, None, None, layer.eps)
    _scale_and_shift(normed.view_as(fed), back, own)


def _scale_and_shift(normed: Tensor, back: Tensor, own: Mapping[str, Tensor]) -> None:
    others = (1, *range(3, back.ndim))
    if "weight" in own:
        torch.sum(normed.mul_(back), others, out=own["weight"])  # in place: fresh memory is slow
    if "bias" in own:
        torch.sum(back, others, out=own["bias"])


_FORMULAE: dict[type, Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], None]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.GroupNorm: _group_norm,
}
