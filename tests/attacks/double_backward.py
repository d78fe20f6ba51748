"""What attacks on the parameter gradient follow, and the plain double backward that it is compared with."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from mithridate.core.batch import Batch
from mithridate.core.view import View
from mithridate.maths.calculus import Slope
from mithridate.maths.directions import Normalise

Gradients = Sequence[Tensor]


def followed(attack: Any, batch: Batch, view: View, monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], Tensor]:
    """The gradient in the pixels of the batch (and of the trigger, if stacked below it) that the last climb follows."""
    functions: list[Callable[[Tensor], Tensor]] = []
    original = type(attack).climb

    def spy(self: Any, x: Tensor, slope_at: Callable[[Tensor], Slope], *args: Any, **options: Any) -> Tensor:
        functions.append(lambda x: slope_at(x).gradient)
        climbed: Tensor = original(self, x, slope_at, *args, **options)
        return climbed

    with monkeypatch.context() as patch:
        patch.setattr(type(attack), "climb", spy)
        attack.poison(batch, view, rng=Generator().manual_seed(0))
    return functions[-1]


def parameter_gradient(model: nn.Module, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters()), create_graph=True))


def naive_unit(g: Gradients, normalise: Normalise) -> list[Tensor]:
    if normalise == "none":
        return list(g)
    if normalise == "tensor":
        return [t / t.norm() if float(t.detach().norm()) > 0 else t for t in g]
    whole = torch.cat([t.flatten() for t in g]).norm()
    return [t / whole for t in g]


def dot(a: Gradients, b: Gradients) -> Tensor:
    return torch.stack([(s * t).sum() for s, t in zip(a, b, strict=True)]).sum()
