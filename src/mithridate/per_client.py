"""One parameter gradient a client, for many clients at once; or only their lengths and sums.

Two ways to the rows give the same numbers. `layered` runs all clients' samples through the model as one batch, keeps
what each layer was fed and the loss's gradient in what it gave, and forms every client's weight gradient from the two
by batched matrix products; it knows the layers below, each used once and alone the owner of its parameters, and needs
samples that do not mix (BatchNorm in eval mode). `mapped` is `torch.func.vmap` over `torch.func.grad`: any model whose
forward pass vmap knows, and each client's own batch statistics, at several times the cost (`benchmarks/federated.py`).

Most servers need no row: the mean of clients' gradients, each shortened to a bound, takes their lengths and a weighted
sum. `summed_gradients` gives these from what the layers were fed and gave, and forms no row where that is cheaper.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Literal, NamedTuple

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

FEW_CHANNELS = 8
"""A CPU's convolutions take channels eight at a time; with fewer, what makes weight gradients is slow."""

SUMMED_PASS = 128
"""The same where no rows are formed, which leaves memory for more."""


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


class _Recorded(NamedTuple):
    """What a layer's gradients are made of.

    Args:
        name: Of the layer, as a prefix of its parameters' names.
        layer: It.
        fed: (clients, samples, ...), its input.
        back: (clients, samples, ...), the gradient of all clients' summed losses in its output; None if that is not
            used.
    """

    name: str
    layer: nn.Module
    fed: Tensor
    back: Tensor | None


def _record(module: nn.Module, criterion: Criterion, x: Tensor, y: Tensor) -> tuple[list[_Recorded], Tensor] | str:
    """Every layer's input and gradient, and the clients' losses; or why it cannot be done."""
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
        losses = torch.stack(
            [criterion(z, labels) for z, labels in zip(torch.split(logits, y.shape[1]), y, strict=True)]
        )
        outputs = torch.autograd.grad(losses.sum(), list(given.values()), allow_unused=True)
    found = [
        _Recorded(
            f"{name}." if name else "",
            layers[name],
            _by_client(fed[name], len(x)),
            None if back is None else _by_client(back, len(x)),
        )
        for name, back in zip(given, outputs, strict=True)
    ]
    return found, losses.detach()


def _layered(module: nn.Module, criterion: Criterion, x: Tensor, y: Tensor, rows: Tensor) -> str:
    """Write the rows; or say why it cannot be done, nothing having been written then."""
    recorded = _record(module, criterion, x, y)
    if isinstance(recorded, str):
        return recorded
    places = _places(module, rows)
    for name, layer, fed, back in recorded[0]:
        own = {n: places[name + n] for n in ("weight", "bias") if name + n in places}
        if back is None:  # computed, and then not used
            for place in own.values():
                place.zero_()
            continue
        _FORMULAE[type(layer)](layer, fed, back, own)
    return ""


class Summed(NamedTuple):
    """What a server needs of some clients' gradients, none of them formed.

    Args:
        total: (parameters,), their sum, each times its factor.
        plain: (parameters,), their sum without factors; `total` itself where there are none, None if not asked for.
        lengths: (clients,), their l2 lengths.
        losses: (clients,), the losses.
    """

    total: Tensor
    plain: Tensor | None
    lengths: Tensor
    losses: Tensor


Factors = Callable[[Tensor], Tensor | None]
"""(clients,) l2 lengths -> (clients,) factors, or None for none."""


def summed_gradients(
    module: nn.Module,
    criterion: Criterion,
    x: Tensor,
    y: Tensor,
    *,
    factors: Factors | None = None,
    apart: Collection[str] = (),
    plain: bool = False,
) -> Summed | str:
    """Lengths of the clients' gradients and their weighted sum (BatchNorm in eval mode), as one batch.

    A layer's gradient of one client is a product of what the layer was fed and of the loss's gradient in what it gave,
    summed over places. Where places are few, its length follows from the inner products of places with each other, and
    the weighted sum over clients is one product: no client's gradient is formed.

    Args:
        module: As in `client_gradients`.
        criterion: As there.
        x: As there; `SUMMED_PASS` samples at a time are a good measure.
        y: As there.
        factors: Gives each client's factor from its length; unset: 1.
        apart: Names of parameters that the lengths given to `factors` do not count and that get no factor.
        plain: Whether to give the sum without factors, too.

    Returns:
        The sums; or why this cannot be done with the model (as for `layered`).

    Source:
        Goodfellow, arXiv:1510.01799 (linear layers); Li et al., ICLR 2022, arXiv:2110.05679, section 4 (inner products
        of places, "ghost clipping"); Bu et al., NeurIPS 2022, arXiv:2205.10683 (convolutions, whichever is cheaper).
    """
    recorded = _obstacle(module, "eval") or _record(module, criterion, x, y)
    if isinstance(recorded, str):
        return recorded
    layers, losses = recorded
    trained = _trained(module)
    squares, measured = x.new_zeros(len(x)), x.new_zeros(len(x))
    pieces: dict[str, _Rows | _Product] = {}
    for layer in layers:
        for name, piece in _pieces(layer, trained).items():
            pieces[name] = piece
            square = piece.squares()
            squares += square
            if name not in apart:
                measured += square
    given = None if factors is None else factors(measured.sqrt())
    total = _laid_out(trained, pieces, given, apart)
    bare = _laid_out(trained, pieces, None, apart) if plain and given is not None else total
    return Summed(total, bare if plain else None, squares.sqrt(), losses)


def _laid_out(
    trained: Mapping[str, Tensor],
    pieces: "Mapping[str, _Rows | _Product]",
    factors: Tensor | None,
    apart: Collection[str],
) -> Tensor:
    """(parameters,), the weighted sums of all parameters end to end; zero for those that the loss does not use."""
    sums = [
        pieces[name].sum(None if name in apart else factors).reshape(-1)
        if name in pieces
        else like.new_zeros(like.numel())
        for name, like in trained.items()
    ]
    return torch.cat(sums)


class _Rows(NamedTuple):
    """A parameter's gradients as rows, (clients, entries)."""

    rows: Tensor

    def squares(self) -> Tensor:
        """(clients,) squared lengths."""
        lengths: Tensor = torch.linalg.vector_norm(self.rows, dim=1)
        return lengths.square()

    def sum(self, factors: Tensor | None) -> Tensor:
        """Over clients, weighted."""
        return self.rows.sum(0) if factors is None else torch.mv(self.rows.T, factors)


class _Product(NamedTuple):
    """A weight's gradients as products over places: of what a layer was fed and of the gradient in what it gave.

    Args:
        layer: A linear layer or a convolution.
        fed: What it was fed.
        back: The gradient in what it gave.
    """

    layer: nn.Linear | nn.Conv2d
    fed: Tensor
    back: Tensor

    def squares(self) -> Tensor:
        """(clients,) squared lengths: |g a^T|^2 is the sum of (a^T a) * (g^T g)."""
        if isinstance(self.layer, nn.Conv2d):
            g = self.back.transpose(1, 2).flatten(2)
            between = _between_patches(self.layer, self.fed, self.back) * torch.bmm(g.transpose(1, 2), g)
        else:
            a, g = (t.flatten(1, -2) for t in (self.fed, self.back))
            between = torch.bmm(a, a.transpose(1, 2)) * torch.bmm(g, g.transpose(1, 2))
        return between.sum((1, 2)).clamp_min(0)  # rounding

    def sum(self, factors: Tensor | None) -> Tensor:
        """Over clients, weighted."""
        layer = self.layer
        back = self.back if factors is None else self.back * factors.view(-1, *[1] * (self.back.ndim - 1))
        if isinstance(layer, nn.Linear):
            return torch.mm(back.flatten(0, -2).T, self.fed.flatten(0, -2))
        a, g = self.fed.flatten(0, 1), back.flatten(0, 1)
        shape, how = layer.weight.shape, (layer.stride, _padding(layer), layer.dilation)
        found: Tensor = conv2d_weight(a, shape, g, *how)  # type: ignore[no-untyped-call]  # torch gives it no types
        return found


def _pieces(recorded: _Recorded, trained: Mapping[str, Tensor]) -> "dict[str, _Rows | _Product]":
    """The gradients of a layer's own parameters, by name."""
    name, layer, fed, back = recorded
    own = {p: trained[name + p] for p in ("weight", "bias") if name + p in trained}
    if back is None:  # computed, and then not used
        return {}
    found: dict[str, _Rows | _Product] = {}
    if "weight" in own and (product := _product(layer, fed, back)) is not None:
        found[name + "weight"] = product
        del own["weight"]
    rows = {p: fed.new_empty(len(fed), *like.shape) for p, like in own.items()}
    _FORMULAE[type(layer)](layer, fed, back, rows)
    return found | {name + p: _Rows(r.flatten(1)) for p, r in rows.items()}


def _product(layer: nn.Module, fed: Tensor, back: Tensor) -> _Product | None:
    """The weight gradients of a layer as products, where these cost less than the rows."""
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return None
    inputs, outputs = layer.weight[0].numel(), len(layer.weight)
    places = back[0].numel() // outputs
    return _Product(layer, fed, back) if places * (inputs + outputs) < inputs * outputs else None


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    assert not isinstance(layer.padding, str)  # noqa: S101  (checked in _obstacle)
    return layer.padding


def _unfolded(layer: nn.Conv2d, fed: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution's patches (clients, inputs * kernel, places) and gradients (clients, outputs, places)."""
    clients, samples = fed.shape[:2]
    how = {"dilation": layer.dilation, "padding": _padding(layer), "stride": layer.stride}
    a = F.unfold(fed.flatten(0, 1), layer.kernel_size, **how)
    a, g = a.reshape(clients, samples, *a.shape[1:]), back.flatten(3)  # (clients, samples, in * k * k, places)
    if samples == 1:
        return a[:, 0], g[:, 0]
    return a.transpose(1, 2).flatten(2), g.transpose(1, 2).flatten(2)


def _between_patches(layer: nn.Conv2d, fed: Tensor, back: Tensor) -> Tensor:
    """(clients, places, places), the inner products of a convolution's patches.

    With stride 1, patches overlap: theirs are sums of the inner products of pixels, as many as the kernel has entries.
    """
    if layer.stride != (1, 1):
        a, _ = _unfolded(layer, fed, back)
        return torch.bmm(a.transpose(1, 2), a)
    down, right = _padding(layer)
    padded = F.pad(fed, (right, right, down, down))
    clients, samples, _, height, width = padded.shape
    pixels = padded.transpose(1, 2).flatten(2)
    each = torch.bmm(pixels.transpose(1, 2), pixels).view(clients, samples, height, width, samples, height, width)
    rows, columns = back.shape[3:]
    total = each.new_zeros(clients, samples, rows, columns, samples, rows, columns)
    for i in range(layer.kernel_size[0]):
        across = _steps(i * layer.dilation[0], rows, 1)
        for j in range(layer.kernel_size[1]):
            along = _steps(j * layer.dilation[1], columns, 1)
            total += each[:, :, across, along, :, across, along]
    return total.flatten(4).flatten(1, 3)


def _losses(criterion: Criterion, logits: Tensor, y: Tensor) -> Tensor:
    """(clients,) each client's loss."""
    if criterion is F.cross_entropy:  # at once: a thousand small calls take a tenth of a round
        return F.cross_entropy(logits, y.flatten(), reduction="none").view(y.shape).mean(1)
    return torch.stack([criterion(z, labels) for z, labels in zip(torch.split(logits, y.shape[1]), y, strict=True)])


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
    if "weight" in own and layer.in_channels < FEW_CHANNELS:
        _by_offsets(layer, fed, back, own["weight"])
    elif "weight" in own and fed.device.type == "cpu" and back[0, 0, 0].numel() >= layer.out_channels:
        # One convolution with a group a client: the samples stay the batch, the clients move beside the channels.
        a, g = (t.transpose(0, 1).flatten(1, 2) for t in (fed, back))
        shape, how = own["weight"].flatten(0, 1).shape, (layer.stride, _padding(layer), layer.dilation, len(fed))
        found = conv2d_weight(a, shape, g, *how)  # type: ignore[no-untyped-call]  # torch gives it no types
        own["weight"].copy_(found.view_as(own["weight"]))
    elif "weight" in own:
        a, g = _unfolded(layer, fed, back)
        torch.bmm(g, a.transpose(1, 2), out=own["weight"].flatten(2))
    if "bias" in own:
        torch.sum(back, (1, 3, 4), out=own["bias"])


def _by_offsets(layer: nn.Conv2d, fed: Tensor, back: Tensor, weight: Tensor) -> None:
    """A convolution's weight gradients, one entry of the kernel after the other: for the few channels of an image."""
    down, right = _padding(layer)
    padded = F.pad(fed, (right, right, down, down))
    rows, columns = back.shape[3:]
    g = back.transpose(1, 2).flatten(2).transpose(1, 2)  # (clients, places, outputs)
    for i in range(layer.kernel_size[0]):
        across = _steps(i * layer.dilation[0], rows, layer.stride[0])
        for j in range(layer.kernel_size[1]):
            along = _steps(j * layer.dilation[1], columns, layer.stride[1])
            a = padded[..., across, along].transpose(1, 2).flatten(2)
            weight[..., i, j].copy_(torch.bmm(a, g).transpose(1, 2))


def _steps(start: int, number: int, step: int) -> slice:
    return slice(start, start + step * (number - 1) + 1, step)


def _batch_norm(layer: nn.Module, fed: Tensor, back: Tensor, own: Mapping[str, Tensor]) -> None:
    assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)  # noqa: S101  (chosen by type)
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None  # noqa: S101  (checked in _obstacle)
    assert var is not None  # noqa: S101
    others = (1, *range(3, back.ndim))
    whole = back.sum(others)
    if "weight" in own:  # of (fed - mean) / deviation, without making it
        own["weight"].copy_(((fed * back).sum(others) - mean * whole) * torch.rsqrt(var + layer.eps))
    if "bias" in own:
        own["bias"].copy_(whole)


def _group_norm(layer: nn.Module, fed: Tensor, back: Tensor, own: Mapping[str, Tensor]) -> None:
    assert isinstance(layer, nn.GroupNorm)  # noqa: S101  (chosen by type)
    others = (1, *range(3, back.ndim))
    if "weight" in own:
        normed = F.group_norm(fed.flatten(0, 1), layer.num_groups, None, None, layer.eps).view_as(fed)
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
