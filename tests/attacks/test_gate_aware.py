"""The attacker who knows of the gate: its rehearsal is the victim's step, and what it sends passes."""

import copy
import math
from statistics import median
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from mithridate.attacks import gate_aware
from mithridate.attacks.accumulative import Accumulative
from mithridate.attacks.gate_aware import GateAware, rehearsed
from mithridate.attacks.pgd import PGD
from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError
from mithridate.core.model import WhiteBox
from mithridate.core.registry import build, config_of
from mithridate.core.tolerance import quality
from mithridate.core.view import Need, View
from mithridate.data.stream import Stream
from mithridate.defences.gate import Gate
from mithridate.simulation.online import OnlineRun, run_online
from mithridate.simulation.run import Outcome, Progress
from mithridate.testing import toy_learner, toy_stream
from mithridate.training.learner import Learner

STREAM = toy_stream(0)
VALIDATION = STREAM.validation.all()
LR = 0.05
RUN = OnlineRun(steps=4, lr=LR)
INNER: dict[str, Any] = {"name": "accumulative", "steps": 2, "trigger_update": "after_step"}
TOLERANCE: dict[str, Any] = {"max_loss_rise": 0.02, "max_accuracy_drop": 0.1}
SHARED: dict[str, Any] = {"eps": 0.2, "inner": INNER, "victim_lr": LR, **TOLERANCE}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def view_of(learner: Learner, attack: GateAware, memory: dict[str, Any] | None = None) -> View:
    things = {
        Need.MODEL: learner.white_box,
        Need.VALIDATION: Batch(VALIDATION.x.to(next(learner.model.parameters()).dtype), VALIDATION.y),
        Need.TRIGGER: STREAM.trigger_batch(3, 0),
        Need.ACCURACY: (0.9, 0.9),
    }
    return View(learner.step, {} if memory is None else memory, things, attack.needs)


def gated(stream: Stream = STREAM, *, momentum: float = 0.9, lr: float = LR, **tolerance: Any) -> Learner:
    """A victim behind a gate that trusts just what the attacker measures on."""
    learner = toy_learner(stream, seed=stream.settings.seed, defence=Gate(**tolerance))
    learner.optimiser = SGD(learner.model.parameters(), lr=lr, momentum=momentum)
    learner.trusted = stream.validation.all()
    return learner


# The rehearsal.


@pytest.mark.parametrize(("weight_decay", "forget"), [(0.0, False), (0.01, True)])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_rehearsed_step_is_the_victims(mode: Any, weight_decay: float, forget: bool) -> None:
    """Parameters and buffers, with a momentum that is only inferred, and across a step that was rolled back."""
    learner = toy_learner(STREAM, dtype=torch.float64)
    learner.optimiser = SGD(learner.model.parameters(), lr=LR, momentum=0.9, weight_decay=weight_decay)
    learner.update_mode = mode
    attack = GateAware(**SHARED, victim_weight_decay=weight_decay, update_mode=mode, forget_momentum=forget)
    view = view_of(learner, attack)
    apart = []
    for i in range(5):
        batch = STREAM.victim_batch(i, 0)
        batch = Batch(batch.x.double(), batch.y)
        buffer = attack._momentum(view)
        twin = rehearsed(learner.white_box, batch, buffer, lr=LR, momentum=0.9, weight_decay=weight_decay, mode=mode)
        without = rehearsed(learner.white_box, batch, {}, lr=LR, momentum=0.9, weight_decay=weight_decay, mode=mode)
        before = learner.snapshot()
        learner.update(batch)
        state = learner.model.state_dict()
        for name, value in twin.state_dict().items():
            assert float((value - state[name]).abs().max()) < 1e-12, (i, name)
        apart.append(
            max(
                float((p - state[n]).abs().max())
                for n, p in without.state_dict().items()
                if "weight" in n or "bias" in n
            )
        )
        if i == 2:
            learner.restore(before)  # as a gate does
            if forget:
                learner.optimiser.state.clear()
    assert apart[0] < 1e-12  # a fresh optimiser has no momentum
    assert (apart.pop(3) < 1e-12) is forget
    assert min(apart[1:]) > 1e-4  # and later it matters


def test_a_rehearsal_leaves_model_and_global_randomness_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(64), nn.Linear(64, 4)).eval()
    box = WhiteBox(model, nn.functional.cross_entropy)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    twin = rehearsed(box, STREAM.victim_batch(0, 0), {}, lr=LR, momentum=0.9)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    moved = {name for name, value in twin.state_dict().items() if not torch.equal(value, before[name])}
    assert {"3.weight", "2.running_mean"} <= moved


def test_what_is_measured_is_the_loss_and_the_worst_class() -> None:
    learner = toy_learner(STREAM)
    learner.model.train()
    found = quality(learner.white_box, VALIDATION)
    assert learner.model.training
    score = learner.evaluate([VALIDATION])
    learner.model.eval()
    right = learner.model(VALIDATION.x).argmax(1) == VALIDATION.y
    assert found.loss == pytest.approx(score.loss, rel=1e-6)
    assert found.worst == min(float(right[VALIDATION.y == c].double().mean()) for c in range(4)) <= score.accuracy


# Against the gate.


PAIRED: dict[str, Any] = {"max_loss_rise": math.inf, "max_accuracy_drop": math.inf, "level": 0.1, "test": "chances"}


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param({"reference": "previous"}, marks=pytest.mark.slow),
        {"reference": "best"},
        pytest.param({"reference": "start"}, marks=pytest.mark.slow),
        pytest.param({"reference": "best", **PAIRED}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_it_sends_passes_the_gate_that_refuses_the_inner_attack(limits: dict[str, Any]) -> None:
    """Every poisoned step is kept; what is refused is a clean batch, where nothing else was left to send."""
    tolerance = {"max_loss_rise": 0.1, "max_accuracy_drop": 0.2, **limits}
    passed, sent, largest = [], [], []
    for seed in range(5):
        stream = toy_stream(seed)
        plain, aware = (
            run_online(gated(stream, momentum=0.0, lr=0.1, **tolerance), stream, attack, RUN, seed=seed)
            for attack in (
                PGD(eps=0.2),
                GateAware(eps=0.2, inner={"name": "pgd"}, victim_lr=0.1, victim_momentum=0.0, **tolerance),
            )
        )
        steps = list(zip(phase(aware, "poison_linf"), phase(aware, "admitted"), strict=True))
        assert all(admitted for used, admitted in steps if used > 0)
        passed.append(sum(phase(plain, "admitted")))
        sent.append(sum(used > 0 for used, _ in steps))
        largest.append(max(used for used, _ in steps))
    assert median(passed) == 0
    assert median(sent) >= 1
    assert median(largest) < 0.19  # it had to hold back


def test_it_measures_on_as_many_samples_as_the_gate_is_believed_to_trust() -> None:
    """Six samples can never show a loss of seven, so against them it need not hold back."""
    limits = {**PAIRED, "test": "flips", "level": 0.01, "inner": {"name": "pgd", "steps": 2}, "victim_lr": 0.5}
    batch, sent = STREAM.victim_batch(0, 0), {}
    for size in (None, 6):
        attack = GateAware(**{**SHARED, **limits}, trusted_size=size)
        poisoned = attack.poison(batch, view_of(toy_learner(STREAM), attack), rng=rng())
        sent[size] = float((poisoned.x - batch.x).abs().max())
    assert sent[6] == pytest.approx(0.2)
    assert sent[None] < 0.19


def without(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key != "name"}


def phase(outcome: Outcome, column: str) -> list[Any]:
    return [dict(row)[column] for row in outcome.trace if row["phase"] == "accumulative"]


@pytest.mark.parametrize("imposed", [None, 1.5])
def test_a_momentum_that_the_attack_imposes_is_part_of_the_rehearsal(
    monkeypatch: pytest.MonkeyPatch, imposed: float | None
) -> None:
    """The phase goes with the inner attack's factor, the trigger with the victim's own."""
    factors: list[float] = []

    def spy(*args: Any, momentum: float, **options: Any) -> nn.Module:
        factors.append(momentum)
        return rehearsed(*args, momentum=momentum, **options)

    monkeypatch.setattr(gate_aware, "rehearsed", spy)
    table = INNER if imposed is None else {**INNER, "weight_momentum": imposed}
    attack = GateAware(**{**SHARED, "inner": table, "halvings": 0}, victim_momentum=0.7, shrink_trigger=True)
    assert attack.weight_momentum == imposed
    view = view_of(toy_learner(STREAM), attack)
    attack.poison(STREAM.victim_batch(0, 0), view, rng=rng())
    attack.trigger(STREAM.trigger_batch(3, 0), view, rng=rng())
    assert factors == [0.7 if imposed is None else imposed, 0.7]


def test_without_limits_it_is_the_inner_attack_bit_for_bit() -> None:
    free = GateAware(
        **{**SHARED, "max_loss_rise": float("inf"), "max_accuracy_drop": float("inf"), "poison_ratio": 0.5}
    )
    inner = Accumulative(eps=0.2, poison_ratio=0.5, **without(INNER))
    one, other = (run_online(toy_learner(STREAM), STREAM, attack, RUN) for attack in (free, inner))
    assert [r["loss"] for r in one.trace] == [r["loss"] for r in other.trace]
    assert all(torch.equal(image, other.images[name]) for name, image in one.images.items())


@pytest.mark.slow
def test_a_smaller_tolerance_leaves_less_of_the_poison() -> None:
    """And what is left stays inside it, batch by batch."""
    used: dict[float, list[float]] = {0.0: [], 0.1: [], 0.3: [], 50.0: []}
    for i in range(5):
        batch = STREAM.victim_batch(i, 0)
        for rise, lengths in used.items():
            limits = {"max_loss_rise": rise, "max_accuracy_drop": 1.0}
            attack = GateAware(**{**SHARED, **limits, "inner": {"name": "pgd"}, "victim_lr": 0.2, "halvings": 8})
            learner = toy_learner(STREAM, lr=0.2)
            sent = attack.poison(batch, view_of(learner, attack), rng=rng())
            lengths.append(float((sent.x - batch.x).abs().max()))
            before = learner.evaluate([VALIDATION]).loss
            learner.update(sent)
            if lengths[-1] > 0:
                assert learner.evaluate([VALIDATION]).loss <= before + rise + 1e-5
    medians = [median(lengths) for lengths in used.values()]
    assert medians == sorted(medians)
    assert used[50.0] == pytest.approx([0.2] * 5, abs=1e-5)
    assert medians[0] < 0.1


def test_if_nothing_passes_the_clean_batch_is_sent() -> None:
    """With a step so long that even clean data breaks the model."""
    attack = GateAware(**{**SHARED, "victim_lr": 50.0, "max_loss_rise": 0.0})
    batch = STREAM.victim_batch(0, 0)
    assert torch.equal(attack.poison(batch, view_of(toy_learner(STREAM), attack), rng=rng()).x, batch.x)


def test_the_trigger_is_sent_whole_unless_asked() -> None:
    trigger = STREAM.trigger_batch(3, 0)
    made = {}
    for shrink in (False, True):
        attack = GateAware(**{**SHARED, "max_loss_rise": 0.0}, shrink_trigger=shrink)
        made[shrink] = attack.trigger(trigger, view_of(toy_learner(STREAM), attack), rng=rng()).x
    view = view_of(toy_learner(STREAM), attack)
    alone = Accumulative(eps=0.2, **without(INNER)).trigger(trigger, View(0, {}, view.available), rng=rng())
    assert torch.equal(made[False], alone.x)
    assert float((made[True] - trigger.x).abs().max()) < float((made[False] - trigger.x).abs().max())


def test_a_killed_run_goes_on_as_if_nothing_had_happened() -> None:
    """All that it infers and remembers, the inner attack's notes too, is in the memory that the loop saves."""
    attack = GateAware(**{**SHARED, "inner": {**INNER, "resample_validation": True}}, reference="best")
    whole = run_online(gated(**TOLERANCE), STREAM, attack, RUN)

    class Killed(Exception):
        pass

    learner, progress = gated(**TOLERANCE), Progress()

    def kill(progress: Progress) -> None:
        if len(progress.rows) == 3:
            raise Killed

    with pytest.raises(Killed):
        run_online(learner, STREAM, attack, RUN, progress=progress, on_step=kill)
    resumed = gated(**TOLERANCE)
    resumed.restore(learner.snapshot())
    resumed.memory.update(learner.memory)
    notes = {name: t.clone() for name, t in progress.memory.items()}
    again = run_online(resumed, STREAM, attack, RUN, progress=Progress(progress.rows, notes, progress.images))
    assert [r["loss"] for r in again.trace] == [r["loss"] for r in whole.trace]
    assert [r["poison_linf"] for r in again.trace] == [r["poison_linf"] for r in whole.trace]
    assert {name.partition(".")[0] for name in notes} == {"inner", "seen", "buffer", "best"}


# Settings.


def test_it_needs_what_the_inner_attack_needs_and_what_a_rehearsal_does() -> None:
    assert GateAware(inner={"name": "noise"}).needs == {Need.MODEL, Need.VALIDATION}
    assert GateAware().needs == GateAware.needs == Accumulative.needs
    blind = GateAware(inner={**INNER, "model_access": "surrogate", "beta": 0.1})
    assert blind.needs == Accumulative.needs | {Need.SURROGATE, Need.HISTORY}


def test_it_ends_the_phase_when_the_inner_attack_does() -> None:
    view = View(1, {}, {Need.ACCURACY: (0.9, 0.8)})
    assert GateAware(inner={**INNER, "max_drop": 0.05}).ready(view)
    assert not GateAware(inner={**INNER, "max_drop": 0.2}).ready(view)
    assert GateAware(inner={"name": "vanilla"}).ready(view)


def test_the_inner_table_is_completed_and_comes_back() -> None:
    made: GateAware = build("attack", {"name": "gate_aware", "inner": {"name": "pgd", "steps": 3}, "eps": 0.3})
    assert made.inner["steps"] == 3
    assert made.inner["random_start"] is True
    assert made.built == PGD(eps=0.3, steps=3)
    again = build("attack", config_of(made))
    assert again == made
    assert hash(again) == hash(made)
    assert build("attack", {**config_of(made), "eps": 0.1}).built == PGD(eps=0.1, steps=3)
    released = GateAware(eps=0.05, inner={"name": "vanilla", "preset": "released"})
    assert (released.ball.eps, released.inner["normalise"]) == (0.05, "tensor")


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ({"name": "pgd", "eps": 0.1}, "eps belongs beside"),
        ({"name": "pgd", "norm": "l2", "poison_ratio": 0.5}, "norm, poison_ratio belongs beside"),
        ({"name": "pdg"}, "unknown attack 'pdg'"),
        ({"steps": 3}, "has no `name`"),
        ({"name": "pgd", "stpes": 3}, "inner pgd: unknown key 'stpes': did you mean 'steps'"),
        ({"name": "pgd", "steps": -3}, "inner pgd: steps = -3"),
    ],
    ids=str,
)
def test_a_wrong_inner_table_says_where(inner: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("attack", {"name": "gate_aware", "inner": inner})
