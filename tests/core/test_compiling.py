"""A traced inner step is the step itself: for later batches, moved models and other statistics too, or a sentence."""

import copy
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.testing import assert_close

from mithridate.attacks.losses import by_targets
from mithridate.core import compiling
from mithridate.core.compiling import turn_towards_compiled
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.model import PureLoss, WhiteBox
from mithridate.core.modes import BatchNormMode, Precision
from mithridate.maths.alignment import turn_towards
from mithridate.maths.directions import Normalise, Parameters
from mithridate.models import build_model
from mithridate.testing import toy_stream


class Net(nn.Module):
    """Parameters that are trained and one that is not, statistics, and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(64, 5)
        self.act = nn.LeakyReLU(0.1)
        self.head.bias.requires_grad_(False)
        self.register_buffer("scale", torch.full((4, 1, 1), 1.5))
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.scale * self.act(self.norm(self.conv(x)))).flatten(1))
        return out


class Small(nn.Module):
    """What is traced soonest."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.head = nn.LeakyReLU(0.1), nn.Linear(108, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.head(x.flatten(1)))
        return out


def net(cls: Callable[[], nn.Module] = Small) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls().double()
        model(torch.rand(8, 3, 6, 6, dtype=torch.float64))
    return model.eval()


def batch(n: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 6, 6, generator=rng, dtype=torch.float64), torch.randint(5, (n,), generator=rng)


def direction(parameters: Parameters, seed: int = 2) -> Parameters:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=rng, dtype=p.dtype) for name, p in parameters.items()}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """What was traced; it is run as it is."""
    found: list[fx.GraphModule] = []

    def as_it_is(graph: fx.GraphModule, device: torch.device) -> fx.GraphModule:
        found.append(graph)
        return graph

    monkeypatch.setattr(compiling, "_compiled", as_it_is)
    return found


def same_slope(
    model: nn.Module, x: Tensor, y: Tensor, *, mode: BatchNormMode = "eval", box: WhiteBox | None = None, **how: Any
) -> Tensor:
    """The slope of the graph, which is that of the step itself."""
    box = box or WhiteBox(model, F.cross_entropy)
    w = direction(box.parameters)
    precision: Precision = how.pop("precision", "float32")
    with box.objective(mode, precision) as loss:
        found = turn_towards_compiled(loss, box.parameters, x, y, w, **how)
        expected = turn_towards(loss, box.parameters, x, y, w, **how)
    rough: dict[str, Any] = {"rtol": 0.05, "atol": 0.05 * float(expected.gradient.abs().max())}
    tolerance = {} if precision == "float32" else rough
    assert_close(found.gradient, expected.gradient, **tolerance)
    assert_close(found.value, expected.value, **tolerance)
    return found.gradient


@pytest.mark.parametrize(("normalise", "mode"), [("none", "eval"), ("tensor", "eval"), ("global", "train")])
def test_one_graph_serves_later_batches_and_a_model_that_moves(
    graphs: list[fx.GraphModule], normalise: Normalise, mode: BatchNormMode
) -> None:
    model, (x, y) = net(Net), batch()
    slopes = [same_slope(model, x, y, normalise=normalise, mode=mode)]
    state = dict(model.state_dict())
    changes: list[Callable[[], object]] = [
        lambda: x.mul_(0.5),
        lambda: y.copy_((y + 1) % 5),
        lambda: state["conv.weight"].mul_(-1),
        lambda: state["head.bias"].add_(torch.arange(5.0)),
        lambda: state["scale"].mul_(2),
    ]
    if mode == "eval":
        changes += [lambda: state["norm.running_mean"].add_(0.5), lambda: state["norm.running_var"].mul_(3)]
    for change in changes:
        change()
        slopes.append(same_slope(model, x, y, normalise=normalise, mode=mode))
        assert not torch.allclose(slopes[-1], slopes[-2], rtol=1e-3)
    assert len(graphs) == 1


def test_what_decides_the_step_decides_the_graph(graphs: list[fx.GraphModule]) -> None:
    """Size, precision, pieces, criterion, how targets are meant: each a graph of its own, however they alternate."""
    model, (x, y) = net().float(), batch()
    x, box = x.float(), by_targets(WhiteBox(model, F.cross_entropy), "kl")
    probabilities = torch.softmax(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), 1)
    cases: list[tuple[Tensor, dict[str, Any]]] = [
        (y, {"box": box}),
        (y[:3], {"box": box}),  # the last batch may be smaller
        (y, {"box": box, "precision": "bfloat16"}),
        (y, {"box": box, "chunk": 4}),
        (y.unsqueeze(1), {"box": box}),
        (probabilities, {"box": box}),
        (y, {"box": WhiteBox(model, partial(F.cross_entropy, label_smoothing=0.3))}),
    ]
    slopes = [
        [same_slope(model, x[: len(targets)], targets, normalise="none", **how) for targets, how in cases]
        for _ in range(2)
    ]
    assert len(graphs) == len(cases)
    assert all(torch.equal(a, b) for a, b in zip(*slopes, strict=True))
    again = by_targets(WhiteBox(model, F.cross_entropy), "kl")
    same_slope(model, x, y, normalise="none", box=again)
    assert len(graphs) == len(cases)


def test_a_layer_that_was_changed_is_traced_again(graphs: list[fx.GraphModule]) -> None:
    model, (x, y) = net(), batch()
    slopes = [same_slope(model, x, y, normalise="none")]
    model.get_submodule("act").negative_slope = 0.9  # type: ignore[assignment]
    slopes.append(same_slope(model, x, y, normalise="none"))
    model.get_submodule("head").register_forward_hook(lambda _, args, out: out.sin())
    slopes.append(same_slope(model, x, y, normalise="none"))
    assert len(graphs) == 3
    assert not torch.allclose(slopes[0], slopes[1], rtol=1e-3)
    assert not torch.allclose(slopes[1], slopes[2], rtol=1e-3)


class Looking(Small):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if float(out.detach().sum()) > 0 else -out


class Dropping(Small):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x))


class Hiding(Small):
    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.tensor([2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


class Picking(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x[x > 0.5].mean()


class Ordering(Small):
    """Picks by position, which is the same for all data."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(5).flip(0))
        self.order: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, self.order] * torch.tensor(2.0)


class Counting(Small):
    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes = self.passes + 1
        return super().forward(x) * self.passes


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Looking, "looks at its data"),
        (Picking, "depends on its data"),
        (Dropping, "draws random numbers"),
        (Hiding, "neither a parameter nor a buffer"),
        (Counting, "write numbers to its layers"),
    ],
)
def test_a_step_that_is_no_graph_is_refused(cls: type[nn.Module], reason: str, graphs: list[fx.GraphModule]) -> None:
    model, (x, y) = net(cls), batch()
    before = copy.deepcopy(model.state_dict())
    box = WhiteBox(model, F.cross_entropy)
    for _ in range(2):  # nor at the second call
        with pytest.raises(ConfigError, match=f"{cls.__name__} cannot be traced .*{reason}"), box.objective() as loss:
            turn_towards_compiled(loss, box.parameters, x, y, direction(box.parameters), normalise="none")
    assert graphs == []
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with box.objective() as loss:
        turn_towards(loss, box.parameters, x, y, direction(box.parameters), normalise="none")


def test_positions_and_constants_of_a_pass_are_part_of_a_graph(graphs: list[fx.GraphModule]) -> None:
    model = net(Ordering)
    for seed in range(2):
        same_slope(model, *batch(seed=seed), normalise="none")
    assert len(graphs) == 1


def test_a_loss_with_tensors_of_its_own_is_refused(graphs: list[fx.GraphModule]) -> None:
    model, (x, y) = net(), batch()
    box = WhiteBox(model, nn.CrossEntropyLoss(weight=torch.arange(1.0, 6.0, dtype=torch.float64)))
    with pytest.raises(ConfigError, match="its loss, uses a tensor"), box.objective() as loss:
        turn_towards_compiled(loss, box.parameters, x, y, direction(box.parameters), normalise="none")
    assert graphs == []


def test_labels_are_looked_at_before_the_graph_that_cannot(graphs: list[fx.GraphModule]) -> None:
    model, (x, y) = net(), batch()
    same_slope(model, x, y, normalise="tensor")
    y[2] = 5
    box = WhiteBox(model, F.cross_entropy)
    with pytest.raises(DataError, match="the model has 5 outputs"), box.objective() as loss:
        turn_towards_compiled(loss, box.parameters, x, y, direction(box.parameters), normalise="tensor")
    assert len(graphs) == 1


def test_a_graph_keeps_no_model_in_memory(graphs: list[fx.GraphModule]) -> None:
    model = net()
    same_slope(model, *batch(), normalise="tensor")
    steps, alive = len(compiling._STEPS), ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert len(compiling._STEPS) == steps - 1


def test_a_slope_outlives_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a CUDA graph, which writes to the same memory at each call."""

    def played(graph: fx.GraphModule, device: torch.device) -> compiling.Step:
        memory: list[Tensor] = []

        def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            out = graph(*inputs)
            memory[:] = memory or [torch.empty_like(t) for t in out]
            for place, t in zip(memory, out, strict=True):
                place.copy_(t)
            return memory[0], memory[1]

        return run

    monkeypatch.setattr(compiling, "_compiled", played)
    model = net()
    box = WhiteBox(model, F.cross_entropy)

    def slopes(turn: Callable[..., Any], loss: PureLoss) -> list[Any]:
        w = direction(box.parameters)
        return [turn(loss, box.parameters, *batch(seed=seed), w, normalise="none") for seed in range(2)]

    with box.objective() as loss:
        for found, expected in zip(slopes(turn_towards_compiled, loss), slopes(turn_towards, loss), strict=True):
            assert_close(found.gradient, expected.gradient)
            assert_close(found.value, expected.value)


def test_it_is_compiled_although_models_are_taken_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and run at every call."""
    compiled, ran = 0, 0

    def backend(graph: fx.GraphModule, examples: object) -> Callable[..., object]:
        nonlocal compiled
        compiled += 1

        def run(*args: Tensor) -> object:
            nonlocal ran
            ran += 1
            return graph.forward(*args)

        return run

    monkeypatch.setattr(compiling, "BACKEND", backend)
    model = net()
    for seed in range(3):
        same_slope(model, *batch(seed=seed), normalise="none")
    assert (compiled, ran) == (1, 3)


def test_what_the_compiler_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(graph: object, examples: object) -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(compiling, "BACKEND", backend)
    model = net()
    with pytest.raises(ConfigError, match=r"^\[attack\] compile = true: .*no compiler.*C\+\+ compiler"):
        same_slope(model, *batch(), normalise="none")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, where it loads its compiler
@pytest.mark.parametrize("normalise", ["none", "tensor"])
def test_the_compiler_makes_the_same_slope(
    normalise: Normalise, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    stream = toy_stream(0)
    model = build_model({"name": "small_cnn", "width": 4}, stream.info, seed=0)
    box = WhiteBox(model, F.cross_entropy)
    w = direction(box.parameters)
    for seed in range(2):
        x, y = stream.victim_batch(0, seed)
        with box.objective() as loss:
            found = turn_towards_compiled(loss, box.parameters, x[:6], y[:6], w, normalise=normalise)
            expected = turn_towards(loss, box.parameters, x[:6], y[:6], w, normalise=normalise)
        scale = float(expected.gradient.abs().max())
        assert_close(found.gradient, expected.gradient, rtol=1e-4, atol=1e-5 * scale)
        assert_close(found.value, expected.value, rtol=1e-4, atol=1e-5)
