"""One parameter gradient a client, for many clients at once.

Two ways that give the same numbers. `layered` runs all clients' samples through the model as one batch, keeps
each layer's input and the loss's gradient in its output, and forms every client's weight gradient from the two
by batched matrix products (`layer_gradients`). `mapped` is `torch.func.vmap` over `torch.func.grad`: any model whose
forward pass vmap knows, and each client's own batch statistics, at several times the cost (`benchmarks/federated.py`).

Most servers need no rows: see `per_client.sums`.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from mithridate.core.errors import ConfigError, DataError
from mithridate.core.model import answer
from mithridate.core.modes import BatchNormMode, frozen_statistics
from mithridate.core.targets import Criterion
from mithridate.simulation.per_client.layers import obstacle, record, trained_parameters, write_rows

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
        criterion: (logits, targets) -> mean loss, a mean over samples.
        x: Inputs (clients, samples, ...).
        y: Targets (clients, samples, ...).
        mode: BatchNorm: the running statistics (`eval`), or those of each client's own samples (`train`).
        way: How they are computed; see `Way`.
        out: Where to write, (clients, parameters); fresh memory takes most of the time of many small gradients, so a
            caller that works in pieces should give the same tensor again.

    Shape:
        Returns (clients, parameters).

    Raises:
        ConfigError: `layered` was asked for and cannot be done; says why.
        DataError: Clients have too few samples for batch statistics of their own.
    """
    width = sum(p.numel() for p in trained_parameters(module).values())
    rows = x.new_empty(len(x), width) if out is None else out
    clients = max(1, PASS // x.shape[1])
    for pixels, labels, part in zip(*(torch.split(t, clients) for t in (x, y, rows)), strict=True):
        if way != "mapped":
            why_not = obstacle(module, mode) or _layered(module, criterion, pixels, labels, part)
            if not why_not:
                continue
            if way == "layered":
                raise ConfigError(f"per-client gradients, layered: {why_not}; use `mapped`.")
        _mapped(module, criterion, pixels, labels, mode, part)
    return rows


def _places(module: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """Each parameter's columns of the rows, as views."""
    trained = trained_parameters(module)
    pieces = torch.split(rows, [p.numel() for p in trained.values()], dim=1)
    return {name: piece.view(len(rows), *p.shape) for (name, p), piece in zip(trained.items(), pieces, strict=True)}


def _mapped(module: nn.Module, criterion: Criterion, x: Tensor, y: Tensor, mode: BatchNormMode, rows: Tensor) -> None:
    def loss(parameters: dict[str, Tensor], pixels: Tensor, labels: Tensor) -> Tensor:
        return criterion(answer(module, pixels, parameters), labels)

    with frozen_statistics(module, mode):
        try:
            gradients: dict[str, Tensor] = vmap(grad(loss), in_dims=(None, 0, 0))(trained_parameters(module), x, y)
        except ValueError as error:  # what torch raises for a channel with a single value
            if mode == "train":
                raise DataError(
                    f"BatchNorm with each client's own statistics, {x.shape[1]} samples a client: {error}; give "
                    "clients more samples, or use the running statistics."
                ) from error
            raise
    for name, place in _places(module, rows).items():
        place.copy_(gradients.pop(name))


def _layered(module: nn.Module, criterion: Criterion, x: Tensor, y: Tensor, rows: Tensor) -> str:
    """Write the rows; or return why that cannot be done, before anything is written."""
    recorded = record(module, criterion, x, y)
    if isinstance(recorded, str):
        return recorded
    places = _places(module, rows)
    for layer in recorded[0]:
        gradients = {n: places[layer.name + n] for n in ("weight", "bias") if layer.name + n in places}
        write_rows(layer, gradients)
    return ""
