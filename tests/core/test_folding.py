"""BatchNorm folded into the layer before it: the same model, and the same derivatives of every order."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from mithridate.core.folding import folded
from mithridate.core.model import WhiteBox
from mithridate.data import dataset_info
from mithridate.maths import calculus, directions
from mithridate.maths.alignment import turn_towards
from mithridate.models import build_model


class Residual(nn.Module):
    """A convolution whose outputs go to BatchNorm and past it, so that nothing can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return torch.relu(self.norm(z) + z)


class Looking(nn.Module):
    """A model that looks at its data, so that it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.norm(self.conv(x))
        return torch.relu(z) if float(x.detach().sum()) > 0 else z


def twice() -> nn.Module:
    """One BatchNorm after two convolutions."""
    norm = nn.BatchNorm2d(3)
    return nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.Conv2d(3, 3, 1), norm)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: build_model({"name": "resnet18", "width": 4}, dataset_info("cifar10"), seed=0), 20),
    "small_cnn": (lambda: build_model({"name": "small_cnn", "width": 4}, dataset_info("cifar10"), seed=0), 4),
    "with bias, without affine": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4, affine=False), nn.Tanh()),
        1,
    ),
    "padded by reflection, in groups": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, groups=3, padding=1, padding_mode="reflect", bias=False), nn.BatchNorm2d(6), nn.Tanh()
        ),
        1,
    ),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5), nn.BatchNorm1d(5), nn.Tanh()), 1),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), 0),
    "without running statistics": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        0,
    ),
    "outputs used twice": (Residual, 0),
    "BatchNorm used twice": (twice, 0),
    "looks at its data": (Looking, 0),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A model whose statistics are those of some batches."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = MODELS[name][0]()
        body = model if name in {"resnet18", "small_cnn"} else nn.Sequential(model, nn.Flatten(), nn.LazyLinear(3))
        body = body.double()
        x = torch.rand(6, 3, *[32 if name == "small_cnn" else 8] * 2, dtype=torch.float64)
        for _ in range(3):
            body(x + 0.3 * torch.randn_like(x))
    return body.eval(), x


def calls(model: nn.Module, x: Tensor) -> int:
    """Calls of BatchNorm's own function in one pass."""
    found = 0

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204  (torch's protocol)
            nonlocal found
            found += func is F.batch_norm
            return func(*args, **(kwargs or {}))

    with Counting():
        model(x)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_answer_is_the_same_and_so_is_the_model_afterwards(name: str) -> None:
    model, x = made(name)
    before, plain, state = model(x), calls(model, x), {k: t.clone() for k, t in model.state_dict().items()}
    with folded(model):
        assert_close(model(x), before, rtol=1e-10, atol=1e-12)
        assert calls(model, x) == plain - MODELS[name][1]
    assert calls(model, x) == plain
    assert torch.equal(model(x), before)
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_derivatives_of_every_order_are_the_same(name: str) -> None:
    """With what `objective` folds, against the model as it is written."""
    model, x = made(name)
    y = torch.arange(len(x)) % 3
    box = WhiteBox(model, F.cross_entropy)
    rng = torch.Generator().manual_seed(2)
    v = {n: torch.randn(p.shape, generator=rng, dtype=p.dtype) for n, p in box.parameters.items()}

    def as_written(p: directions.Parameters, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, p, (x,)), y)

    with box.objective() as objective:
        found = everything(objective, box, x, y, v)
    expected = everything(as_written, box, x, y, v)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=1e-7, atol=1e-10)


def everything(f: calculus.Objective, box: WhiteBox, x: Tensor, y: Tensor, v: directions.Parameters) -> list[Tensor]:
    """First, second and mixed derivatives."""
    p = box.parameters
    out = list(calculus.gradient(f, p, x, y).values())
    out += calculus.hessian_vector_product(f, p, x, y, v).values()
    out += calculus.curved(f, p, x, y).curvature(v).values()
    for normalise in ("none", "tensor"):
        out.append(turn_towards(f, p, x, y, v, normalise=normalise).gradient)
    return [*out, calculus.mixed_partial_of_curvature(f, p, x, y, v, v)]


def test_what_is_folded_once_follows_the_weights() -> None:
    """Other weights, the same ones written to, and derivatives in them are those of the model as it is."""
    model, x = made("small_cnn")
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    for p in model.parameters():
        p.requires_grad_(False)
    with folded(model, once=True):
        for change in (lambda: None, lambda: norm.weight.mul_(2), lambda: norm.running_var.add_(1)):  # type: ignore[union-attr]
            change()
            expected = as_it_is(model, x)
            for _ in range(2):
                assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
        norm.weight = nn.Parameter(norm.weight * 3)
        assert_close(model(x), as_it_is(model, x), rtol=1e-10, atol=1e-12)
        (slope,) = torch.autograd.grad(model(x).square().sum(), norm.weight)
    (wanted,) = torch.autograd.grad(model(x).square().sum(), norm.weight)
    assert_close(slope, wanted, rtol=1e-10, atol=1e-12)


def as_it_is(model: nn.Module, x: Tensor) -> Tensor:
    """The answer of a copy whose layers compute what is written."""
    apart = copy.deepcopy(model)
    for m in apart.modules():
        m.__dict__.pop("forward", None)
    out: Tensor = apart(x).detach()
    return out


def test_a_layer_that_somebody_listens_to_is_left_alone() -> None:
    model, x = made("small_cnn")
    seen: list[Tensor] = []
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    handle = norm.register_forward_hook(lambda _, args, out: seen.append(out))
    plain = calls(model, x)
    with folded(model):
        assert calls(model, x) == plain - 3
    handle.remove()
    expected = seen[0]
    assert_close(seen[-1], expected, rtol=1e-10, atol=1e-12)


def test_a_model_that_is_rebuilt_is_looked_at_again() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    x = torch.rand(2, 3, 8, 8)
    with folded(model):
        assert calls(model, x) == 0
    model[1] = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)).eval()
    with folded(model):
        assert_close(model(x), model[1](model[0](x)))
        assert calls(model, x) == 1


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model, x = made("small_cnn")
    plain = calls(model, x)
    with pytest.raises(RuntimeError, match="inside"), folded(model):
        raise RuntimeError("inside")
    assert calls(model, x) == plain


class Counting(nn.Module):
    """A layer that remembers its passes, and writes to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("passes", torch.zeros(()))
        self.passes: Tensor
        self.last: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.passes = self.passes + 1
        self.last = self.norm(self.conv(x))
        return self.last


def test_looking_for_pairs_writes_nothing_to_the_model() -> None:
    model = Counting().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with folded(model):
        assert calls(model, torch.rand(2, 3, 8, 8)) == 0
    assert float(model.passes) == 1
    model.passes.zero_()
    assert isinstance(model.last, Tensor)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


COPIES: list[str] = []


class Uncopied(nn.Module):
    """A model that is not to be copied, such as one that fills half of the memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def __deepcopy__(self, memo: object) -> nn.Module:
        COPIES.append("copied")
        return self

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


def test_a_model_without_batch_norm_is_not_copied() -> None:
    model, x = Uncopied().eval(), torch.rand(2, 3, 8, 8)
    with folded(model):
        assert torch.equal(model(x), model.conv(x))
    assert not COPIES
