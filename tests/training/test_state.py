"""What belongs to a model besides its parameters: statistics, train flags, draws; and what it must not touch."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from mithridate.attacks.accumulative import Accumulative
from mithridate.attacks.pgd import PGD
from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.defence import Defence, Screened
from mithridate.core.domain import PIXELS
from mithridate.core.model import WhiteBox
from mithridate.core.modes import BatchNormMode, in_mode
from mithridate.core.past import Weights
from mithridate.core.view import Need, View
from mithridate.defences.at import AT
from mithridate.testing.toy import toy_learner, toy_stream
from mithridate.training.checkpoint import load_snapshot, save_snapshot
from mithridate.training.learner import Learner

CLASSES = 3


def batch_of(seed: int, n: int = 8) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    return Batch(torch.rand(n, 2, 4, 4, generator=rng), torch.randint(CLASSES, (n,), generator=rng))


class Counting(nn.Module):
    """Counts the passes in a buffer, and gives up the buffer that it had for a new one."""

    passes: Tensor
    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.largest = torch.maximum(self.largest, x.detach().amax())
        return x


class Greedy(nn.Module):
    """Writes to what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(0.5).mul_(2.0)


PARTS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm2d(2),
    "instance norm": lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 2, 1)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Conv2d(2, 2, 1)),
    "counter": Counting,
    "greedy": Greedy,
    "dropout": lambda: nn.Dropout(0.5),
}


def model_of(part: str, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # The first layer is the part: what it does to its input, it does to the caller's.
        return nn.Sequential(PARTS[part](), nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES))


def learner_of(part: str, defence: Defence | None = None, *, seed: int = 0, **options: Any) -> Learner:
    model = model_of(part)
    optimiser = SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Learner(model, optimiser, defence=defence, seed=seed, domain=PIXELS, trusted=batch_of(99), **options)


def state(model: nn.Module) -> dict[str, Any]:
    tensors = {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    return {**tensors, **{f"{name}.training": m.training for name, m in model.named_modules()}}


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return sorted(a.keys() ^ b.keys()) + [
        k for k in a.keys() & b.keys() if not (torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k])
    ]


# Looking.


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("part", PARTS)
def test_whatever_looks_at_a_model_leaves_it_and_the_samples_alone(part: str, mode: BatchNormMode) -> None:
    learner, batch = learner_of(part), batch_of(1)
    learner.update(batch_of(0))
    before, x, draws = state(learner.model), batch.x.clone(), torch.get_rng_state()
    old = Weights.of(learner.model).copied()
    kept = old.copied()
    box = learner.white_box
    with box.objective(mode) as objective:
        first = objective(box.parameters, *batch)
        assert torch.equal(objective(box.parameters, *batch), first), "no pure function"
    box.logits(batch.x, mode)
    old.logits(learner.model, batch.x)
    learner.evaluate([batch])
    view = View(available={Need.MODEL: box, Need.VALIDATION: batch_of(2), Need.TRIGGER: batch_of(3)})
    for attack in (PGD(eps=0.1, steps=2), Accumulative(eps=0.1, steps=1, craft_mode=mode)):
        attack.poison(batch, view, rng=torch.Generator().manual_seed(0))
    assert differing(state(learner.model), before) == []
    assert differing({**old.parameters, **old.buffers}, {**kept.parameters, **kept.buffers}) == []
    assert torch.equal(batch.x, x)
    assert torch.equal(torch.get_rng_state(), draws)


@pytest.mark.parametrize("part", PARTS)
def test_a_step_leaves_the_samples_alone_and_a_failed_one_the_model_too(part: str) -> None:
    class Failing(Defence):
        def loss(self, model: nn.Module, batch: AnyBatch, criterion: Any, view: View) -> Tensor:
            super().loss(model, batch, criterion, view)
            raise FloatingPointError("in the middle")

    learner, batch = learner_of(part, AT(steps=2)), batch_of(1)
    x = batch.x.clone()
    learner.update(batch)
    assert torch.equal(batch.x, x)
    before = state(learner.model)
    learner.defence = Failing()
    with pytest.raises(FloatingPointError):
        learner.update(batch)
    assert differing(state(learner.model), before) == []
    assert torch.equal(batch.x, x)


def test_a_model_that_writes_to_its_input_learns_what_one_that_does_not_would() -> None:
    class Modest(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * (x - 0.5)

    greedy, modest = learner_of("greedy", AT(steps=2)), learner_of("greedy", AT(steps=2))
    modest.model[0] = Modest()  # type: ignore[operator]
    for seed in range(3):
        a, b = greedy.update(batch_of(seed)), modest.update(batch_of(seed))
        assert a.batch_loss == pytest.approx(b.batch_loss, rel=1e-5)


# What is frozen.


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_what_is_frozen_stays_frozen_in_steps_crafting_and_measuring(mode: BatchNormMode) -> None:
    learner = learner_of("batch norm", AT(steps=1), update_mode=mode)
    frozen = learner.model.get_submodule("0").eval()
    seen = []
    frozen.register_forward_hook(lambda module, *_: seen.append(module.training))
    before = {name: b.clone() for name, b in frozen.named_buffers()}
    learner.update(batch_of(0))
    learner.evaluate([batch_of(1)])
    box = learner.white_box
    with box.objective("train") as objective, box.objective("eval"), box.objective("train"):
        objective(box.parameters, *batch_of(2))
    assert len(seen) >= 4
    assert not any(seen)
    assert all(torch.equal(b, before[name]) for name, b in frozen.named_buffers())
    assert learner.model.training
    assert not frozen.training


def test_a_model_that_is_in_eval_mode_as_a_whole_is_not_frozen() -> None:
    learner = learner_of("batch norm")
    learner.model.eval()
    before = {name: b.clone() for name, b in learner.model.named_buffers()}
    learner.update(batch_of(0))
    assert not torch.equal(learner.model.get_buffer("0.running_mean"), before["0.running_mean"])
    assert not any(m.training for m in learner.model.modules())


def test_a_train_method_of_the_models_own_is_called_and_flags_come_back_though_it_fails() -> None:
    class Stubborn(nn.Sequential):
        fails = False

        def train(self, mode: bool = True) -> "Stubborn":
            super().train(mode)
            if self.fails:
                raise FloatingPointError("in the middle")
            self[0].eval()
            return self

    model = Stubborn(nn.BatchNorm2d(2), nn.Dropout(0.5))
    with in_mode(model, "train"):
        assert (model[0].training, model[1].training) == (False, True)
    before = state(model)
    model.fails = True
    with pytest.raises(FloatingPointError), in_mode(model, "eval"):
        pass
    assert differing(state(model), before) == []


@pytest.mark.parametrize("part", ["batch norm", "dropout"])
def test_what_is_frozen_is_part_of_a_snapshot(part: str, tmp_path: Path) -> None:
    whole = learner_of(part)
    whole.model.get_submodule("0").eval()
    whole.update(batch_of(0))
    save_snapshot(tmp_path / "state", whole.snapshot())
    whole.update(batch_of(1))
    resumed = learner_of(part)
    resumed.restore(load_snapshot(tmp_path / "state")[0])
    resumed.update(batch_of(1))
    assert differing(state(resumed.model), state(whole.model)) == []
    assert not resumed.model.get_submodule("0").training


# What is drawn.


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("made", [0, 2])
def test_stopped_and_resumed_gives_the_same_bits(part: str, made: int, tmp_path: Path) -> None:
    whole = learner_of(part)
    for seed in range(made):
        whole.update(batch_of(seed))
    save_snapshot(tmp_path / "state", whole.snapshot())
    for seed in range(made, made + 3):
        whole.update(batch_of(seed))
    torch.rand(7)  # whatever else draws in between
    resumed = learner_of(part)
    resumed.restore(load_snapshot(tmp_path / "state")[0])
    for seed in range(made, made + 3):
        resumed.update(batch_of(seed))
    assert differing(state(resumed.model), state(whole.model)) == []


def test_draws_follow_the_seed_and_the_step_and_no_global_generator() -> None:
    def losses(seed: int) -> list[float]:
        learner = learner_of("dropout", seed=seed)
        with torch.no_grad():  # nothing is learned, so that only draws differ
            for group in learner.optimiser.param_groups:
                group["lr"] = 0.0
        return [learner.update(batch_of(0)).batch_loss for _ in range(3)]

    before = torch.get_rng_state()
    first = losses(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert losses(0) == first
    assert len(set(first)) == 3
    assert losses(1) != first


def test_a_simulated_run_with_dropout_repeats_whatever_was_drawn_before() -> None:
    from mithridate.simulation.online import OnlineRun, run_online

    def trace(noise: int) -> list[tuple[float | None, float | None]]:
        stream = toy_stream()
        learner = toy_learner(stream, epochs=1)
        learner.model = nn.Sequential(nn.Dropout(0.3), learner.model)
        learner.optimiser = SGD(learner.model.parameters(), lr=0.05)
        torch.rand(noise)
        outcome = run_online(
            learner, stream, Accumulative(eps=0.1, steps=1, craft_mode="train"), OnlineRun(steps=2, images=0)
        )
        return [(row["loss"], row["update_norm"]) for row in outcome.trace]

    assert trace(1) == trace(5)


# Optimisers.


class Odd(Optimizer):
    """Keeps whole numbers, doubles, lists and tuples of tensors beside single-precision parameters."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": torch.tensor(0.05), "pair": (0.9, 0.5)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is needed
        for group in self.param_groups:
            assert isinstance(group["pair"], tuple)
            for p in group["params"]:
                if p.grad is None:
                    continue
                own = self.state[p]
                if not own:
                    own["count"] = torch.zeros(p.shape, dtype=torch.int64)
                    own["sum"] = torch.zeros(p.shape, dtype=torch.float64)
                    own["last"] = [torch.zeros_like(p), torch.zeros_like(p)]
                own["count"] += 1
                own["sum"] += p.grad.double() / 3
                own["last"] = [own["last"][1], p.grad.clone()]
                pull = own["sum"] / own["count"] + own["last"][0].double() / 7
                p.sub_((group["lr"] * pull).to(p.dtype))


OPTIMISERS: dict[str, Callable[[Any], Optimizer]] = {
    "odd": Odd,
    "a rate that is a tensor": lambda p: SGD(p, lr=torch.tensor(0.1), momentum=0.9),
    "AdamW": lambda p: AdamW(p, lr=torch.tensor(0.01), amsgrad=True, foreach=False),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("refused", [False, True], ids=["through a file", "after a step was taken back"])
def test_optimisers_whose_state_holds_tensors_go_on_with_the_same_bits(
    name: str, refused: bool, tmp_path: Path
) -> None:
    class Refusing(Defence):
        """Takes the batch marked by its size back."""

        def screen(self, batch: AnyBatch, view: View) -> Screened:
            if batch.size == 5:
                raise FloatingPointError
            return Screened(batch)

    def fresh() -> Learner:
        model = model_of("batch norm")
        return Learner(model, OPTIMISERS[name](model.parameters()), defence=Refusing())

    whole, other = fresh(), fresh()
    for seed in range(3):
        whole.update(batch_of(seed))
    if refused:
        other = whole
        reference = copy.deepcopy((whole.model, whole.optimiser))
        with pytest.raises(FloatingPointError):
            other.update(batch_of(9, n=5))
        whole = Learner(*reference)
    else:
        save_snapshot(tmp_path / "state", whole.snapshot())
        other.restore(load_snapshot(tmp_path / "state")[0])
    for seed in range(3, 6):
        whole.update(batch_of(seed))
        other.update(batch_of(seed))
    assert differing(state(other.model), state(whole.model)) == []


# Compiled models.


def compiled(model: nn.Module) -> nn.Module:
    out: nn.Module = torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
    return out


@pytest.mark.slow
def test_snapshots_of_a_compiled_model_are_those_of_the_model_that_was_compiled(tmp_path: Path) -> None:
    plain = learner_of("batch norm")
    model = compiled(model_of("batch norm"))
    fast = Learner(model, SGD(model.parameters(), lr=0.1, momentum=0.9))
    for seed in range(2):
        plain.update(batch_of(seed))
        fast.update(batch_of(seed))
    snapshot = fast.snapshot()
    assert list(snapshot.parameters) == list(plain.snapshot().parameters)
    save_snapshot(tmp_path / "state", snapshot)
    read = load_snapshot(tmp_path / "state")[0]
    for learner in (plain, fast):
        learner.restore(read)
        assert all(torch.equal(t, snapshot.parameters[name]) for name, t in learner.snapshot().parameters.items())
    assert all(m.training for m in model.modules())
    old = Weights(snapshot.parameters, snapshot.buffers)
    x = batch_of(5).x
    torch.testing.assert_close(old.logits(model, x), old.logits(plain.model, x))
    views = [
        View(available={Need.MODEL: box, Need.VALIDATION: batch_of(2), Need.TRIGGER: batch_of(3)})
        for box in (WhiteBox(model, F.cross_entropy), plain.white_box)
    ]
    a, b = (Accumulative(eps=0.1, steps=1).poison(batch_of(6), v, rng=torch.Generator().manual_seed(0)) for v in views)
    torch.testing.assert_close(a.x, b.x)
