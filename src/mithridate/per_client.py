"""One parameter gradient a client, for many clients at once.

Two ways that give the same numbers. `layered` runs all clients' samples through the model as one batch, keeps what each
layer was fed and the loss's gradient in what it gave, and forms every client's weight gradient from the two by batched
matrix products; it knows the layers below and needs samples that do not mix (BatchNorm in eval mode). `mapped` is
`torch.func.vmap` over `torch.func.grad`: any model whose forward pass vmap knows, and each client's own batch
statistics, at several times the cost (`benchmarks/federated.py`).
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from mithridate.core import BatchNormMode, Criterion, frozen_statistics
from mithridate.errors import ConfigError

Way = Literal["auto", "layered", "mapped"]
"""`auto`: `layered` where every layer is known and BatchNorm is in eval mode, else `mapped`."""

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


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
            a caller that works in chunks should give the same one again.

    Shape:
        Returns (clients, parameters).

    Raises:
        ConfigError: `layered` was asked for and cannot be done: it says why.
    """
    why_not = _obstacle(module, mode)
    if way == "layered" and why_not:
        raise ConfigError(f"per-client gradients, layered: {why_not}; use `mapped`.")
    width = sum(p.numel() for p in _trained(module).values())
    rows = x.new_empty(len(x), width) if out is None else out
    if way == "mapped" or why_not:
        _mapped(module, criterion, x, y, mode, rows)
    else:
        _layered(module, criterion, x, y, rows)
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
        found: dict[str, Tensor] = vmap(grad(loss), in_dims=(None, 0, 0))(_trained(module), x, y)
    for name, place in _places(module, rows).items():
        place.copy_(found.pop(name))


def _obstacle(module: nn.Module, mode: BatchNormMode) -> str:
    """Why the layered way cannot be taken; empty if it can."""
    for name, layer in module.named_modules():
        if not any(p.requires_grad for p in layer.parameters(recurse=False)):
            continue
        kind = next((known for known in _FORMULAE if isinstance(layer, known)), None)
        if kind is None:
            return f"the layer {name} is a {type(layer).__name__}, whose formula is not known"
        if isinstance(layer, _BATCH_NORMS) and (mode == "train" or layer.running_mean is None):
            return f"BatchNorm ({name}) uses batch statistics, which mix samples"
        if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
            return f"the convolution {name} has groups or padding other than zeros"
        if isinstance(layer, nn.Conv2d) and isinstance(layer.padding, str):
            return f"the convolution {name} has its padding given as a word"
    return ""


def _layered(module: nn.Module, criterion: Criterion, x: Tensor, y: Tensor, rows: Tensor) -> None:
    clients = len(x)
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if any(p.requires_grad for p in layer.parameters(recurse=False))
    }
    fed: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if name in fed:
                raise ConfigError(f"per-client gradients, layered: the layer {name} is used twice; use `mapped`.")
            fed[name], given[name] = inputs[0].detach(), output

        return note

    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_hook(watch(name))
            stack.callback(handle.remove)
        stack.enter_context(frozen_statistics(module, "eval"))
        stack.enter_context(torch.enable_grad())
        # A leaf among the inputs, so that every layer's output has a graph although no parameter asks for one.
        pixels = x.flatten(0, 1).detach().requires_grad_()
        buffers = dict(module.named_buffers())
        held = {name: p.detach() for name, p in module.named_parameters()}
        logits = functional_call(module, {**held, **buffers}, (pixels,))
        losses = [criterion(z, labels) for z, labels in zip(logits.split(y.shape[1]), y, strict=True)]
        outputs = torch.autograd.grad(torch.stack(losses).sum(), list(given.values()))
    places = _places(module, rows)
    for name in set(places) - {f"{layer}.{own}" for layer in given for own in ("weight", "bias")}:
        places[name].zero_()  # of a layer that this forward pass does not use
    for (name, layer), back in zip(((n, layers[n]) for n in given), outputs, strict=True):
        formula = next(f for known, f in _FORMULAE.items() if isinstance(layer, known))
        prefix = f"{name}." if name else ""
        own = {n: places[prefix + n] for n in ("weight", "bias") if prefix + n in places}
        formula(layer, _by_client(fed.pop(name), clients), _by_client(back, clients), own)


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
    a = F.unfold(fed.flatten(0, 1), size, dilation=dilation, padding=padding, stride=stride)  # (n, in * k * k, places)
    a, g = a.reshape(clients, samples, *a.shape[1:]), back.flatten(3)
    if "weight" in own:
        weight = own["weight"].flatten(2)
        if samples == 1:
            torch.bmm(g[:, 0], a[:, 0].transpose(1, 2), out=weight)
        else:
            torch.bmm(g.transpose(1, 2).flatten(2), a.transpose(1, 2).flatten(2).transpose(1, 2), out=weight)
    if "bias" in own:
        torch.sum(g, (1, 3), out=own["bias"])


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
        torch.sum(back * normed, others, out=own["weight"])
    if "bias" in own:
        torch.sum(back, others, out=own["bias"])


_FORMULAE: dict[type, Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], None]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.GroupNorm: _group_norm,
}
