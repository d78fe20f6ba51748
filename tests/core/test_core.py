"""What the loop relies on: batches are checked, views grant what was declared, attacks are held to their budget."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import FrozenInstanceError, dataclass, field
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from mithridate.core.attack import Attack
from mithridate.core.batch import PIXELS, TOLERANCE, Batch, check_domain
from mithridate.core.defence import ADMITTED, Defence, Verdict
from mithridate.core.errors import DataError, ThreatModelError
from mithridate.core.model import BatchNormMode, Snapshot, WhiteBox, frozen_statistics
from mithridate.core.updates import Updates
from mithridate.core.view import Need, View
from mithridate.maths.norms import Ball, Norm

MODES: tuple[BatchNormMode, ...] = ("eval", "train")


def rng(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(n: int = 4, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    generator = rng(seed)
    x = torch.rand(n, 3, 4, 4, generator=generator, dtype=dtype)
    return Batch(x, torch.randint(10, (n,), generator=generator))


# Batches.


def test_a_good_batch_passes() -> None:
    check_domain(batch_of(), PIXELS, n_classes=10)
    check_domain(batch_of(1, dtype=torch.float64), PIXELS)


def with_pixel(value: float) -> Batch:
    batch = batch_of()
    batch.x[2, 1, 0, 3] = value
    return batch


def with_labels(labels: Tensor) -> Batch:
    return Batch(batch_of().x, labels)


BAD: dict[str, tuple[Batch, str]] = {
    "empty": (Batch(torch.rand(0, 3, 4, 4), torch.zeros(0, dtype=torch.int64)), "0 in 'inputs' and 0 targets"),
    "lengths": (with_labels(torch.zeros(3, dtype=torch.int64)), "4 in 'inputs' and 3 targets"),
    "one label without its axis": (Batch(torch.rand(4, 2), torch.tensor(0)), "'targets' is a single number"),
    "a column of labels": (
        with_labels(torch.zeros(4, 1, dtype=torch.int64)),
        r"int64 of shape \(4, 1\)",
    ),
    "bytes": (
        Batch(torch.zeros(4, 3, 4, 4, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)),
        "divide bytes by 255",
    ),
    "nan": (with_pixel(torch.nan), "1 of 4 samples hold NaN"),
    "infinite": (with_pixel(-torch.inf), "1 of 4 samples hold NaN or infinity"),
    "too bright": (with_pixel(1.5), r"1\.5\], outside the domain \[0, 1\]"),
    "too dark": (with_pixel(-0.25), r"\[-0\.25, .*outside the domain \[0, 1\]"),
    "normalised outside": (Batch(torch.randn(4, 3, 4, 4), torch.zeros(4, dtype=torch.int64)), "inside the model"),
    "float labels": (with_labels(torch.zeros(4)), r"labels are torch\.float32.*int64"),
    "int32 labels": (with_labels(torch.zeros(4, dtype=torch.int32)), r"labels are torch\.int32"),
    "label too large": (with_labels(torch.tensor([0, 1, 10, 2])), r"\[0, 10\], but the model has 10 classes"),
    "label negative": (with_labels(torch.tensor([0, -1, 3, 2])), r"labels span \[-1, 3\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_batch_is_refused_with_place_and_reason(case: str) -> None:
    batch, reason = BAD[case]
    with pytest.raises(DataError, match=rf"^stream step 3: .*{reason}"):
        check_domain(batch, PIXELS, n_classes=10, where="stream step 3")


def test_class_numbers_are_only_checked_where_the_classes_are_known() -> None:
    check_domain(with_labels(torch.tensor([0, 1, 99, 2])), PIXELS)


@pytest.mark.parametrize(("edge", "sign"), [(0.0, -1), (1.0, 1)])
def test_pixels_may_leave_the_range_by_rounding_only(edge: float, sign: int) -> None:
    check_domain(with_pixel(edge + sign * 0.9 * TOLERANCE), PIXELS)
    with pytest.raises(DataError):
        check_domain(with_pixel(edge + sign * 1.1 * TOLERANCE), PIXELS)


def test_a_batch_moves_as_one() -> None:
    moved = batch_of().to("meta")
    assert (moved.x.device.type, moved.y.device.type) == ("meta", "meta")


# Gradients.

shapes = st.dictionaries(
    st.text("abc.", min_size=1, max_size=4), st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=4
)


@settings(deadline=None)
@given(shapes, st.integers(0, 2**20))
def test_a_gradient_comes_back_by_name(shapes: dict[str, list[int]], seed: int) -> None:
    generator = rng(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    gradient = Updates.of(tensors)
    assert gradient.rows.shape == (1, sum(t.numel() for t in tensors.values()))
    back = gradient.named()
    assert list(back) == list(tensors)
    assert all(torch.equal(back[name], t) and back[name].shape == t.shape for name, t in tensors.items())


def test_a_gradient_is_a_detached_copy() -> None:
    tensors = {"w": torch.ones(2, 2, requires_grad=True), "b": torch.zeros(2)}
    gradient = Updates.of(tensors)
    assert not gradient.rows.requires_grad
    gradient.rows.fill_(5)
    assert float(tensors["w"].detach().max()) == 1


def test_a_transposed_tensor_keeps_its_values() -> None:
    t = torch.arange(6.0).view(2, 3).T
    assert torch.equal(Updates.of({"t": t}).named()["t"], t)


def test_rows_are_clients() -> None:
    one = Updates.of({"w": torch.ones(2, 2), "b": torch.zeros(2)})
    many = one.with_rows(torch.arange(18.0).view(3, 6))
    assert torch.equal(many.named(2)["w"], torch.tensor([[12.0, 13.0], [14.0, 15.0]]))
    assert torch.equal(many.named(2)["b"], torch.tensor([16.0, 17.0]))
    assert torch.equal(one.rows, torch.tensor([[1.0, 1, 1, 1, 0, 0]])), "the first is a value and stays"
    many.named(1)["b"].zero_()
    assert float(many.rows[1, 4:].sum()) == 0, "named() gives views"


# Views.

PROPERTIES: dict[Need, Callable[[View], Any]] = {
    Need.MODEL: lambda view: view.model,
    Need.VALIDATION: lambda view: view.validation,
    Need.TRIGGER: lambda view: view.clean_trigger,
    Need.ACCURACY: lambda view: view.accuracy,
    Need.TRUSTED: lambda view: view.trusted,
    Need.HISTORY: lambda view: view.history,
    Need.TRAINING: lambda view: view.training,
    Need.SURROGATE: lambda view: view.surrogate,
}


@pytest.fixture
def things() -> dict[Need, Any]:
    return {need: object() for need in Need}


@pytest.mark.parametrize("need", list(Need))
def test_a_view_shows_what_was_declared_and_nothing_else(need: Need, things: dict[Need, Any]) -> None:
    assert set(PROPERTIES) == set(Need)
    view = View(available=things, granted=frozenset({need}), owner="the attack pgd")
    assert PROPERTIES[need](view) is things[need]
    for other in set(Need) - {need}:
        with pytest.raises(ThreatModelError, match=f"the attack pgd looked at the {other}.*`needs`"):
            PROPERTIES[other](view)


@pytest.mark.parametrize("need", list(Need))
def test_a_declared_need_that_nobody_supplies_is_named(need: Need, things: dict[Need, Any]) -> None:
    del things[need]
    with pytest.raises(ThreatModelError, match=f"the defence x needs the {need}, and .* none"):
        PROPERTIES[need](View(available=things, granted=frozenset({need}), owner="the defence x"))


def test_every_view_has_notes_of_its_own() -> None:
    View().memory["a"] = torch.zeros(1)
    assert View().memory == {}


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
        assert {m.training for m in net.modules()} == {mode == "train"}
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


# The guard around every attack.


@dataclass(frozen=True, kw_only=True)
class Scripted(Attack):
    """Does what a test tells it, and counts the calls."""

    do: Callable[[Batch, Tensor], Tensor] = lambda batch, mask: (batch.x + 0.1).clamp(0, 1)
    eps: float = 0.1
    norm: Norm = "linf"
    share: float = 1.0
    calls: list[str] = field(default_factory=list)

    @property
    def ball(self) -> Ball:
        return Ball(self.norm, self.eps)

    @property
    def ratio(self) -> float:
        return self.share

    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        self.calls.append("craft")
        return self.do(batch, mask)


class WithTrigger(Scripted):
    def craft_trigger(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        self.calls.append("trigger")
        return (batch.x - 0.1).clamp(0, 1)


def changed(before: Batch, after: Batch) -> list[int]:
    return [i for i in range(len(before.x)) if not torch.equal(before.x[i], after.x[i])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_poisoned_batch_keeps_its_form(dtype: torch.dtype) -> None:
    batch = batch_of(dtype=dtype)
    before = Batch(batch.x.clone(), batch.y.clone())
    poisoned = Scripted().poison(batch, View(), rng=rng())
    assert torch.equal(poisoned.x, (before.x + 0.1).clamp(0, 1))
    assert poisoned.x.dtype == dtype
    assert not poisoned.x.requires_grad
    assert torch.equal(poisoned.y, before.y)
    assert torch.equal(batch.x, before.x)


def test_the_trigger_has_its_own_craft_and_falls_back_on_the_common_one() -> None:
    batch = batch_of()
    for attack, expected in ((Scripted(), "craft"), (WithTrigger(), "trigger")):
        attack.trigger(batch, View(), rng=rng())
        assert attack.calls == [expected]
    assert torch.equal(WithTrigger().trigger(batch, View(), rng=rng()).x, (batch.x - 0.1).clamp(0, 1))


def push(amount: float) -> Callable[[Batch, Tensor], Tensor]:
    """One pixel of one sample moves away from 1/2 by `amount`, inside [0, 1]."""

    def do(batch: Batch, mask: Tensor) -> Tensor:
        x = batch.x.clone()
        x[1, 0, 0, 0] = 0.5 + amount
        return x

    return do


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("moment", ["poison", "trigger"])
def test_an_attack_that_leaves_its_ball_is_stopped(norm: Norm, moment: str) -> None:
    batch = Batch(torch.full((4, 3, 4, 4), 0.5), torch.zeros(4, dtype=torch.int64))
    getattr(Scripted(do=push(0.0999), norm=norm), moment)(batch, View(), rng=rng())
    with pytest.raises(AssertionError, match=f"Scripted left its {norm} ball of radius 0.1"):
        getattr(Scripted(do=push(0.101), norm=norm), moment)(batch, View(), rng=rng())


def in_place(batch: Batch, mask: Tensor) -> Tensor:
    return batch.x.add_(0.2).clamp_(0, 1)


def relabel(batch: Batch, mask: Tensor) -> Tensor:
    batch.y.zero_()
    return batch.x


def unmask(batch: Batch, mask: Tensor) -> Tensor:
    mask.fill_(True)
    return (batch.x + 0.1).clamp(0, 1)


def test_writing_in_place_does_not_get_round_the_guard() -> None:
    batch = batch_of()
    before = Batch(batch.x.clone(), batch.y.clone())
    with pytest.raises(AssertionError, match="left its linf ball"):
        Scripted(do=in_place).poison(batch, View(), rng=rng())
    assert torch.equal(Scripted(do=relabel).poison(batch, View(), rng=rng()).y, before.y)
    assert len(changed(batch, Scripted(do=unmask, share=0.5).poison(batch, View(), rng=rng()))) == 2
    assert torch.equal(batch.x, before.x)
    assert torch.equal(batch.y, before.y)


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda batch, mask: batch.x.double(), r"torch.float64 \(4, 3, 4, 4\)"),
        (lambda batch, mask: batch.x[:1], r"\(1, 3, 4, 4\) of torch.float32 \(4, 3, 4, 4\)"),
        (lambda batch, mask: batch.x.mean((2, 3), keepdim=True), r"\(4, 3, 1, 1\)"),
    ],
)
def test_another_dtype_or_shape_is_stopped(do: Callable[[Batch, Tensor], Tensor], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        Scripted(do=do).poison(batch_of(), View(), rng=rng())


def test_pixels_outside_the_range_and_bad_input_are_refused() -> None:
    bright = Batch(torch.ones(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DataError, match="batch made by Scripted"):
        Scripted(do=lambda batch, mask: batch.x + 0.1).poison(bright, View(), rng=rng())
    attack = Scripted()
    with pytest.raises(DataError, match="batch given to Scripted"):
        attack.poison(Batch(bright.x + 1, bright.y), View(), rng=rng())
    assert attack.calls == []


@pytest.mark.parametrize("nothing", [{"eps": 0.0}, {"share": 0.0}, {"share": 0.01}])
@pytest.mark.parametrize("moment", ["poison", "trigger"])
def test_no_budget_is_the_identity_and_nothing_is_crafted(nothing: dict[str, float], moment: str) -> None:
    batch = batch_of(10)
    attack = WithTrigger(**nothing)  # type: ignore[arg-type]  # numbers, whatever their names
    found = getattr(attack, moment)(batch, View(), rng=rng())
    assert torch.equal(found.x, batch.x)
    assert torch.equal(found.y, batch.y)
    assert attack.calls == []


@settings(deadline=None)
@given(st.integers(1, 30), st.fractions(0, 1, max_denominator=40).map(float), st.integers(0, 1000))
def test_the_ratio_counts_samples_and_their_positions_stay(n: int, share: float, seed: int) -> None:
    attack, view, generator = WithTrigger(share=share), View(), rng(seed)
    first = changed(batch_of(n), attack.poison(batch_of(n), view, rng=generator))
    assert abs(len(first) - share * n) <= 0.5 + 1e-9
    assert changed(batch_of(n, seed=1), attack.poison(batch_of(n, seed=1), view, rng=generator)) == first
    assert changed(batch_of(n, seed=2), attack.trigger(batch_of(n, seed=2), view, rng=generator)) == first
    resumed = View(memory={k: t.clone() for k, t in view.memory.items()})
    assert changed(batch_of(n), attack.poison(batch_of(n), resumed, rng=rng(seed + 1))) == first


def test_positions_are_drawn_by_the_given_generator() -> None:
    batch, attack = batch_of(40), Scripted(share=0.5)
    first, second, again = (changed(batch, attack.poison(batch, View(), rng=rng(s))) for s in (0, 1, 0))
    assert first == again
    assert first != second


# Defences.


def test_a_defence_that_overrides_nothing_is_the_identity() -> None:
    batch, gradient = batch_of(), Updates.of({"w": torch.ones(2)})
    view = View(granted=frozenset())
    assert Defence().screen(batch, view) is batch
    assert Defence().bound(gradient, view) is gradient
    verdict = Defence().admit(Snapshot({}, {}, {}, 0), view)
    assert verdict == ADMITTED == Verdict(admit=True, reason="")
    assert Defence.needs == frozenset()


def test_values_are_frozen() -> None:
    values: list[Any] = [
        View(),
        Updates.of({"w": torch.ones(1)}),
        Snapshot(MappingProxyType({}), {}, {}, 0),
        WhiteBox(nn.Linear(1, 1), F.cross_entropy),
    ]
    for value in values:
        with pytest.raises(FrozenInstanceError):
            setattr(value, next(iter(value.__dataclass_fields__)), None)


def test_an_attack_says_what_it_sees_and_when_it_stops() -> None:
    assert Scripted().needs == frozenset()
    assert Scripted().ready(View()) is False
    assert Scripted().weight_momentum is None
    assert Attack.__abstractmethods__ == {"ball", "ratio", "craft"}
