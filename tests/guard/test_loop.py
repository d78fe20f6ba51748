"""A guard in a plain loop: what a refused step leaves behind, bit for bit; both front ends; what it refuses."""

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mithridate.core.batch import Batch
from mithridate.core.defence import Defence, Verdict
from mithridate.core.domain import PIXELS
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.past import Weights
from mithridate.core.registry import build
from mithridate.core.updates import Updates
from mithridate.core.view import View
from mithridate.defences.gate import Gate
from mithridate.guard.loop import Guard, GuardStopped
from mithridate.guard.readings import Readings
from mithridate.guard.record import StepRecord

CLASSES = 4


@dataclass(frozen=True)
class Says(Defence):
    """Refuses, admits or shortens, as it is told for each time that it is asked."""

    words: tuple[bool, ...] = ()
    asked: list[int] = field(default_factory=list)

    def admit(self, before: Weights, view: View) -> Verdict:
        self.asked.append(view.step)
        times = len(self.asked) - 1
        return Verdict(times < len(self.words) and self.words[times], "as it was told")


class Net(nn.Module):
    """Convolution, BatchNorm, dropout and a head; `logits` answers as the models of a hub do."""

    def __init__(self, logits: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 36, CLASSES)
        self.logits = logits

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        x = functional.dropout(self.norm(self.conv(x)).relu().flatten(1), 0.3, self.training)
        out = self.head(x) if scale is None else self.head(x) * scale[:, None]
        return {"logits": out} if self.logits else out


def data(n: int = 16, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    x = torch.rand(n, 1, 8, 8, generator=rng) * 0.3
    x[torch.arange(n), 0, 2 * y, 2 * y] += 0.7
    return Batch(x.clamp(0, 1), y)


OPTIMISERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "sgd-fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "adamw-lr-tensor": lambda p: torch.optim.AdamW(p, torch.tensor(0.01), foreach=False),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
}


class Loop:
    """A user's training loop, with everything that may move in a step.

    Args:
        kind: Of the optimiser.
        way: `plain`, `accumulation`, `autocast`, `scaler`, `compile`, or a schedule: `cosine`, `cycle`.
    """

    def __init__(self, kind: str = "sgd", way: str = "plain") -> None:
        torch.manual_seed(0)
        self.model: nn.Module = Net()
        self.way = way
        self.raw = self.model
        if way == "compile":
            self.model = torch.compile(self.model, backend="eager")  # type: ignore[assignment]
        self.optimiser = OPTIMISERS[kind](self.raw.parameters())
        self.schedule: LRScheduler = ExponentialLR(self.optimiser, 0.9)
        if way == "cosine":
            self.schedule = CosineAnnealingLR(self.optimiser, 10)
        if way == "cycle":
            self.schedule = OneCycleLR(self.optimiser, 0.1, total_steps=20)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        average = get_ema_multi_avg_fn(0.9)  # type: ignore[no-untyped-call]
        self.average = AveragedModel(self.raw, multi_avg_fn=average, use_buffers=True)

    @property
    def also(self) -> list[Any]:
        return [self.schedule, self.scaler, self.average]

    def step(self, batch: Batch) -> None:
        self.optimiser.zero_grad()
        if isinstance(self.optimiser, torch.optim.LBFGS):
            self.optimiser.step(lambda: self._closure(batch))  # type: ignore[no-untyped-call]
        else:
            for part in batch.split(4) if self.way == "accumulation" else [batch]:
                with torch.autocast("cpu", torch.bfloat16, enabled=self.way == "autocast"):
                    loss = functional.cross_entropy(self.model(part.x), part.y)
                torch.autograd.backward(self.scaler.scale(loss) if self.way == "scaler" else loss)
            if self.way == "scaler":
                scale = self.scaler.get_scale()
                self.scaler.step(self.optimiser)
                self.scaler.update()
                if self.scaler.get_scale() < scale:
                    return
            else:
                self.optimiser.step()
        self.schedule.step()
        self.average.update_parameters(self.raw)
        random.random()  # noqa: S311
        np.random.rand()  # noqa: NPY002

    def _closure(self, batch: Batch) -> float:
        self.optimiser.zero_grad()
        loss = functional.cross_entropy(self.model(batch.x), batch.y)
        torch.autograd.backward(loss)
        return float(loss.detach())

    def state(self) -> list[Any]:
        parts = [self.raw, self.optimiser, *self.also]
        draws = [torch.get_rng_state(), random.getstate(), np.random.get_state()]  # noqa: NPY002
        flags = [m.training for m in self.raw.modules()]
        return copy.deepcopy([*(p.state_dict() for p in parts), draws, flags])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor | np.ndarray):
        return bool((torch.as_tensor(a) == torch.as_tensor(b)).all()) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.fixture(autouse=True)
def _generators_as_before() -> Iterator[None]:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    yield
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002


CASES = [(kind, "plain") for kind in OPTIMISERS] + [
    (kind, way)
    for kind in ("sgd", "adamw-fused")
    for way in ("accumulation", "autocast", "scaler", "compile", "cosine", "cycle")
]


@pytest.mark.parametrize("earlier", [0, 2])
@pytest.mark.parametrize("front", ["hooks", "with"])
@pytest.mark.parametrize(("kind", "way"), CASES)
def test_a_refused_step_leaves_everything_as_it_was(kind: str, way: str, front: str, earlier: int) -> None:
    loop = Loop(kind, way)
    guard = Guard(loop.model, loop.optimiser, defence=Says((True,) * earlier), also=loop.also)
    for _ in range(earlier):
        loop.step(data())
    before = loop.state()
    if front == "with":
        with guard.step(data()) as batch:
            loop.step(batch)
    else:
        loop.step(data())
        guard.settle()
        # Hooks see nothing of what a loop draws after its optimiser has stepped.
        loop.state()
    after = loop.state()
    if front == "hooks":
        before[-2], after[-2] = before[-2][:1], after[-2][:1]
    assert (guard.refused, guard.steps) == (1, earlier)
    assert same(before, after)
    loop.step(data())  # and the loop goes on


@pytest.mark.parametrize("front", ["hooks", "with"])
@pytest.mark.parametrize(("kind", "way"), CASES)
def test_a_loop_whose_steps_are_admitted_goes_as_without_a_guard(kind: str, way: str, front: str) -> None:
    plain, guarded = Loop(kind, way), Loop(kind, way)
    torch.manual_seed(1)
    for i in range(3):
        plain.step(data(seed=i))
    torch.manual_seed(1)
    guard = Guard(guarded.model, guarded.optimiser, defence=Says((True,) * 3), also=guarded.also)
    for i in range(3):
        if front == "with":
            with guard.step(data(seed=i)) as batch:
                guarded.step(batch)
        else:
            guarded.step(data(seed=i))
    assert same(plain.state()[:-2], guarded.state()[:-2])
    assert guard.steps == 3


@pytest.mark.parametrize("front", ["hooks", "with"])
def test_an_overflow_that_the_scaler_holds_back_is_no_step_and_the_scale_falls(front: str) -> None:
    for fused in ("sgd", "sgd-fused"):
        loop = Loop(fused, "scaler")
        guard = Guard(loop.model, loop.optimiser, defence=Says((True, True)), also=loop.also)
        huge = Batch(torch.full((16, 1, 8, 8), torch.inf), data().y)
        weights = copy.deepcopy(loop.raw.head.weight)
        if front == "with":
            with guard.step(data()) as _:
                loop.step(huge)
        else:
            loop.step(huge)
        assert torch.equal(weights, loop.raw.head.weight)
        assert loop.scaler.get_scale() == 4.0
        assert guard.steps == 0


def test_a_refused_step_after_an_overflow_does_not_bring_the_scale_back() -> None:
    loop = Loop("sgd", "scaler")
    guard = Guard(loop.model, loop.optimiser, defence=Says(), also=loop.also)
    loop.step(Batch(torch.full((16, 1, 8, 8), torch.inf), data().y))
    loop.step(data())
    guard.settle()
    assert guard.refused == 1
    assert loop.scaler.get_scale() == 4.0


@pytest.mark.parametrize("kind", list(OPTIMISERS))
def test_gradients_that_are_not_finite_move_nothing(kind: str) -> None:
    loop = Loop(kind)
    guard = Guard(loop.model, loop.optimiser, defence=Says((True,) * 9), also=loop.also)
    before = loop.state()
    loop.step(Batch(data().x * torch.nan, data().y))
    guard.settle()
    assert guard.refused == 1
    assert same(before[:2], loop.state()[:2])


def test_a_defence_bounds_the_gradient_that_a_closure_makes() -> None:
    """Lightning hands its whole step to the optimiser as a closure."""

    @dataclass(frozen=True)
    class Halves(Says):
        def bound(self, updates: Updates, view: View) -> Updates:
            return updates.with_rows(updates.rows / 2)

    moved = {}
    for name, defence in {"plain": Says((True,)), "halved": Halves((True,))}.items():
        loop = Loop("sgd")
        Guard(loop.model, loop.optimiser, defence=defence)
        before = loop.raw.head.weight.detach().clone()
        torch.manual_seed(3)
        loop.optimiser.step(partial(loop._closure, data()))
        moved[name] = loop.raw.head.weight.detach() - before
    torch.testing.assert_close(moved["halved"], moved["plain"] / 2)


def test_fused_scaled_gradients_are_bounded_as_they_will_be_used() -> None:
    moved = []
    for way in ("plain", "scaler"):
        loop = Loop("sgd-fused", way)
        Guard(loop.model, loop.optimiser, defence=build("defence", {"name": "clip", "clip_norm": 0.01}))
        before = loop.raw.head.weight.detach().clone()
        torch.manual_seed(3)
        loop.step(data())
        moved.append(loop.raw.head.weight.detach() - before)
    torch.testing.assert_close(*moved)


def test_tied_frozen_and_outside_parameters_are_left_as_they_were() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.frozen = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(self.second(self.first(x).relu()))

    model, temperature = Tied(), nn.Parameter(torch.ones(()))
    optimiser = torch.optim.AdamW([*model.parameters(), temperature], 0.1)
    guard = Guard(model, optimiser, defence=Says())
    before = [p.detach().clone() for p in [*model.parameters(), temperature]]
    loss = functional.cross_entropy(model(torch.randn(8, 6)) * temperature, torch.arange(8) % 6)
    torch.autograd.backward(loss)
    optimiser.step()
    assert guard.refused == 1
    assert same(before, [p.detach() for p in [*model.parameters(), temperature]])
    assert not optimiser.state


def test_a_block_that_raises_leaves_everything_as_it_was() -> None:
    loop = Loop()
    guard = Guard(loop.model, loop.optimiser, defence=Says((True,) * 3), also=loop.also)
    loop.step(data())
    before = loop.state()

    def interrupted() -> None:
        with guard.step(data()) as batch:
            loop.step(batch)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert same(before, loop.state())
    assert guard.steps == 1


@pytest.mark.parametrize("form", ["pair", "list", "mapping", "batch"])
def test_a_batch_comes_back_in_the_form_that_it_had(form: str) -> None:
    torch.manual_seed(0)
    model = Net(logits=form == "mapping")
    optimiser = OPTIMISERS["sgd"](model.parameters())
    guard = Guard(model, optimiser, defence=Says((True,)), domain=PIXELS)
    b = data()
    given: Any = {
        "pair": (b.x, b.y),
        "list": [b.x, b.y],
        "mapping": {"x": b.x, "scale": torch.ones(16), "labels": b.y, "note": "kept"},
        "batch": b,
    }[form]
    with guard.step(given) as batch:
        assert type(batch) is (dict if form == "mapping" else type(given))
        if form == "mapping":
            assert (batch["note"], len(batch["labels"])) == ("kept", 16)
            loss = functional.cross_entropy(model(batch["x"], batch["scale"])["logits"], batch["labels"])
        else:
            loss = functional.cross_entropy(model(batch[0]), batch[1])
        torch.autograd.backward(loss)
        optimiser.step()
    assert guard.steps == 1


@pytest.mark.parametrize("domain", [PIXELS, (0.0, 1.0)], ids=["PIXELS", "pair"])
def test_samples_outside_the_domain_are_left_out_of_a_screened_batch(domain: Any) -> None:
    loop = Loop()
    records: list[StepRecord] = []
    guard = Guard(loop.model, loop.optimiser, defence=Says((True,) * 2), domain=domain, trackers=[Keeps(records)])
    bad = data()
    bad.x[3] = 7.0
    bad.x[4] = torch.nan
    with guard.step(bad) as batch:
        assert batch.size == 14
        loop.step(batch)
    assert records[0].quarantined == 2
    with guard.step(Batch(bad.x + 9, bad.y)) as batch:  # nothing is left: the step is taken back
        assert batch.size
        loop.step(batch)
    assert (records[1].verdict, records[1].quarantined) == ("refused", 16)
    assert guard.steps == 1


@dataclass
class Keeps:
    """Keeps what it is told."""

    records: list[StepRecord]
    closed: int = 0

    def note(self, record: StepRecord) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed += 1


NEEDED: dict[str, dict[str, Any]] = {
    "clip": {},
    "gate": {},
    "skip": {},
    "ema": {},
    "bound_update": {},
    "filter": {},
    "at": {"steps": 1},
    "fat": {"steps": 1},
    "dsc": {"old": "back", "back": 2, "mu": 0.0, "tau": 0.0, "steps": 1},
    "trades": {"steps": 1},
    "mart": {"steps": 1},
    "median_bn": {},
    "promote": {"every": 1},
    "none": {},
}


@pytest.mark.parametrize("name", [*NEEDED, "recommended", "chain"])
def test_every_defence_stands_in_a_loop(name: str) -> None:
    loop = Loop()
    records: list[StepRecord] = []
    table: Any = name if name == "recommended" else {"name": name, **NEEDED.get(name, {})}
    if name == "chain":
        table["parts"] = [{"name": "clip"}, {"name": "dsc", **NEEDED["dsc"]}, {"name": "gate"}, {"name": "ema"}]
    for i in range(30):
        loop.step(data(seed=50 + i))
    guard = Guard(
        loop.model,
        loop.optimiser,
        defence=table,
        trusted=data(40, 9),
        training=[data(40, i) for i in range(20, 23)],
        trackers=[Keeps(records)],
    )
    for i in range(4):
        with guard.step(data(seed=i)) as batch:
            loop.optimiser.zero_grad()
            torch.autograd.backward(guard.loss(batch))
            loop.optimiser.step()
    assert len(records) == 4
    assert guard.steps >= 1
    with guard.serving():
        assert bool(loop.model(data().x).isfinite().all())


def test_training_batches_may_have_the_form_of_the_loops() -> None:
    loop = Loop()
    for i in range(30):
        loop.step(data(seed=50 + i))
    batches = [list(data(40, i)) for i in range(20, 23)]  # as a data loader gives them
    filtering = {"name": "filter", "fpr": 0.2, "fit_samples": 60}
    guard = Guard(loop.model, loop.optimiser, defence=filtering, trusted=data(40, 9), training=batches)
    with guard.step(data()) as batch:
        loop.step(batch)
    assert guard.attempts == 1


def test_a_defence_that_changes_batches_is_told_of_by_the_first_hook() -> None:
    loop = Loop()
    Guard(loop.model, loop.optimiser, defence={"name": "at", "steps": 1})
    with pytest.raises(ConfigError, match=r"guard\.screen"):
        loop.step(data())


def test_a_replay_without_blocks_is_told_of_by_the_first_hook() -> None:
    loop = Loop()
    Guard(loop.model, loop.optimiser, defence=Says(), every=2, replay=loop.step)
    with pytest.raises(ConfigError, match=r"with guard\.step\(batch\)"):
        loop.step(data())


def test_a_loss_of_the_defence_that_was_not_taken_is_told_of() -> None:
    loop = Loop()
    guard = Guard(loop.model, loop.optimiser, defence={"name": "trades", "steps": 1})
    before = loop.state()
    with pytest.raises(ConfigError, match=r"guard\.loss"), guard.step(data()) as batch:
        loop.step(batch)
    assert same(before[:2], loop.state()[:2])


def test_a_gate_takes_back_a_batch_of_flipped_labels_and_lets_clean_ones_be() -> None:
    loop = Loop()
    for i in range(40):
        loop.step(data(seed=i))
    records: list[StepRecord] = []
    Guard(loop.model, loop.optimiser, defence=Gate(reference="best"), trusted=data(80, 99), trackers=[Keeps(records)])
    for i in range(3):
        loop.step(data(seed=100 + i))
    for group in loop.optimiser.param_groups:
        group["lr"] = 5.0
    loop.step(Batch(data().x, (data().y + 1) % CLASSES))
    assert [r.verdict for r in records] == ["admitted"] * 3 + ["refused"]
    assert records[0].trusted_loss is not None
    assert records[3].trusted_loss is not None
    assert records[3].trusted_loss > records[0].trusted_loss
    assert records[3].reason.startswith("gate: ")


def test_a_new_head_learns_in_the_warm_up_and_is_judged_from_there() -> None:
    loop = Loop()
    defence = Says((True,) * 9)
    records: list[StepRecord] = []
    guard = Guard(loop.model, loop.optimiser, defence=defence, warm_up=2, trackers=[Keeps(records)])
    for i in range(3):
        loop.step(data(seed=i))
    assert len(defence.asked) == 1
    assert [r.warm_up for r in records] == [True, True, False]
    assert guard.steps == 3
    loop.step(Batch(data().x * torch.nan, data().y))
    assert guard.refused == 1


@pytest.mark.parametrize("answer", ["warn", "stop", "accept", "call"])
def test_refusals_in_a_row_are_counted_and_said(answer: str, caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    called: list[int] = []

    def call(guard: Guard, record: StepRecord) -> None:
        called.append(record.refusals_in_a_row)

    on: Any = call if answer == "call" else answer
    guard = Guard(loop.model, loop.optimiser, defence=Says(), patience=2, on_refusals=on)
    loop.step(data())
    assert not caplog.records
    if answer == "stop":
        with pytest.raises(GuardStopped, match="2 times in a row"):
            loop.step(data())
        return
    for _ in range(4):
        loop.step(data())
    assert caplog.records
    assert called == ([2, 4] if answer == "call" else [])
    assert guard.refusals_in_a_row == (1 if answer == "accept" else 5)


def test_a_rebase_takes_the_model_as_it_is_for_the_reference() -> None:
    """A stream whose task has changed: refused for ever, until the owner says that it may."""
    loop = Loop()
    for i in range(40):
        loop.step(data(seed=i))

    def other(seed: int) -> Batch:
        return Batch(data(seed=seed).x, (data().y + 1) % CLASSES)

    trusted = Batch(torch.cat([data(40, 99).x]), data(40, 99).y)
    guard = Guard(loop.model, loop.optimiser, defence=Gate(reference="start"), trusted=trusted)
    for group in loop.optimiser.param_groups:
        group["lr"] = 1.0
    loop.step(other(0))
    assert guard.refused == 1
    guard.detach()
    for i in range(10):
        loop.step(other(i))
    guard = Guard(loop.model, loop.optimiser, defence=Gate(reference="start"), trusted=trusted)
    guard.rebase()
    for group in loop.optimiser.param_groups:
        group["lr"] = 0.001
    loop.step(other(1))
    assert guard.refused == 0


@pytest.mark.parametrize("front", ["hooks", "with"])
def test_a_window_of_steps_is_taken_back_as_a_whole(front: str) -> None:
    loop = Loop()
    defence = Says((True, False))
    guard = Guard(loop.model, loop.optimiser, defence=defence, every=3, also=loop.also)

    def step(seed: int) -> None:
        if front == "with":
            with guard.step(data(seed=seed)) as batch:
                loop.step(batch)
        else:
            loop.step(data(seed=seed))

    for i in range(3):
        step(i)
    before = loop.state()
    assert (guard.steps, len(defence.asked)) == (3, 1)
    for i in range(3):
        step(i)
    guard.settle()
    assert (guard.steps, len(defence.asked)) == (3, 2)
    before[-2] = before[-2][: 3 if front == "with" else 1]
    after = loop.state()
    after[-2] = after[-2][: len(before[-2])]
    assert same(before, after)


@pytest.mark.parametrize("front", ["hooks", "with"])
@pytest.mark.parametrize("kind", ["sgd", "sgd-fused"])
def test_a_step_that_a_scaler_holds_back_leaves_the_window_open(kind: str, front: str) -> None:
    loop = Loop(kind, "scaler")
    defence = Says((False,))
    guard = Guard(loop.model, loop.optimiser, defence=defence, every=3, also=loop.also)
    weights = copy.deepcopy(loop.raw.head.weight)
    loop.scaler.scale(torch.zeros(()))  # from here on its scale can be set
    for i, scale in enumerate((8.0, 2.0**127, 8.0, 8.0)):  # gradients overflow at the second
        loop.scaler.update(scale)
        if front == "with":
            with guard.step(data(seed=i)) as batch:
                loop.step(batch)
        else:
            loop.step(data(seed=i))
    assert (len(defence.asked), guard.attempts, guard.steps, guard.refused) == (1, 3, 0, 1)
    assert torch.equal(weights, loop.raw.head.weight)


def test_the_record_of_a_window_counts_all_of_its_steps() -> None:
    loop = Loop()
    records: list[StepRecord] = []
    trackers = [Keeps(records)]
    guard = Guard(loop.model, loop.optimiser, defence=Says((True,)), every=3, domain=PIXELS, trackers=trackers)
    outside = Batch(data().x.clone(), data().y)
    outside.x[0] = 7.0
    for batch in (outside, data(), outside):
        with guard.step(batch) as screened:
            loop.step(screened)
    (record,) = records
    assert (record.attempt, record.step, record.steps, record.quarantined) == (3, 0, 3, 2)
    assert Readings().of(record)["guard/admitted"] == guard.steps == 3


def test_a_window_that_begins_in_the_warm_up_is_not_defended_and_says_so() -> None:
    loop = Loop()
    records: list[StepRecord] = []
    defence = Says((True,))
    Guard(loop.model, loop.optimiser, defence=defence, every=2, warm_up=3, trackers=[Keeps(records)])
    for i in range(6):
        loop.step(data(seed=i))
    assert len(defence.asked) == 1
    assert [record.warm_up for record in records] == [True, True, False]


def test_a_refused_window_is_gone_through_again_and_only_the_culprit_is_lost() -> None:
    loop = Loop()
    for i in range(40):
        loop.step(data(seed=i))
    records: list[StepRecord] = []
    gate = Gate(reference="start", max_accuracy_drop=1.0, max_loss_rise=0.5)
    guard = Guard(
        loop.model,
        loop.optimiser,
        defence=gate,
        trusted=data(80, 99),
        every=4,
        replay=loop.step,
        trackers=[Keeps(records)],
        also=loop.also,
    )
    for i in range(4):
        hostile = Batch(data().x, (data().y + 1) % CLASSES)
        for group in loop.optimiser.param_groups:
            group["lr"] = 0.01
        with guard.step(data(seed=i) if i != 2 else Batch(hostile.x * 1.0, hostile.y)) as batch:
            if i == 2:
                for group in loop.optimiser.param_groups:
                    group["lr"] = 0.01
            loop.step(batch if i != 2 else Batch(batch.x * 60, batch.y))
    assert [r.verdict for r in records].count("refused") <= 1
    assert guard.steps in {3, 4}
    assert guard.attempts == 4


def test_a_resumed_guard_goes_on_as_the_one_that_did_not_end() -> None:
    def run(stop_after: int | None) -> tuple[list[Any], tuple[int, ...]]:
        loop = Loop()
        guard = Guard(loop.model, loop.optimiser, defence="recommended", trusted=data(40, 9), also=loop.also)
        for i in range(6):
            if i == stop_after:
                saved = copy.deepcopy((loop.state(), guard.state_dict()))
                guard.detach()
                loop = Loop()
                for part, state in zip([loop.raw, loop.optimiser, *loop.also], saved[0], strict=False):
                    part.load_state_dict(state)
                guard = Guard(loop.model, loop.optimiser, defence="recommended", trusted=data(40, 9), also=loop.also)
                guard.load_state_dict(saved[1])
                torch.set_rng_state(saved[0][-2][0])
            loop.step(data(seed=i))
        return loop.state()[:-2], (guard.attempts, guard.refused, guard.steps)

    torch.manual_seed(5)
    whole = run(None)
    torch.manual_seed(5)
    resumed = run(3)
    assert same(whole[0], resumed[0])
    assert whole[1] == resumed[1]


def test_evaluation_between_steps_begins_none() -> None:
    loop = Loop()
    guard = Guard(loop.model, loop.optimiser, defence=Says((True,)))
    loop.model.eval()
    loop.model(data().x)
    loop.model.train()
    with torch.no_grad():
        loop.model(data().x)
    before = copy.deepcopy(loop.raw.state_dict())
    loop.raw.load_state_dict({k: v + 1 if v.is_floating_point() else v for k, v in before.items()})
    now = copy.deepcopy(loop.raw.state_dict())
    object.__setattr__(guard.defence, "words", ())
    loop.step(data())
    assert guard.refused == 1
    assert same(loop.raw.state_dict(), now)


class Wrapped(Optimizer):
    """As accelerate wraps an optimiser."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer


def _loop_with(**changed: Any) -> Callable[[], Guard]:
    def make() -> Guard:
        loop = Loop()
        settings: dict[str, Any] = {"model": loop.model, "optimizer": loop.optimiser, "defence": Says()}
        settings |= {k: v(loop) if callable(v) and k not in {"on_refusals"} else v for k, v in changed.items()}
        return Guard(settings.pop("model"), settings.pop("optimizer"), **settings)

    return make


class Meta(Net):
    """A part of it lies elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.far = nn.Linear(2, 2, device="meta")


BAD: dict[str, tuple[Callable[[], Guard], type[Exception], str]] = {
    "another model's optimiser": (
        _loop_with(optimizer=lambda _: torch.optim.SGD(Net().parameters(), 0.1)),
        ConfigError,
        "none of the trainable parameters",
    ),
    "a wrapped optimiser": (_loop_with(optimizer=lambda loop: Wrapped(loop.optimiser)), ConfigError, "give the inner"),
    "no optimiser": (_loop_with(optimizer=None), ConfigError, "needs the optimiser"),
    "two devices": (
        lambda: Guard((m := Meta()), torch.optim.SGD(m.parameters(), 0.1), defence=Says()),
        ConfigError,
        "several devices",
    ),
    "no trusted set": (_loop_with(defence="gate"), ConfigError, "give `trusted`"),
    "an empty trusted set": (_loop_with(defence="gate", trusted=data(0)), DataError, "trusted"),
    "one class": (
        _loop_with(defence="gate", trusted=Batch(data().x, torch.zeros(16, dtype=torch.int64))),
        DataError,
        "class",
    ),
    "another shape": (
        _loop_with(defence="gate", trusted=Batch(torch.rand(16, 3, 9, 9), data().y)),
        DataError,
        "trusted",
    ),
    "a form that nobody knows": (_loop_with(defence="gate", trusted=42), DataError, "inputs from targets"),
    "an unknown defence": (_loop_with(defence="gatte"), ConfigError, "did you mean 'gate'"),
    "a vector": (
        _loop_with(
            defence="gate",
            trusted=data(40),
            criterion=lambda _: lambda z, y: functional.cross_entropy(z, y, reduction="none"),
        ),
        ConfigError,
        "one number",
    ),
    "every 0": (_loop_with(every=0), ConfigError, "every"),
    "a patience that is none": (_loop_with(patience=True), ConfigError, "patience"),
    "an unknown answer": (_loop_with(on_refusals="shout"), ConfigError, "on_refusals"),
    "dsc in windows": (_loop_with(defence={"name": "dsc", **NEEDED["dsc"]}, every=2), ConfigError, "every = 1"),
    "a stateless companion": (_loop_with(also=[3]), ConfigError, "state_dict"),
    "no defence at all": (_loop_with(defence=None), ConfigError, "defence = None: give a defence"),
    "less than no room": (_loop_with(quarantine_bytes=-1), ConfigError, "quarantine_bytes"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_what_cannot_be_guarded_is_refused_before_the_first_step(case: str) -> None:
    make, error, says = BAD[case]
    with pytest.raises(error, match=says):
        make()


def test_a_second_guard_on_an_optimiser_is_refused_until_the_first_leaves() -> None:
    loop = Loop()
    first = Guard(loop.model, loop.optimiser, defence=Says())
    with pytest.raises(ConfigError, match="guarded already"):
        Guard(loop.model, loop.optimiser, defence=Says())
    first.detach()
    Guard(loop.model, loop.optimiser, defence=Says())


def test_a_block_without_a_step_and_one_with_two_are_refused_and_undone() -> None:
    loop = Loop()
    guard = Guard(loop.model, loop.optimiser, defence=Says((True,) * 9))
    before = loop.state()
    with pytest.raises(ConfigError, match=r"without optimizer\.step"), guard.step(data()):
        pass

    def twice() -> None:
        with guard.step(data()) as batch:
            loop.step(batch)
            loop.step(batch)

    with pytest.raises(ConfigError, match="twice"):
        twice()
    with pytest.raises(ConfigError, match="inside guard"), guard.step(data()), guard.step(data()):
        pass
    assert same(before[:2], loop.state()[:2])


def test_trackers_are_closed_when_the_loop_leaves_and_when_it_is_just_gone() -> None:
    for leave in (True, False):
        loop, keeps = Loop(), Keeps([])
        guard = Guard(loop.model, loop.optimiser, defence=Says((True,)), trackers=[keeps])
        loop.step(data())
        if leave:
            guard.detach()
        ledger = guard.ledger
        assert keeps.closed == int(leave)
        ledger._closing()  # as at the interpreter's end
        assert keeps.closed == 1
