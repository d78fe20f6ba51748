"""What a model is looked at through: its answers and its loss as pure functions; and that nothing is moved."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError
from mithridate.core.model import WhiteBox, answer, answering
from mithridate.core.modes import BatchNormMode, frozen_statistics, in_mode, passes_in

MODES: tuple[BatchNormMode, ...] = ("eval", "train")


def rng(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(n: int = 4, *, seed: int = 0) -> Batch:
    x = torch.rand(n, 3, 4, 4, generator=rng(seed))
    return Batch(x, torch.randint(10, (n,), generator=rng(seed + 1)))


# What a model says.


class Saying(nn.Module):
    """Gives its logits in some wrapping."""

    def __init__(self, wrap: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.wrap = wrap

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        logits = x * self.weight[0] + (0.0 if y is None else y * self.weight[1])
        return logits if self.wrap is None else self.wrap(logits)


@pytest.mark.parametrize(
    "wrap",
    [None, lambda z: SimpleNamespace(logits=z), lambda z: {"logits": z, "hidden": z + 1}],
    ids=["tensor", "object", "mapping"],
)
def test_an_answer_is_a_tensor_or_stands_under_logits(wrap: Any) -> None:
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    model = Saying(wrap)
    assert answer(model, x).tolist() == [2.0, 4.0]
    assert answer(model, [x, y]).tolist() == answer(model, (x, y)).tolist() == [32.0, 64.0]
    assert answer(model, {"y": y, "x": x}).tolist() == [32.0, 64.0]
    assert answer(model, x, {"weight": torch.zeros(2)}).tolist() == [0.0, 0.0]
    assert answer(model, {"x": x, "y": y}, {"weight": torch.tensor([1.0, 0.0])}).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("wrap", [lambda z: (z, z), lambda z: {"scores": z}, lambda z: SimpleNamespace(logits=3)])
def test_an_answer_of_another_kind_is_refused(wrap: Any) -> None:
    with pytest.raises(ConfigError, match=r"Saying gives a .*under `\.logits`\. Wrap it"):
        answer(Saying(wrap), torch.ones(2))


# The white box.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.frozen = nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.plain = nn.BatchNorm2d(4, track_running_stats=False)
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(self.frozen(self.norm(self.conv(x))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]  # a module's call is Any to mypy


@pytest.fixture
def net() -> Iterator[Net]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = Net()
        net(torch.rand(16, 3, 4, 4))  # statistics that are not the initial ones
        net.train()
        net.frozen.eval()  # mixed flags, as in fine-tuning
        net.conv.weight.requires_grad_(False)
        yield net


def flags(net: nn.Module) -> dict[str, tuple[bool, bool | None]]:
    return {name: (m.training, getattr(m, "track_running_stats", None)) for name, m in net.named_modules()}


def statistics(net: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in net.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("mode", MODES)
def test_looking_at_a_model_changes_nothing(mode: BatchNormMode, net: Net) -> None:
    before, state = flags(net), statistics(net)
    box, batch = WhiteBox(net, F.cross_entropy), batch_of(8)
    with box.objective(mode) as objective:
        assert {m.training for m in net.modules() if m not in set(net.frozen.modules())} == {mode == "train"}
        assert not any(m.training for m in net.frozen.modules())
        objective(box.parameters, *batch)
    assert flags(net) == before
    assert same(statistics(net), state)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_a_model_is_put_back_after_an_error_too(mode: BatchNormMode, net: Net) -> None:
    before, state = flags(net), statistics(net)
    box = WhiteBox(net, F.cross_entropy)

    def fail() -> None:
        with box.objective(mode) as objective:
            objective(box.parameters, *batch_of(8))
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert flags(net) == before
    assert same(statistics(net), state)


def test_modes_use_different_statistics() -> None:
    """`eval` scores an image by itself, `train` by its company."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10))
    box, batch = WhiteBox(net, F.cross_entropy), batch_of(8)
    losses: dict[str, Tensor] = {}
    for mode in MODES:
        with box.objective(mode) as objective:
            losses[mode] = objective(box.parameters, *batch)
            alone = torch.stack([objective(box.parameters, x[None], y[None]) for x, y in zip(*batch, strict=True)])
        assert torch.allclose(alone.mean(), losses[mode], atol=1e-5) == (mode == "eval")
    net.train()
    expected = F.cross_entropy(net(batch.x), batch.y)
    torch.testing.assert_close(losses["train"], expected)
    assert not torch.allclose(losses["eval"], expected, atol=1e-3)


def test_the_objective_is_a_function_of_the_given_parameters(net: Net) -> None:
    box, batch = WhiteBox(net, F.cross_entropy), batch_of(8)
    moved = {name: p + 0.1 for name, p in box.parameters.items()}
    with box.objective() as objective:
        here, there = objective(box.parameters, *batch), objective(moved, *batch)
    assert float(here) != float(there)
    net.load_state_dict({**net.state_dict(), **moved})
    with box.objective() as objective:
        assert torch.equal(objective(box.parameters, *batch), there)


def test_a_white_box_shows_trainable_parameters_detached(net: Net) -> None:
    shown = WhiteBox(net, F.cross_entropy).parameters
    assert set(shown) == {name for name, p in net.named_parameters()} - {"conv.weight"}
    assert not any(t.requires_grad for t in shown.values())
    assert shown["head.bias"].data_ptr() == net.head.bias.data_ptr()


def test_contexts_nest(net: Net) -> None:
    before = flags(net)
    with frozen_statistics(net, "train"):
        outer = flags(net)
        with frozen_statistics(net, "eval"):
            assert not net.training
        assert flags(net) == outer
    assert flags(net) == before


@pytest.mark.parametrize("mode", MODES)
def test_logits_are_those_of_the_mode_differentiable_in_inputs_and_given_parameters(
    mode: BatchNormMode, net: Net
) -> None:
    before, state = flags(net), statistics(net)
    net.frozen.get_submodule("1").p = 0.0  # type: ignore[assignment]  # no dropout: both passes see the same model
    box, batch = WhiteBox(net, F.cross_entropy), batch_of(8)
    x = batch.x.clone().requires_grad_()
    logits = box.logits(x, mode)
    twin = copy.deepcopy(net).train(mode == "train")
    torch.testing.assert_close(logits, twin(batch.x))
    (slope,) = torch.autograd.grad(logits.square().sum(), x)
    assert float(slope.abs().sum()) > 0
    zero = {name: torch.zeros_like(p) for name, p in box.parameters.items()}
    assert not box.logits(x, mode, parameters=zero).any()
    assert flags(net) == before
    assert same(statistics(net), state)


# Flags.


def test_every_module_gets_its_own_flag_back(net: Net) -> None:
    before = flags(net)
    with in_mode(net, "eval"):
        assert not any(m.training for m in net.modules())
    assert flags(net) == before
    with in_mode(net, "train"):
        frozen = set(net.frozen.modules())
        assert all(m.training is (m not in frozen) for m in net.modules())
        assert net.norm.track_running_stats  # an update records
    assert flags(net) == before


def test_a_white_box_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(WhiteBox(nn.Linear(1, 1), F.cross_entropy), "module", None)  # noqa: B010  (mypy would see it)


class Shared(nn.Module):
    """One BatchNorm at two places, and one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.again, self.second.weight = self.norm, self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.again(self.second(self.norm(self.first(x))))
        return out


def test_a_layer_at_two_places_keeps_its_parameters() -> None:
    """And answers with others in both, as a copy answers that has them."""
    model = Shared().double().eval()
    x = torch.rand(5, 4, dtype=torch.float64)
    before, own = model(x), dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    state = {name: t.detach() + 0.5 for name, t in {**own, **buffers}.items() if t.is_floating_point()}
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, t in {**dict(other.named_parameters()), **dict(other.named_buffers())}.items():
            t.copy_(state.get(name, t))
    assert torch.equal(answer(model, x, state), other(x))
    assert torch.equal(model(x), before)
    now = dict(model.named_parameters())
    assert now.keys() == own.keys()
    assert all(now[name] is p and p.requires_grad for name, p in own.items())
    assert all(t is buffers[name] for name, t in model.named_buffers())
    assert model.second.weight is model.first.weight


@pytest.mark.parametrize(("cls", "shape"), [(Net, (5, 3, 4, 4)), (Shared, (5, 4))])
def test_answers_with_one_set_of_weights_after_another(cls: type[nn.Module], shape: tuple[int, ...]) -> None:
    """Those of `answer` in eval mode, with slopes in the inputs; and the model is as it was, whatever happens."""
    model = cls().double().eval()
    x = torch.rand(shape, generator=Generator().manual_seed(0), dtype=torch.float64)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    states = [{n: t.detach() + s if t.is_floating_point() else t for n, t in own.items()} for s in (0.0, 0.3)]
    expected = [answer(model, x, state).detach() for state in states]
    with answering(model) as run:
        for state, wanted in zip([*states, states[0]], [*expected, expected[0]], strict=True):
            assert torch.allclose(run(state, x), wanted, rtol=1e-10, atol=1e-12)
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(run(states[1], leaf).square().sum(), leaf)
        with pytest.raises(RuntimeError):
            run(states[1], x[:, :2])
    other = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(answer(model, other, states[1]).square().sum(), other)
    assert torch.allclose(slope, wanted, rtol=1e-10, atol=1e-12)
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert now.keys() == own.keys()
    assert all(now[name] is t for name, t in own.items())


@pytest.mark.parametrize(("precision", "allowed"), [("float32", False), ("tf32", True)])
def test_a_gpu_rounds_to_tf32_only_where_it_may(precision: Any, allowed: bool) -> None:
    """The flags are torch's own, and can be set without a GPU."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    with passes_in(precision, torch.device("cuda")):
        assert [backend.allow_tf32 for backend in backends] == [allowed, allowed]
    assert [backend.allow_tf32 for backend in backends] == before
    with passes_in(precision, torch.device("cpu")):
        assert [backend.allow_tf32 for backend in backends] == before


class OnGPU(nn.Linear):
    """Taken for a model on a GPU."""

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        yield SimpleNamespace(device=torch.device("cuda"))


@pytest.mark.parametrize(("precision", "allowed"), [("float32", False), ("tf32", True), ("bfloat16", False)])
def test_so_do_the_backward_passes_of_an_objective(precision: Any, allowed: bool) -> None:
    """They are made after its forward passes, inside the block."""
    before = torch.backends.cudnn.allow_tf32
    with WhiteBox(OnGPU(2, 2), F.cross_entropy).objective("eval", precision):
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == allowed
    assert torch.backends.cudnn.allow_tf32 == before
