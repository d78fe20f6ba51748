"""The online loop: what is learned in which order, what ends the phase, what the trace says, and that runs repeat."""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Generator, Tensor, nn
from torch.optim import SGD, Adam

from mithridate.attacks.accumulative import Accumulative
from mithridate.attacks.clean import Clean
from mithridate.attacks.noise import Noise
from mithridate.attacks.vanilla import Vanilla
from mithridate.bench.store import TRACE_SCHEMA
from mithridate.core.attack import Attack
from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.defence import Defence, Screened, Verdict
from mithridate.core.domain import Domain
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.past import Snapshot, Weights
from mithridate.core.registry import build
from mithridate.core.view import Need, View
from mithridate.core.watch import Monitor, Reading
from mithridate.data.stream import Stream
from mithridate.defences.at import AT
from mithridate.defences.chain import chain
from mithridate.defences.clip import Clip
from mithridate.defences.ema import Ema
from mithridate.maths.norms import Ball
from mithridate.models import build_model
from mithridate.monitors.accuracy_floor import AccuracyFloor
from mithridate.simulation.evaluation import spread_over_classes
from mithridate.simulation.online import OnlineRun, run_online
from mithridate.simulation.run import Outcome, Progress, adopt_momentum, victim_optimiser
from mithridate.simulation.trace import COLUMNS, TraceRow
from mithridate.testing import toy_learner, toy_stream
from mithridate.training.burn_in import BurnIn, burn_in
from mithridate.training.learner import Learner
from tests.recipes import timeless, timeless_rows

RUN = OnlineRun(steps=3, lr=0.05)
CRAFTY: dict[str, Any] = {"name": "accumulative", "eps": 0.1, "steps": 2, "trigger_update": "after_step"}


NewLearner = Callable[..., Learner]


@pytest.fixture(scope="module")
def victim(stream: Stream) -> NewLearner:
    """Makes learners that all stand at the end of the same burn-in."""
    kept: dict[str, Snapshot] = {}

    def make(*, norm: str = "batch", run: OnlineRun = RUN, **options: Any) -> Learner:
        model = build_model({"name": "small_cnn", "width": 4, "norm": norm}, stream.info, seed=0)
        if norm not in kept:
            kept[norm] = burn_in(copy.deepcopy(model), stream, BurnIn(epochs=3, batch_size=20, lr=0.05), seed=0).final
        optimiser = victim_optimiser(model, run)
        learner = Learner(model, optimiser, update_mode=run.update_mode, **options)
        learner.restore(Snapshot(kept[norm].parameters, kept[norm].buffers, optimiser.state_dict(), step=0))
        return learner

    return make


def equal_bits(a: Snapshot, b: Snapshot) -> bool:
    pairs = [(a.parameters[n], b.parameters[n]) for n in a.parameters] + [
        (a.buffers[n], b.buffers[n]) for n in a.buffers
    ]
    return a.step == b.step and all(torch.equal(x, y) for x, y in pairs)


def column(outcome: Outcome, name: str) -> list[Any]:
    return [dict(row)[name] for row in outcome.trace]


class Alarm(Monitor):
    """Rings from one step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def alarm(self, readings: Sequence[Reading]) -> str | None:
        return f"rang at {readings[-1].step}" if readings[-1].step >= self.step else None


# What is learned, in which order.


def test_the_clean_run_is_training_by_hand(stream: Stream, victim: NewLearner) -> None:
    learner, by_hand = victim(), victim()
    outcome = run_online(learner, stream, Clean(), RUN, seed=4)
    scores = [by_hand.evaluate([stream.test.all()])]
    updates = []
    for step in range(4):  # three batches and the trigger
        updates.append(by_hand.update(stream.victim_batch(step, 4)))
        scores.append(by_hand.evaluate([stream.test.all()]))
    assert column(outcome, "accuracy") == [s.accuracy for s in scores]
    assert column(outcome, "loss") == [s.loss for s in scores]
    for name in ("batch_loss", "gradient_norm", "bounded_norm", "update_norm"):
        assert column(outcome, name) == [None] + [getattr(u, name) for u in updates]
    for name in ("poison_linf", "poison_l2"):
        assert column(outcome, name) == [None, 0, 0, 0, 0]
    assert column(outcome, "poisoned") == [0, 0, 0, 0, 0]
    assert equal_bits(learner.snapshot(), by_hand.snapshot())  # the loop leaves the learner where the trigger put it
    assert learner.step == 4


def test_without_a_phase_the_same_trigger_comes_first(stream: Stream, victim: NewLearner) -> None:
    by_hand = victim()
    by_hand.update(stream.trigger_batch(3, 0))
    learner = victim()
    outcome = run_online(learner, stream, Clean(phase=False), RUN)
    assert column(outcome, "phase") == ["start", "trigger"]
    assert (outcome.steps, outcome.stopped_by) == (0, "attack")
    assert equal_bits(learner.snapshot(), by_hand.snapshot())


def test_rows_are_numbered_named_and_fit_the_schema(stream: Stream, victim: NewLearner) -> None:
    outcome = run_online(victim(), stream, Noise(eps=0.1), RUN)
    assert column(outcome, "step") == [0, 1, 2, 3, 4]
    assert column(outcome, "phase") == ["start", *["accumulative"] * 3, "trigger"]
    for row in outcome.trace:
        assert tuple(row) == COLUMNS == tuple(TRACE_SCHEMA.names)
    accuracies = column(outcome, "accuracy")
    assert outcome.accuracy_start == accuracies[0]
    assert outcome.accuracy_before_trigger == accuracies[-2]
    assert outcome.accuracy_after_trigger == accuracies[-1]
    assert outcome.drop == accuracies[-2] - accuracies[-1]
    assert (outcome.steps, outcome.stopped_by, outcome.status) == (3, "steps", "finished")
    assert outcome.seconds == sum(column(outcome, "seconds"))
    for row in outcome.trace[1:]:
        assert 0 < row["craft_seconds"] + row["update_seconds"] <= row["seconds"]


def test_accuracy_is_of_the_whole_test_part(
    stream: Stream, victim: NewLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_online(victim(), stream, Noise(eps=0.1), RUN)
    monkeypatch.setattr("mithridate.simulation.evaluation.EVALUATION_BATCH", 70)
    pieces = run_online(victim(), stream, Noise(eps=0.1), RUN)
    assert column(pieces, "accuracy") == column(whole, "accuracy")
    assert column(pieces, "loss") == pytest.approx(column(whole, "loss"), rel=1e-5)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_a_phase_that_is_asked_for_has_a_step_whatever_the_floor(
    stream: Stream, victim: NewLearner, preset: str
) -> None:
    """The presets' floors are of the paper's model; the released loop takes a step before it reads an accuracy."""
    attack = build("attack", {"name": "accumulative", "preset": preset, "steps": 1, "accuracy_floor": 1.0})
    outcome = run_online(victim(), stream, attack, RUN)
    assert outcome.accuracy_start < 1
    assert (outcome.steps, outcome.stopped_by, outcome.phase_asked) == (1, "attack", True)


def test_an_outcome_says_whether_a_phase_was_asked_for(stream: Stream, victim: NewLearner) -> None:
    none = dataclasses.replace(RUN, steps=0)
    for attack, asked in ((Noise(), True), (Noise(phase=False), False), (build("attack", {"name": "vanilla"}), False)):
        assert run_online(victim(), stream, attack, none).phase_asked is asked


def test_no_steps_means_the_trigger_alone(stream: Stream, victim: NewLearner) -> None:
    outcome = run_online(victim(), stream, Noise(eps=0.1), dataclasses.replace(RUN, steps=0))
    assert column(outcome, "phase") == ["start", "trigger"]
    assert (outcome.steps, outcome.stopped_by) == (0, "steps")


class Recorder(Attack):
    """Shifts all pixels inwards by a known amount and keeps what it saw."""

    def __init__(self, ratio: float = 1.0, last: int = 99, needs: frozenset[Need] = frozenset()) -> None:
        self._ratio, self.last = ratio, last
        self.seen: list[tuple[str, Batch]] = []
        self.fed_at: list[int] = []
        self.needs = needs  # type: ignore[misc]  # each of these has its own

    @property
    def ball(self) -> Ball:
        return Ball("linf", 0.1)

    @property
    def ratio(self) -> float:
        return self._ratio

    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        self.seen.append(("batch", batch))
        return torch.where(batch.x > 0.5, batch.x - 0.1, batch.x + 0.1)

    def craft_trigger(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        self.seen.append(("trigger", batch))
        return torch.where(batch.x > 0.5, batch.x - 0.05, batch.x + 0.05)

    def ready(self, view: View) -> bool:
        return view.step >= self.last

    def after_step(self, view: View, rng: Generator) -> None:
        self.fed_at.append(view.step)


def test_the_attack_gets_the_streams_batches_and_the_trace_measures_what_it_did(
    stream: Stream, victim: NewLearner
) -> None:
    attack = Recorder(ratio=0.5)
    outcome = run_online(victim(), stream, attack, RUN, seed=2)
    assert [kind for kind, _ in attack.seen] == ["batch"] * 3 + ["trigger"]
    for step, (_, batch) in enumerate(attack.seen):
        assert torch.equal(batch.x, stream.victim_batch(step, 2).x)
        assert torch.equal(batch.y, stream.victim_batch(step, 2).y)
    assert attack.fed_at == [1, 2, 3]  # after each accumulative update, not after the trigger
    assert column(outcome, "poisoned")[1:] == [0.5] * 4
    assert column(outcome, "poison_linf")[1:] == pytest.approx([0.1] * 3 + [0.05], abs=1e-6)
    # Each changed image moved by 0.1 in 64 pixels.
    assert column(outcome, "poison_l2")[1:] == pytest.approx([0.8] * 3 + [0.4], abs=1e-5)


def test_the_victim_learns_from_the_poisoned_batch(stream: Stream, victim: NewLearner) -> None:
    learner, by_hand = victim(), victim()
    run_online(learner, stream, Recorder(), RUN)
    for step in range(4):
        x, y = stream.victim_batch(step, 0)
        shift = 0.1 if step < 3 else 0.05
        by_hand.update(Batch(torch.where(x > 0.5, x - shift, x + shift), y))
    assert equal_bits(learner.snapshot(), by_hand.snapshot())


def test_pictures_show_the_first_accumulative_batch_and_the_trigger(stream: Stream, victim: NewLearner) -> None:
    outcome = run_online(victim(), stream, Recorder(), dataclasses.replace(RUN, images=3))
    assert set(outcome.images) == {f"{p}.{k}" for p in ("accumulative", "trigger") for k in ("clean", "poisoned")}
    assert torch.equal(outcome.images["accumulative.clean"], stream.victim_batch(0, 0).x[:3])
    assert torch.equal(outcome.images["trigger.clean"], stream.victim_batch(3, 0).x[:3])
    moved = outcome.images["trigger.poisoned"] - outcome.images["trigger.clean"]
    assert float(moved.abs().min()) == pytest.approx(0.05, abs=1e-6)
    assert run_online(victim(), stream, Recorder(), dataclasses.replace(RUN, images=0)).images == {}


# Same seed, same numbers.


@pytest.mark.parametrize("settings", [{"name": "noise"}, {"name": "pgd"}, CRAFTY], ids=lambda s: str(s["name"]))
def test_the_same_seed_gives_the_same_rows_and_another_does_not(
    stream: Stream, victim: NewLearner, settings: dict[str, Any]
) -> None:
    attack = build("attack", settings)
    rows = [timeless_rows(run_online(victim(), stream, attack, RUN, seed=s).trace) for s in (0, 0, 1)]
    assert rows[0] == rows[1]
    assert rows[0][1:] != rows[2][1:]
    assert rows[0][0] == rows[2][0]


def test_each_step_and_each_seed_has_draws_of_its_own(stream: Stream, victim: NewLearner) -> None:
    drawn: list[float] = []

    class Drawing(Recorder):
        def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
            drawn.append(float(torch.rand((), generator=rng)))
            return batch.x

        def craft_trigger(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
            return self.craft(batch, view, mask, rng)

        def after_step(self, view: View, rng: Generator) -> None:
            drawn.append(float(torch.rand((), generator=rng)))

    for seed in (0, 1, 0):
        run_online(victim(), stream, Drawing(), RUN, seed=seed)
    assert len(drawn) == 3 * 7  # three batches, each with its aftermath, and the trigger
    assert drawn[:7] == drawn[14:]
    assert len(set(drawn)) == 14


class Killed(Exception):
    """Stands for a power cut."""


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {**CRAFTY, "weight_momentum": 1.1, "random_start": True, "resample_validation": True, "poison_ratio": 0.6},
        {"name": "noise", "poison_ratio": 0.5},
    ],
    ids=lambda s: str(s["name"]),
)
def test_an_interrupted_run_goes_on_to_the_same_rows(
    stream: Stream, victim: NewLearner, settings: dict[str, Any], after: int
) -> None:
    attack = build("attack", settings)
    whole_victim = victim(defence=Clip(clip_norm=0.5))
    whole = run_online(whole_victim, stream, attack, RUN, monitors=[Alarm(2)])
    kept: list[tuple[Progress, Snapshot]] = []
    learner = victim(defence=Clip(clip_norm=0.5))

    def on_step(progress: Progress) -> None:
        if len(progress.rows) == after + 1:
            kept.append((copy.deepcopy(progress), learner.snapshot()))
            raise Killed

    with pytest.raises(Killed):
        run_online(learner, stream, attack, RUN, monitors=[Alarm(2)], on_step=on_step)
    progress, snapshot = kept[0]
    again = victim(defence=Clip(clip_norm=0.5))
    again.restore(snapshot)
    resumed = run_online(again, stream, attack, RUN, monitors=[Alarm(2)], progress=progress)
    assert timeless_rows(resumed.trace) == timeless_rows(whole.trace)
    assert timeless(resumed.summary()) == timeless(whole.summary())
    assert all(torch.equal(resumed.images[k], whole.images[k]) for k in whole.images)
    assert equal_bits(again.snapshot(), whole_victim.snapshot())


# Power over the optimiser.


class Spying(SGD):
    """Notes its momentum factor at each step."""

    def step(self, closure: Any = None) -> Any:
        self.factors = [*getattr(self, "factors", []), self.param_groups[0]["momentum"]]
        return super().step(closure)


def test_weight_momentum_holds_in_the_phase_and_not_for_the_trigger(stream: Stream, victim: NewLearner) -> None:
    learner = victim()
    learner.optimiser = Spying(learner.model.parameters(), lr=0.05, momentum=0.9)
    attack = build("attack", {**CRAFTY, "weight_momentum": 1.1})
    outcome = run_online(learner, stream, attack, RUN)
    assert learner.optimiser.factors == [1.1, 1.1, 1.1, 0.9]
    assert learner.optimiser.param_groups[0]["momentum"] == 0.9
    usual = run_online(victim(), stream, build("attack", CRAFTY), RUN)
    assert timeless_rows(outcome.trace)[1] == timeless_rows(usual.trace)[1]  # nothing to remember yet
    assert timeless_rows(outcome.trace)[2] != timeless_rows(usual.trace)[2]


def test_weight_momentum_survives_a_defence_that_rolls_back(stream: Stream, victim: NewLearner) -> None:
    class Never(Defence):
        def admit(self, before: Weights, view: View) -> Verdict:
            return Verdict(admit=False, reason="no")

    learner = victim(defence=Never())
    outcome = run_online(learner, stream, build("attack", {**CRAFTY, "weight_momentum": 1.1}), RUN)
    assert learner.optimiser.param_groups[0]["momentum"] == 0.9
    assert len(set(column(outcome, "accuracy"))) == 1
    assert column(outcome, "admitted") == [True, False, False, False, False]
    assert (outcome.rolled_back, outcome.drop, outcome.status) == (4, 0, "finished")


def test_weight_momentum_needs_an_optimiser_that_has_one(stream: Stream, victim: NewLearner) -> None:
    learner = victim()
    learner.optimiser = Adam(learner.model.parameters())
    with pytest.raises(ConfigError, match="weight_momentum needs an optimiser with momentum, not Adam"):
        run_online(learner, stream, build("attack", {**CRAFTY, "weight_momentum": 1.1}), RUN)


def test_the_burn_ins_momentum_can_be_taken_over(stream: Stream, victim: NewLearner) -> None:
    burned = victim()
    burned.update(stream.victim_batch(0, 9))
    snapshot = burned.snapshot()
    learner = victim()
    fresh = victim_optimiser(learner.model, OnlineRun(lr=0.02, momentum=0.5))
    adopt_momentum(fresh, snapshot)
    group = fresh.param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.02, 0.5)
    held = [state["momentum_buffer"] for state in fresh.state_dict()["state"].values()]
    given = [state["momentum_buffer"] for state in snapshot.optimiser["state"].values()]
    assert len(held) == len(list(learner.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(held, given, strict=True))
    assert float(torch.stack([b.norm() for b in held]).sum()) > 0


# What ends the phase.


def test_an_alarm_is_recorded(stream: Stream, victim: NewLearner) -> None:
    outcome = run_online(victim(), stream, Noise(eps=0.1), RUN, monitors=[Alarm(3), Alarm(2), Alarm(99)])
    assert column(outcome, "alarms") == ["", "", "rang at 2", "rang at 3; rang at 3", "rang at 4; rang at 4"]
    assert (outcome.alarms, outcome.first_alarm_step) == (3, 2)
    assert (outcome.stopped_by, outcome.status) == ("steps", "finished")
    quiet = run_online(victim(), stream, Noise(eps=0.1), RUN)
    assert (quiet.alarms, quiet.first_alarm_step) == (0, None)


def test_an_alarm_lets_the_attacker_fire(stream: Stream, victim: NewLearner) -> None:
    run = dataclasses.replace(RUN, on_alarm="trigger")
    outcome = run_online(victim(), stream, Noise(eps=0.1), run, monitors=[Alarm(2)])
    assert column(outcome, "phase") == ["start", "accumulative", "accumulative", "trigger"]
    assert (outcome.stopped_by, outcome.status, outcome.steps) == ("monitor", "finished", 2)


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("attacker_too", [False, True])
def test_an_alarm_halts_the_service_before_the_trigger(
    stream: Stream, victim: NewLearner, step: int, attacker_too: bool
) -> None:
    run = dataclasses.replace(RUN, on_alarm="halt")
    attack = Recorder(last=step if attacker_too else 99)
    learner = victim()
    outcome = run_online(learner, stream, attack, run, monitors=[Alarm(step)])
    assert column(outcome, "phase") == ["start", *["accumulative"] * step]
    assert (outcome.stopped_by, outcome.status, outcome.steps) == ("monitor", "halted", step)
    assert (outcome.accuracy_after_trigger, outcome.drop, outcome.accuracy_after_buffers) == (None, None, None)
    assert outcome.accuracy_before_trigger == outcome.trace[-1]["accuracy"]
    assert learner.step == step


def test_the_attack_ends_the_phase(stream: Stream, victim: NewLearner) -> None:
    outcome = run_online(victim(), stream, Recorder(last=2), RUN)
    assert (outcome.steps, outcome.stopped_by) == (2, "attack")


def test_the_phase_ends_when_published_accuracy_leaves_the_attackers_range(stream: Stream, victim: NewLearner) -> None:
    def attack(**limits: float) -> Accumulative:
        made: Accumulative = build(
            "attack", {**CRAFTY, "steps": 1, "trigger_mode": "clean", "weight_momentum": 1.1, **limits}
        )
        return made

    run = OnlineRun(steps=4, lr=0.2, images=0)
    free = run_online(victim(run=run), stream, attack(), run)
    accuracies = column(free, "accuracy")
    falls = [accuracies[0] - a for a in accuracies]
    first = max(range(4), key=falls.__getitem__)
    assert first > 0  # else there is nothing to see
    limit = (falls[first] + max(falls[:first])) / 2
    for limits in ({"max_drop": limit}, {"accuracy_floor": accuracies[0] - limit}):
        outcome = run_online(victim(run=run), stream, attack(**limits), run)
        assert (outcome.steps, outcome.stopped_by) == (first, "attack")
        assert column(outcome, "accuracy")[:-1] == accuracies[: first + 1]
    assert run_online(victim(), stream, attack(accuracy_floor=1.0), run).steps == 1


# What must not go wrong.


def test_a_stream_too_short_is_refused_before_anything_is_learned(stream: Stream, victim: NewLearner) -> None:
    learner = victim()
    before = learner.snapshot()
    with pytest.raises(DataError, match="5 accumulative batches and the trigger batch of 20 samples need 120"):
        run_online(learner, stream, Clean(), OnlineRun(steps=5))
    assert equal_bits(learner.snapshot(), before)
    assert run_online(learner, stream, Clean(), OnlineRun(steps=4)).steps == 4


@pytest.mark.parametrize("lr", [1e6, 1e30])
@pytest.mark.parametrize("name", ["clean", "noise", "pgd", "mim", "vanilla", "accumulative"])
def test_a_diverging_victim_is_an_outcome(stream: Stream, victim: NewLearner, name: str, lr: float) -> None:
    run = OnlineRun(steps=2)
    attack = build(
        "attack", {"name": name, **({"steps": 2} if name in {"pgd", "mim", "vanilla", "accumulative"} else {})}
    )
    learner = victim(run=run)
    learner.optimiser.param_groups[0]["lr"] = lr  # more than a run's settings take
    outcome = run_online(learner, stream, attack, run, monitors=[AccuracyFloor(floor=0.1)])
    assert outcome.status == "diverged"
    assert not all(map(math.isfinite, column(outcome, "loss")[-2:]))
    assert outcome.drop is not None
    assert math.isfinite(outcome.drop)


def test_a_batch_that_is_screened_away_is_no_divergence(stream: Stream, victim: NewLearner) -> None:
    class Nothing(Defence):
        def screen(self, batch: Batch, view: View) -> Screened:
            return Screened(batch.take(slice(0)), torch.ones(batch.size, dtype=torch.bool))

    outcome = run_online(victim(defence=Nothing()), stream, Noise(eps=0.1), RUN)
    assert (outcome.status, outcome.drop, outcome.rolled_back) == ("finished", 0, 4)
    assert column(outcome, "batch_loss") == [None] * 5
    assert column(outcome, "verdict")[1:] == ["the defence left no sample of the batch"] * 4


# How much of the drop the buffers explain.


def test_the_trigger_steps_buffers_are_weighed_alone(stream: Stream, victim: NewLearner) -> None:
    attack, run = Vanilla(eps=0.5, steps=3), dataclasses.replace(RUN, lr=1.0)
    learner, by_hand = victim(run=run), victim(run=run)
    for module in (*learner.model.modules(), *by_hand.model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # one batch moves the statistics far
    outcome = run_online(learner, stream, attack, run)
    before = by_hand.snapshot()
    view = View(0, {}, {Need.MODEL: by_hand.white_box, Need.VALIDATION: stream.validation.all()})
    by_hand.update(attack.trigger(stream.trigger_batch(3, 0), view, rng=Generator()))
    after = by_hand.snapshot()
    by_hand.restore(Snapshot(before.parameters, after.buffers, before.optimiser, 0))
    score = by_hand.evaluate([stream.test.all()])
    assert outcome.accuracy_after_buffers == score.accuracy
    assert outcome.accuracy_after_trigger is not None
    assert outcome.drop == outcome.accuracy_before_trigger - outcome.accuracy_after_trigger
    assert equal_bits(learner.snapshot(), after)
    assert len({outcome.accuracy_before_trigger, outcome.accuracy_after_trigger, outcome.accuracy_after_buffers}) == 3


@pytest.mark.parametrize("options", [{"norm": "none"}, {"run": dataclasses.replace(RUN, update_mode="eval")}], ids=str)
def test_buffers_that_do_not_move_explain_nothing(stream: Stream, victim: NewLearner, options: dict[str, Any]) -> None:
    outcome = run_online(victim(**options), stream, Noise(eps=0.3), RUN)
    assert outcome.accuracy_after_buffers == outcome.accuracy_before_trigger
    assert outcome.trace[-1]["loss"] != outcome.trace[-2]["loss"]


# Threat models and the user's own things.


def test_the_notes_of_attack_and_defence_are_apart(stream: Stream, victim: NewLearner) -> None:
    class Notes(Defence):
        def screen(self, batch: Batch, view: View) -> Screened:
            assert "positions.20" not in view.memory
            view.memory["mine"] = torch.ones(1)
            return Screened(batch)

    progress = Progress()
    learner = victim(defence=Notes())
    run_online(learner, stream, Noise(eps=0.1), RUN, progress=progress)
    assert set(progress.memory) == {"positions.20"}
    assert set(learner.memory) == {"mine"}


def test_what_a_valid_input_is_comes_from_the_stream_unless_the_learner_knows(
    stream: Stream, victim: NewLearner
) -> None:
    """A correction does not leave the pixels; a learner with a domain of its own keeps that."""
    wide = Domain(-0.5, 1.5)
    for domain, expected in ((None, stream.domain), (wide, wide)):
        seen: list[Domain] = []

        class Looking(Defence):
            def screen(self, batch: Batch, view: View) -> Screened:
                seen.append(view.domain)  # noqa: B023  (used inside the loop)
                return Screened(batch)

        learner = victim(defence=Looking(), domain=domain)
        run_online(learner, stream, Clean(), dataclasses.replace(RUN, steps=0))
        assert seen == [expected]
        assert learner.domain == expected


def test_inputs_that_nobody_could_move_are_refused_before_anything_is_learned(
    stream: Stream, victim: NewLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    trigger: AnyBatch = Batch({"ids": torch.ones(20, 4, dtype=torch.int64)}, torch.zeros(20, dtype=torch.int64))
    monkeypatch.setattr(Stream, "trigger_batch", lambda *_: trigger)
    for attack, defence, who in ((Noise(eps=0.1), None, "Noise"), (Clean(), AT(), "AT"), (Clean(), chain(AT()), "AT")):
        learner = victim(defence=defence)
        with pytest.raises(ConfigError, match=f"^{who} moves inputs by small amounts"):
            run_online(learner, stream, attack, RUN)
        assert learner.step == 0


def test_published_accuracy_is_what_the_attack_reads(stream: Stream, victim: NewLearner) -> None:
    class Reader(Recorder):
        def ready(self, view: View) -> bool:
            self.read = [*getattr(self, "read", []), view.accuracy]
            return False

    attack = Reader(needs=frozenset({Need.ACCURACY}))
    outcome = run_online(victim(), stream, attack, RUN)
    accuracies = column(outcome, "accuracy")
    assert attack.read == [(accuracies[0], a) for a in accuracies[:3]]


def test_a_users_own_module_runs(stream: Stream) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    learner = Learner(model, SGD(model.parameters(), lr=0.1))
    rows: list[TraceRow] = list(run_online(learner, stream, build("attack", {**CRAFTY, "steps": 1}), RUN).trace)
    assert len(rows) == 5
    assert rows[1]["poisoned"] == 1.0


def test_buffers_alone_say_nothing_of_a_served_average() -> None:
    stream = toy_stream(0)
    made = {}
    for decay in (0.0, 0.9):
        learner = toy_learner(stream, defence=Ema(decay=decay))
        made[decay] = run_online(learner, stream, Noise(eps=0.15), OnlineRun(steps=1, lr=0.05)).accuracy_after_buffers
    assert made[0.9] is None
    assert made[0.0] is not None


# Measured every so many steps.


@pytest.mark.parametrize(
    ("every", "measured"), [(1, {0, 1, 2, 3, 4}), (2, {0, 2, 3, 4}), (3, {0, 3, 4}), (9, {0, 3, 4})]
)
def test_rows_are_measured_in_turn_at_the_start_and_around_the_trigger_and_nothing_else_changes(
    stream: Stream, victim: NewLearner, every: int, measured: set[int]
) -> None:
    class Seen(Monitor):
        def alarm(self, readings: Sequence[Reading]) -> str | None:
            return None if readings[-1].accuracy is None else "seen"

    whole = run_online(victim(), stream, Noise(eps=0.1), RUN)
    run = dataclasses.replace(RUN, evaluate_every=every)
    outcome = run_online(victim(), stream, Noise(eps=0.1), run, monitors=[Seen()])
    for row, full in zip(timeless_rows(outcome.trace), timeless_rows(whole.trace), strict=True):
        seen = row["step"] in measured
        unseen = {**full, "accuracy": None, "loss": None, "test_samples": None}
        assert row == (full if seen else unseen) | {"alarms": row["alarms"]}
        # The step before the trigger is measured for the record; the monitor was asked before.
        due = row["step"] == 4 or (row["step"] > 0 and row["step"] % every == 0)
        assert bool(row["alarms"]) == due
    for name in ("accuracy_start", "accuracy_before_trigger", "accuracy_after_trigger", "drop", "steps", "status"):
        assert getattr(outcome, name) == getattr(whole, name)
    assert outcome.read_step == 3 // every * every
    assert outcome.read_accuracy == whole.trace[outcome.read_step]["accuracy"]
    written = pa.Table.from_pylist([dict(row) for row in outcome.trace], schema=TRACE_SCHEMA)
    assert written.column("accuracy").null_count == 5 - len(measured)


def test_the_attack_reads_the_newest_measured_accuracy(stream: Stream, victim: NewLearner) -> None:
    class Reader(Recorder):
        def ready(self, view: View) -> bool:
            self.read = [*getattr(self, "read", []), view.accuracy]
            return len(self.read) == 4

    attack = Reader(needs=frozenset({Need.ACCURACY}))
    outcome = run_online(victim(), stream, attack, OnlineRun(steps=4, lr=0.05, images=0, evaluate_every=2))
    accuracies = column(outcome, "accuracy")
    assert attack.read == [(accuracies[0], accuracies[step]) for step in (0, 0, 2, 2)]
    assert (outcome.steps, outcome.stopped_by) == (3, "attack")
    assert (outcome.read_step, outcome.read_accuracy) == (2, accuracies[2])


@pytest.mark.parametrize("on_alarm", ["trigger", "halt"])
def test_a_phase_that_ends_between_two_measurements_is_measured_before_its_end(
    stream: Stream, victim: NewLearner, on_alarm: Any
) -> None:
    run = dataclasses.replace(RUN, evaluate_every=3, on_alarm=on_alarm)
    whole = run_online(victim(), stream, Noise(eps=0.1), RUN)
    outcome = run_online(victim(), stream, Noise(eps=0.1), run, monitors=[Alarm(2)])
    accuracies = column(whole, "accuracy")
    assert column(outcome, "accuracy")[:3] == [accuracies[0], None, accuracies[2]]
    assert (outcome.steps, outcome.read_step, outcome.read_accuracy) == (2, 0, accuracies[0])
    assert outcome.accuracy_before_trigger == accuracies[2]


def test_an_interrupted_run_that_measures_seldom_goes_on_to_the_same_rows(stream: Stream, victim: NewLearner) -> None:
    run = dataclasses.replace(RUN, evaluate_every=2)
    whole = run_online(victim(), stream, Noise(eps=0.1), run)
    kept: list[tuple[Progress, Snapshot]] = []
    learner = victim()
    run_online(
        learner,
        stream,
        Noise(eps=0.1),
        run,
        on_step=lambda progress: kept.append((copy.deepcopy(progress), learner.snapshot())),
    )
    for progress, snapshot in kept:
        again = victim()
        again.restore(snapshot)
        resumed = run_online(again, stream, Noise(eps=0.1), run, progress=progress)
        assert timeless_rows(resumed.trace) == timeless_rows(whole.trace)
        assert (resumed.read_step, resumed.read_accuracy) == (whole.read_step, whole.read_accuracy)


# Measured on a subset between.


class Watching(Monitor):
    """Notes what it is shown, and never rings."""

    def __init__(self) -> None:
        self.shown: list[list[float | None]] = []

    def alarm(self, readings: Sequence[Reading]) -> str | None:
        self.shown.append([r.accuracy for r in readings])
        return None


class Reader(Recorder):
    """Notes the accuracies that it can read, also when it makes its trigger, and fires after some steps."""

    def __init__(self, steps: int) -> None:
        super().__init__(needs=frozenset({Need.ACCURACY}))
        self.steps, self.read = steps, list[tuple[float, float]]()

    def trigger(self, clean: AnyBatch, view: View, *, rng: Generator) -> AnyBatch:
        self.read.append(view.accuracy)
        return super().trigger(clean, view, rng=rng)

    def ready(self, view: View) -> bool:
        self.read.append(view.accuracy)
        return view.step >= self.steps


SOME = dataclasses.replace(RUN, evaluate_size=60)


def test_a_subset_is_measured_between_and_the_whole_part_at_the_start_and_around_the_trigger(
    stream: Stream, victim: NewLearner
) -> None:
    whole = run_online(victim(), stream, Noise(eps=0.1), RUN)
    kept: list[Weights] = []
    learner = victim()
    outcome = run_online(
        learner, stream, Noise(eps=0.1), SOME, on_step=lambda _: kept.append(Weights.of(learner.model).copied())
    )
    n = len(stream.test)
    assert column(outcome, "test_samples") == [n, 60, 60, n, n]
    for name in ("accuracy", "loss"):
        assert [column(outcome, name)[i] for i in (0, 3, 4)] == [column(whole, name)[i] for i in (0, 3, 4)]
    # What the subset said follows from its samples.
    batch = stream.test.batch(spread_over_classes(stream.test.y, 60, 0))
    scores = [learner.evaluate([batch], weights) for weights in kept]
    assert [(row["accuracy"], row["loss"]) for row in outcome.trace[1:3]] == scores[:2]
    assert (outcome.read_step, outcome.read_accuracy, outcome.read_samples) == (3, scores[2].accuracy, 60)
    assert (whole.read_step, whole.read_samples, whole.classes_unread) == (3, n, 0)
    for name in ("accuracy_start", "accuracy_before_trigger", "accuracy_after_trigger", "accuracy_after_buffers"):
        assert getattr(outcome, name) == getattr(whole, name)
    written = pa.Table.from_pylist([dict(row) for row in outcome.trace], schema=TRACE_SCHEMA)
    assert written.column("test_samples").to_pylist() == column(outcome, "test_samples")


@pytest.mark.parametrize(("size", "every"), [(60, 1), (None, 2), (60, 9)])
def test_attack_and_monitors_know_what_was_read_and_never_what_was_measured_for_the_record(
    stream: Stream, victim: NewLearner, size: int | None, every: int
) -> None:
    run = dataclasses.replace(RUN, steps=4, evaluate_size=size, evaluate_every=every)
    attack, monitor = Reader(3), Watching()
    outcome = run_online(victim(), stream, attack, run, monitors=[monitor])
    assert (outcome.steps, outcome.stopped_by) == (3, "attack")
    assert outcome.read_step == 3 // every * every
    start = outcome.accuracy_start
    assert attack.read[-1] == attack.read[-2] == (start, outcome.read_accuracy)  # in the trigger as at the end
    assert [len(shown) for shown in monitor.shown] == [2, 3, 4, 5]
    shown = monitor.shown[-1]
    assert (shown[0], shown[-1]) == (start, outcome.accuracy_after_trigger)
    assert shown[1:4] == [
        None if step % every else row["accuracy"] if step < 3 else outcome.read_accuracy
        for step, row in list(enumerate(outcome.trace))[1:4]
    ]
    if every == 9:  # longer than the run: the start is all that anybody reads
        assert set(attack.read) == {(start, start)}
        assert column(outcome, "test_samples") == [len(stream.test), None, None, len(stream.test), len(stream.test)]


def test_a_halted_run_ends_with_the_whole_test_part(stream: Stream, victim: NewLearner) -> None:
    run = dataclasses.replace(SOME, on_alarm="halt")
    outcome = run_online(victim(), stream, Noise(eps=0.1), run, monitors=[Alarm(2)])
    assert (outcome.status, column(outcome, "test_samples")) == ("halted", [len(stream.test), 60, len(stream.test)])
    assert (outcome.read_step, outcome.read_samples) == (2, 60)
    assert outcome.accuracy_before_trigger == column(outcome, "accuracy")[-1]


def test_an_interrupted_run_on_a_subset_goes_on_to_the_same_rows_and_shows_monitors_the_same(
    stream: Stream, victim: NewLearner
) -> None:
    kept: list[tuple[Progress, Snapshot]] = []
    learner, watching = victim(), Watching()
    whole = run_online(
        learner,
        stream,
        Noise(eps=0.1),
        SOME,
        monitors=[watching],
        on_step=lambda progress: kept.append((copy.deepcopy(progress), learner.snapshot())),
    )
    assert len(kept) == 3
    for progress, snapshot in kept:
        again, there = victim(), Watching()
        again.restore(snapshot)
        progress.read = None  # it is not among what a resume point keeps
        resumed = run_online(again, stream, Noise(eps=0.1), SOME, monitors=[there], progress=progress)
        assert timeless_rows(resumed.trace) == timeless_rows(whole.trace)
        assert timeless(resumed.summary()) == timeless(whole.summary())
        assert there.shown[-1] == watching.shown[-1]


def test_a_subset_of_all_samples_is_the_whole_part_and_a_larger_one_is_refused(
    stream: Stream, victim: NewLearner
) -> None:
    n = len(stream.test)
    whole = run_online(victim(), stream, Noise(eps=0.1), RUN)
    outcome = run_online(victim(), stream, Noise(eps=0.1), dataclasses.replace(RUN, evaluate_size=n))
    assert timeless_rows(outcome.trace) == timeless_rows(whole.trace)
    learner = victim()
    before = learner.snapshot()
    with pytest.raises(ConfigError, match=f"evaluate_size = {n + 1}: the test part has {n} samples"):
        run_online(learner, stream, Noise(eps=0.1), dataclasses.replace(RUN, evaluate_size=n + 1))
    assert equal_bits(before, learner.snapshot())


def test_measuring_in_bfloat16_agrees_with_single_precision_and_changes_nothing_else(
    stream: Stream, victim: NewLearner
) -> None:
    whole = run_online(victim(), stream, Noise(eps=0.1), RUN)
    run = dataclasses.replace(RUN, evaluate_precision="bfloat16")
    outcome = run_online(victim(), stream, Noise(eps=0.1), run)
    measured = {"accuracy", "loss"}
    for row, full in zip(timeless_rows(outcome.trace), timeless_rows(whole.trace), strict=True):
        assert {k: v for k, v in row.items() if k not in measured} == {
            k: v for k, v in full.items() if k not in measured
        }
        # Eight bits of mantissa in three layers; a sample in between may change sides.
        assert row["loss"] == pytest.approx(full["loss"], rel=0.05)
        assert row["accuracy"] == pytest.approx(full["accuracy"], abs=3 / len(stream.test))
    assert column(outcome, "loss") != column(whole, "loss")
