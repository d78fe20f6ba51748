"""Convolutions that are cheap to differentiate twice: torch's own derivatives, and no pass that nobody asks for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from mithridate.core.model import WhiteBox
from mithridate.maths import calculus, directions
from mithridate.maths.alignment import turn_towards
from mithridate.maths.convolution import CHEAPER_TWICE
from mithridate.maths.elementary import Instead


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


CASES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": (F.conv2d, (2, 3, 6, 6), (4, 3, 3, 3), {}),
    "strided, padded": (F.conv2d, (2, 3, 7, 6), (4, 3, 3, 3), {"stride": 2, "padding": 1}),
    "in two directions": (F.conv2d, (2, 3, 7, 6), (4, 3, 3, 2), {"stride": (2, 1), "padding": (1, 0)}),
    "dilated": (F.conv2d, (2, 3, 8, 8), (4, 3, 3, 3), {"dilation": 2}),
    "in groups": (F.conv2d, (2, 4, 5, 5), (6, 2, 3, 3), {"groups": 2}),
    "by depth": (F.conv2d, (2, 4, 5, 5), (4, 1, 3, 3), {"groups": 4, "padding": 1}),
    "padded by name": (F.conv2d, (2, 3, 6, 6), (4, 3, 3, 3), {"padding": "same"}),
    "one image": (F.conv2d, (3, 6, 6), (4, 3, 3, 3), {}),
    "of a line": (F.conv1d, (2, 3, 9), (4, 3, 3), {"stride": 2}),
    "of a room": (F.conv3d, (1, 2, 4, 4, 4), (3, 2, 2, 2, 2), {"padding": 1}),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_derivatives_of_both_orders_are_torchs_own(case: str, bias: bool) -> None:
    own, shape, weights, options = CASES[case]
    start = [draw(*shape), draw(*weights, seed=1), draw(weights[0], seed=2)][: 3 if bias else 2]
    found = []
    for instead in ({}, CHEAPER_TWICE):
        leaves = [t.clone().requires_grad_() for t in start]
        with Instead(instead):
            out = own(leaves[0], leaves[1], leaves[2] if bias else None, **options)
            first = torch.autograd.grad(out.tanh().sum(), leaves, create_graph=True)
            second = torch.autograd.grad(
                torch.stack([(g.sin() * g).sum() for g in first]).sum(), leaves, materialize_grads=True
            )
        found.append([out, *first, *second])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-11)


class Hyper(nn.Module):
    """A convolution whose weights, or bias, the inputs make."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.make, self.what = nn.Linear(3, 4 * 3 * 3 * 3), what
        self.weight, self.head = nn.Parameter(0.3 * draw(4, 3, 3, 3, seed=3)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        made = self.make(x.mean((0, 2, 3)))
        weight = made.view(4, 3, 3, 3) if self.what == "weights" else self.weight
        bias = made[:4] if self.what == "bias" else None
        out: Tensor = self.head(torch.tanh(F.conv2d(x, weight, bias, padding=1)).mean((2, 3)))
        return out


@pytest.mark.parametrize("what", ["weights", "bias", "neither"])
def test_weights_that_the_inputs_make_have_their_part_in_the_slope(what: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Hyper(what).double()
    box, x, y = WhiteBox(model, F.cross_entropy), draw(5, 3, 4, 4), torch.arange(5) % 3
    w = {name: draw(*p.shape, seed=i) for i, (name, p) in enumerate(box.parameters.items())}
    leaf, p = x.clone().requires_grad_(), {name: t.clone().requires_grad_() for name, t in box.parameters.items()}
    loss = F.cross_entropy(torch.func.functional_call(model, p, (leaf,)), y)
    g = torch.autograd.grad(loss, list(p.values()), create_graph=True, materialize_grads=True)
    expected = torch.autograd.grad(directions.inner(directions.unit(dict(zip(p, g, strict=True)), "tensor"), w), leaf)[
        0
    ]
    with box.objective() as objective:
        found = turn_towards(objective, box.parameters, x, y, w, normalise="tensor").gradient
    assert_close(found, expected, rtol=1e-8, atol=1e-11)


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives it no types
    """Counts convolutions: forward, and each derivative."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.found: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        self.found += sum(args[10][:2]) if name == "convolution_backward" else name == "convolution"
        return func(*args, **(kwargs or {}))


def test_no_pass_is_made_that_nobody_asked_for() -> None:
    """Layers in a row; the first has no slope in the pixels to pass on but at the end, hence fewer here and there."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(5)]
        model = nn.Sequential(*(m for c in layers for m in (c, nn.Tanh())), nn.Flatten(), nn.Linear(48, 3)).double()
    box, x, y = WhiteBox(model, F.cross_entropy), draw(2, 3, 4, 4), torch.arange(2)
    w = {name: draw(*p.shape, seed=i) for i, (name, p) in enumerate(box.parameters.items())}
    counts = {}
    with box.objective() as objective:
        runs: dict[str, Callable[[], object]] = {
            "slope": lambda: turn_towards(objective, box.parameters, x, y, w, normalise="tensor"),
            "curvature": lambda: calculus.hessian_vector_product(objective, box.parameters, x, y, w),
        }
        for name, run in runs.items():
            with Calls() as calls:
                run()
            counts[name] = calls.found
    n = len(layers)
    assert counts["slope"] <= 7 * n
    assert counts["curvature"] <= 9 * n
