"""Lengths and weighted sums of clients' gradients, without forming the gradients.

Most servers need no more: the mean of clients' gradients, each shortened to a bound, takes their lengths and a weighted
sum, and both follow from the layers' inputs and the loss's gradients in their outputs.
"""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from mithridate.core.targets import Criterion
from mithridate.maths.norms import by_row
from mithridate.simulation.per_client.layers import (
    Recorded,
    kernel_offsets,
    obstacle,
    padding_of,
    record,
    trained_parameters,
    unfolded,
    write_rows,
)

SUMMED_PASS = 128
"""Samples that go through the model at once: more than where rows are formed, which take most of the memory."""


class Summed(NamedTuple):
    """What a server needs to know of some clients' gradients, which are not formed.

    Args:
        total: (parameters,), their sum, each times its factor.
        unweighted: (parameters,), their sum without factors (`total` itself if there are none); None unless asked for.
        lengths: (clients,), their l2 lengths.
        losses: (clients,), their mean losses.
    """

    total: Tensor
    unweighted: Tensor | None
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
    unmeasured: Collection[str] = (),
    unweighted: bool = False,
) -> Summed | str:
    """Lengths of the clients' gradients and their weighted sum (BatchNorm in eval mode), as one batch.

    A layer's gradient of one client is a product of the layer's input and of the loss's gradient in its output, summed
    over places. Where places are few, its length follows from the inner products of places with each other, and
    the weighted sum over clients is one product: no client's gradient is formed.

    Args:
        module: The model; parameters, buffers, flags and `.grad` are left alone.
        criterion: (logits, targets) -> mean loss, a mean over samples.
        x: Inputs (clients, samples, ...); best `SUMMED_PASS` samples at a time.
        y: Targets (clients, samples, ...).
        factors: Gives each client's factor from its length; unset: 1.
        unmeasured: Names of parameters that do not count in the lengths given to `factors`, and get no factor.
        unweighted: Whether to return the sum without factors, too.

    Returns:
        The sums; or why the model allows none (see `layers.obstacle`).

    Source:
        Goodfellow, arXiv:1510.01799 (linear layers); Li et al., ICLR 2022, arXiv:2110.05679, section 4 (inner products
        of places, "ghost clipping"); Bu et al., NeurIPS 2022, arXiv:2205.10683 (convolutions, whichever is cheaper).
    """
    recorded = obstacle(module, "eval") or record(module, criterion, x, y)
    if isinstance(recorded, str):
        return recorded
    layers, losses = recorded
    trained = trained_parameters(module)
    squares, measured = x.new_zeros(len(x)), x.new_zeros(len(x))
    pieces: dict[str, _Rows | _Product] = {}
    for layer in layers:
        for name, piece in _pieces(layer, trained).items():
            pieces[name] = piece
            square = piece.squares()
            squares += square
            if name not in unmeasured:
                measured += square
    row_factors = None if factors is None else factors(measured.sqrt())
    total = _laid_out(trained, pieces, row_factors, unmeasured)
    bare = _laid_out(trained, pieces, None, unmeasured) if unweighted and row_factors is not None else total
    return Summed(total, bare if unweighted else None, squares.sqrt(), losses)


def _laid_out(
    trained: Mapping[str, Tensor],
    pieces: "Mapping[str, _Rows | _Product]",
    factors: Tensor | None,
    unmeasured: Collection[str],
) -> Tensor:
    """(parameters,), the weighted sums of all parameters end to end; zero for those that the loss does not use."""
    sums = [
        pieces[name].sum(None if name in unmeasured else factors).reshape(-1)
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
        """The sum over clients, each times its factor."""
        return self.rows.sum(0) if factors is None else torch.mv(self.rows.T, factors)


class _Product(NamedTuple):
    """A weight's gradients as products over places: of a layer's input and of the gradient in its output.

    Args:
        layer: A linear layer or a convolution.
        inputs: Its input.
        grad_output: The gradient in its output.
    """

    layer: nn.Linear | nn.Conv2d
    inputs: Tensor
    grad_output: Tensor

    def squares(self) -> Tensor:
        """(clients,) squared lengths: |g a^T|^2 is the sum of (a^T a) * (g^T g)."""
        if isinstance(self.layer, nn.Conv2d):
            g = self.grad_output.transpose(1, 2).flatten(2)
            between = _between_patches(self.layer, self.inputs, self.grad_output) * torch.bmm(g.transpose(1, 2), g)
        else:
            a, g = (t.flatten(1, -2) for t in (self.inputs, self.grad_output))
            between = torch.bmm(a, a.transpose(1, 2)) * torch.bmm(g, g.transpose(1, 2))
        return between.sum((1, 2)).clamp_min(0)  # rounding

    def sum(self, factors: Tensor | None) -> Tensor:
        """The sum over clients, each times its factor."""
        layer = self.layer
        grad_output = self.grad_output if factors is None else self.grad_output * by_row(factors, self.grad_output)
        if isinstance(layer, nn.Linear):
            return torch.mm(grad_output.flatten(0, -2).T, self.inputs.flatten(0, -2))
        a, g = self.inputs.flatten(0, 1), grad_output.flatten(0, 1)
        shape, how = layer.weight.shape, (layer.stride, padding_of(layer), layer.dilation)
        weight: Tensor = conv2d_weight(a, shape, g, *how)  # type: ignore[no-untyped-call]  # torch gives it no types
        return weight


def _pieces(recorded: Recorded, trained: Mapping[str, Tensor]) -> "dict[str, _Rows | _Product]":
    """The gradients of a layer's own parameters, by name."""
    name, layer, inputs, grad_output = recorded
    if grad_output is None:  # computed, and then not used
        return {}
    parameters = {p: trained[name + p] for p in ("weight", "bias") if name + p in trained}
    pieces: dict[str, _Rows | _Product] = {}
    if "weight" in parameters and (product := _product(layer, inputs, grad_output)) is not None:
        pieces[name + "weight"] = product
        del parameters["weight"]
    rows = {p: inputs.new_empty(len(inputs), *like.shape) for p, like in parameters.items()}
    write_rows(recorded, rows)
    return pieces | {name + p: _Rows(r.flatten(1)) for p, r in rows.items()}


def _product(layer: nn.Module, inputs: Tensor, grad_output: Tensor) -> _Product | None:
    """The weight gradients of a layer as products, where these cost less than the rows."""
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return None
    fan_in, fan_out = layer.weight[0].numel(), len(layer.weight)
    places = grad_output[0].numel() // fan_out
    return _Product(layer, inputs, grad_output) if places * (fan_in + fan_out) < fan_in * fan_out else None


def _between_patches(layer: nn.Conv2d, inputs: Tensor, grad_output: Tensor) -> Tensor:
    """(clients, places, places), the inner products of a convolution's patches.

    With stride 1, patches overlap: theirs are sums of the inner products of pixels, as many as the kernel has entries.
    """
    if layer.stride != (1, 1):
        a, _ = unfolded(layer, inputs, grad_output)
        return torch.bmm(a.transpose(1, 2), a)
    down, right = padding_of(layer)
    padded = F.pad(inputs, (right, right, down, down))
    clients, samples, _, height, width = padded.shape
    pixels = padded.transpose(1, 2).flatten(2)
    each = torch.bmm(pixels.transpose(1, 2), pixels).view(clients, samples, height, width, samples, height, width)
    rows, columns = grad_output.shape[3:]
    total = each.new_zeros(clients, samples, rows, columns, samples, rows, columns)
    for _, _, across, along in kernel_offsets(layer, rows, columns):
        total += each[:, :, across, along, :, across, along]
    return total.flatten(4).flatten(1, 3)
