"""A run: an accumulative phase, one trigger, and what it came to. Streams and federations differ in `exchange`."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import SGD, Optimizer

from mithridate.core.attack import Attack
from mithridate.core.batch import AnyBatch
from mithridate.core.domain import Domain
from mithridate.core.past import Snapshot, Weights
from mithridate.core.seeding import derived_seed, generator, seeded_default
from mithridate.core.update_attack import UpdateAttack
from mithridate.core.view import Memory, Need, View
from mithridate.core.watch import Monitor, Reading
from mithridate.data.part import Part
from mithridate.simulation.evaluation import NOT_MEASURED, Evaluation, EvaluationSettings, Measurement
from mithridate.simulation.scoring import score_columns
from mithridate.simulation.trace import NOTHING_SENT, Phase, Seconds, Sent, TraceRow
from mithridate.training.learner import Learner

OnAlarm = Literal["record", "trigger", "halt"]


class RunSettings(EvaluationSettings, Protocol):
    """What online and federated runs have in common."""

    @property
    def steps(self) -> int:
        """Steps before the trigger at most."""

    @property
    def lr(self) -> float:
        """Learning rate of the victim's SGD."""

    @property
    def momentum(self) -> float:
        """Momentum factor of the victim's SGD."""

    @property
    def weight_decay(self) -> float:
        """L2 penalty of the victim's SGD."""

    @property
    def on_alarm(self) -> OnAlarm:
        """What a monitor's alarm does."""

    @property
    def evaluate_every(self) -> int:
        """Steps between two measurements of the test part, >= 1."""


class Tested(Protocol):
    """What a run needs of the samples beside those that are learned from."""

    @property
    def domain(self) -> Domain:
        """What a valid input is."""

    @property
    def test(self) -> Part:
        """What accuracy is reported on."""

    @property
    def validation(self) -> Part:
        """The attacker's own samples; perhaps none."""


def victim_optimiser(model: torch.nn.Module, run: RunSettings) -> SGD:
    """The victim's optimiser in a run: a fresh SGD.

    Args:
        model: Whose parameters it steps.
        run: Gives lr, momentum and weight_decay.
    """
    return SGD(model.parameters(), lr=run.lr, momentum=run.momentum, weight_decay=run.weight_decay)


def adopt_momentum(optimiser: Optimizer, burned_in: Snapshot) -> None:
    """Give a fresh optimiser the state that the burn-in ended with; its own settings stay.

    Args:
        optimiser: Changed in place; over the same parameters, in the same order.
        burned_in: The end of the burn-in.

    Raises:
        ValueError: The burn-in's optimiser had other parameters.
    """
    state = optimiser.state_dict()
    optimiser.load_state_dict({"state": burned_in.optimiser["state"], "param_groups": state["param_groups"]})


class Read(NamedTuple):
    """The newest measurement that attack, monitors and whoever watches know of.

    Args:
        step: After which it was made.
        accuracy: A fraction.
        samples: Test samples that it was made on.
    """

    step: int
    accuracy: float
    samples: int


@dataclass
class Progress:
    """Where a run is: enough, with the learner's snapshot, to go on as if nothing had happened.

    Args:
        rows: Trace rows so far, the state before the stream first.
        memory: The attack's notes.
        rule: The notes of a federation's robust rule.
        images: Pictures taken so far.
        scores: What detectors said so far; see `simulation.scoring.score_batches`.
        changed: By step (as text), which received samples had been poisoned; kept where there are scores.
        read: The newest measurement that was made in its turn; None before the first. A run that goes on finds it in
            its rows.
    """

    rows: list[TraceRow] = field(default_factory=list)
    memory: Memory = field(default_factory=dict)
    rule: Memory = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    read: Read | None = None

    @property
    def newest(self) -> Read:
        """What was measured last: at the start, if nothing has been since."""
        if self.read is None:
            raise RuntimeError("nothing is known of a run before its start")
        return self.read


@dataclass(frozen=True)
class Outcome:
    """What one run came to.

    Args:
        accuracy_start: Test accuracy before the stream, a fraction.
        read_step: The step whose accuracy whoever ended the phase had read last: with `evaluate_every = 1`, that of
            the last one before the trigger.
        read_accuracy: What was read there, a fraction.
        read_samples: Test samples that this was measured on. The accuracies below are of the whole test part.
        classes_unread: Classes of the test part without a sample in the subset of `evaluate_size`.
        accuracy_before_trigger: Test accuracy after the accumulative phase.
        accuracy_after_trigger: Test accuracy after the step on the trigger batch; None if halted before it.
        drop: accuracy_before_trigger - accuracy_after_trigger; positive is damage. None if halted.
        accuracy_after_buffers: Test accuracy if the trigger step had changed nothing but the buffers (BatchNorm
            statistics); None if halted, or if the defence serves another model than the one that learns.
        steps: Accumulative batches that the victim was sent; rounds, in a federation.
        phase_asked: Whether the attack has a phase before its trigger: at the best accuracy it would not fire at once.
        stopped_by: What ended the phase: `steps`, `attack` or `monitor`.
        status: `finished`, `diverged` (a loss became NaN or infinite) or `halted`.
        alarms: Steps at which a monitor raised an alarm, the trigger step included.
        first_alarm_step: The first step with an alarm; None if there was none.
        rolled_back: Steps that the defence did not keep.
        quarantined: Samples with NaN or infinity, or updates that were not finite, kept from the model.
        flagged_clean: Share of the unchanged samples that the defence corrected, dropped or gave less weight, over all
            steps; None if there were none, or the defence treats all samples alike.
        flagged_poisoned: Share of the poisoned samples that it corrected, dropped or gave less weight; 1 minus it is
            the attack's success (Zhu et al., Table 8).
        update_seconds: Mean time of one update, the defence's included.
        seconds: Time of all steps, evaluation included.
        trace: One row a step.
        images: Stored pictures.
        scores: What detectors said of each sample, by column; see `simulation.scoring.score_columns`.
    """

    accuracy_start: float
    read_step: int
    read_accuracy: float
    read_samples: int
    classes_unread: int
    accuracy_before_trigger: float
    accuracy_after_trigger: float | None
    drop: float | None
    accuracy_after_buffers: float | None
    steps: int
    phase_asked: bool
    stopped_by: str
    status: str
    alarms: int
    first_alarm_step: int | None
    rolled_back: int
    quarantined: int
    flagged_clean: float | None
    flagged_poisoned: float | None
    update_seconds: float
    seconds: float
    trace: Sequence[TraceRow]
    images: Mapping[str, Tensor]
    scores: Mapping[str, NDArray[Any]]

    def summary(self) -> dict[str, Any]:
        """The outcome without trace, images and scores."""
        return {k: v for k, v in self.__dict__.items() if k not in {"trace", "images", "scores"}}


class Exchange(NamedTuple):
    """What attacker and learner did in one step.

    Args:
        sent: Columns of the trace.
        craft_seconds: The attack's time before the update.
        update_seconds: The learner's and the defence's time.
    """

    sent: Sent
    craft_seconds: float
    update_seconds: float


class Simulation(ABC):
    """A run: asks the attacker, lets the learner learn, measures, stops."""

    key: ClassVar[str]
    """Names the attack's generators; part of what decides the bits."""

    attack: Attack | UpdateAttack

    def __init__(
        self,
        learner: Learner,
        stream: Tested,
        attack: Attack | UpdateAttack,
        run: RunSettings,
        trigger: AnyBatch,
        *,
        seed: int,
        monitors: Sequence[Monitor],
        progress: Progress,
    ) -> None:
        self.learner, self.attack, self.settings, self.seed = learner, attack, run, seed
        self.monitors, self.progress = monitors, progress
        self.readings = [_reading(row) for row in progress.rows]  # kept: a step costs the same however long the run
        if learner.domain is None:
            learner.domain = stream.domain
        self.domain = stream.domain
        self.evaluation = Evaluation.of(stream.test, run, seed, learner.device)
        progress.read = next((read for row in reversed(progress.rows) if (read := _read(row))), None)
        self.available: dict[Need, Any] = {Need.MODEL: learner.white_box, Need.TRIGGER: trigger}
        if len(stream.validation):
            self.available[Need.VALIDATION] = stream.validation.all(learner.device)
        if learner.history is not None:
            self.available[Need.HISTORY] = learner.history
        attack.check_inputs(trigger)
        learner.defence.check_inputs(trigger)

    @abstractmethod
    def exchange(self, index: int, phase: Phase, rng: torch.Generator) -> Exchange:
        """Let the attacker send and the learner learn.

        Args:
            index: Which step, from 0.
            phase: `accumulative` or `trigger`.
            rng: The attack's randomness.
        """

    def view(self) -> View:
        """What the attack sees now."""
        rows = self.progress.rows
        published = {Need.ACCURACY: (rows[0]["accuracy"], self.progress.newest.accuracy)}
        attack = self.attack
        available = {**self.available, **published}
        return View(
            self.learner.step, self.progress.memory, available, attack.needs, type(attack).__name__, self.domain
        )

    def _has_phase(self) -> bool:
        """Whether the attack would not fire at once, if nobody could notice anything."""
        at_best = {**self.available, Need.ACCURACY: (1.0, 1.0)}
        return not self.attack.ready(replace(self.view(), step=0, memory={}, available=at_best))

    def start(self) -> None:
        """The row of the state before the first step."""
        began = time.perf_counter()
        measured = self.evaluation.measure(self.learner, whole=True)
        seconds = time.perf_counter() - began
        self._note("start", NOTHING_SENT, measured, {"craft_seconds": 0.0, "update_seconds": 0.0, "seconds": seconds})

    def step(self, phase: Phase) -> None:
        """One step: send, learn, and measure if it is its turn."""
        began = time.perf_counter()
        index = len(self.progress.rows) - 1
        exchange = self.exchange(index, phase, generator(self.key, self.seed, index))
        exchanged = time.perf_counter()
        if phase != "trigger":
            # A generator's key decides the bits, so this one keeps its wording.
            self.attack.after_step(self.view(), generator(f"{self.key}, fed", self.seed, index))
        adapted = time.perf_counter()
        whole = phase == "trigger"
        due = whole or (index + 1) % self.settings.evaluate_every == 0
        measured = self.evaluation.measure(self.learner, whole=whole) if due else NOT_MEASURED
        self._note(
            phase,
            exchange.sent,
            measured,
            {
                "craft_seconds": exchange.craft_seconds + adapted - exchanged,
                "update_seconds": exchange.update_seconds,
                "seconds": time.perf_counter() - began,
            },
        )

    def _note(self, phase: Phase, sent: Sent, measured: Measurement, seconds: Seconds) -> None:
        """Write a row of the trace, monitors' alarms included."""
        rows = self.progress.rows
        rows.append(
            {
                "step": len(rows),
                "phase": phase,
                "accuracy": measured.accuracy,
                "loss": measured.loss,
                "test_samples": measured.test_samples,
                **sent,
                "alarms": "",
                **seconds,
            }
        )
        self.progress.read = _read(rows[-1]) or self.progress.read
        self.readings.append(_reading(rows[-1]))
        if phase != "start":
            alarms = [text for monitor in self.monitors if (text := monitor.alarm(self.readings)) is not None]
            rows[-1]["alarms"] = "; ".join(alarms)

    def _record_whole(self) -> None:
        """Measure the state before the trigger on the whole test part, if its row is not of that: for the record alone.

        What is read, by whoever sends, stops or watches, stays what it was.
        """
        row = self.progress.rows[-1]
        if row["test_samples"] != self.evaluation.size:
            began = time.perf_counter()
            row["accuracy"], row["loss"], row["test_samples"] = self.evaluation.measure(self.learner, whole=True)
            row["seconds"] += time.perf_counter() - began

    def phase_end(self) -> str | None:
        """What ends the phase before the trigger now, if anything does: `steps`, `attack` or `monitor`."""
        rows = self.progress.rows
        alarmed = bool(rows[-1]["alarms"])
        if alarmed and self.settings.on_alarm == "halt":  # first: the service does not ask the attacker
            return "monitor"
        if len(rows) - 1 >= self.settings.steps:
            return "steps"
        if self.attack.ready(self.view()):
            return "attack"
        return "monitor" if alarmed and self.settings.on_alarm == "trigger" else None

    def draws(self) -> AbstractContextManager[None]:
        """What a model draws in the coming step (dropout) follows from the seed: a resumed run has the same bits."""
        return seeded_default(derived_seed("model", self.seed, len(self.progress.rows)), self.learner.device)

    def go(self, on_step: Callable[[Progress], None] | None) -> Outcome:
        """The whole run, from where its progress stands.

        Args:
            on_step: Called after every step of the phase.
        """
        if not self.progress.rows:
            with self.draws():
                self.start()
        while (stopped_by := self.phase_end()) is None:
            with self.draws():
                self.step("accumulative")
            if on_step:
                on_step(self.progress)
        read = self.progress.newest
        with self.draws():
            self._record_whole()  # after the question: nobody stops by what was measured because it was to stop
        if stopped_by == "monitor" and self.settings.on_alarm == "halt":
            return self._outcome(stopped_by, read, None)
        before = Weights.of(self.learner.model).copied()
        with self.draws():
            self.step("trigger")
        return self._outcome(stopped_by, read, before)

    def _outcome(self, stopped_by: str, read: Read, before: Weights | None) -> Outcome:
        """What the run came to.

        Args:
            stopped_by: What ended the phase.
            read: What was known when it ended.
            before: The weights before the trigger step; None if there was none.
        """
        progress, rows = self.progress, self.progress.rows
        halted = before is None
        start, accuracy_before, last = (rows[i]["accuracy"] for i in (0, -1 if halted else -2, -1))
        assert start is not None and accuracy_before is not None  # noqa: S101, PT018  (`go` measured both)
        accuracy_after = None if halted else last
        losses = [loss for r in rows for loss in (r["loss"], r["batch_loss"]) if loss is not None]
        alarmed = [r["step"] for r in rows if r["alarms"]]
        steps = sum(r["phase"] == "accumulative" for r in rows)
        diverged = not all(math.isfinite(loss) for loss in losses)
        return Outcome(
            accuracy_start=start,
            read_step=read.step,
            read_accuracy=read.accuracy,
            read_samples=read.samples,
            classes_unread=self.evaluation.classes_unread,
            accuracy_before_trigger=accuracy_before,
            accuracy_after_trigger=accuracy_after,
            drop=None if accuracy_after is None else accuracy_before - accuracy_after,
            accuracy_after_buffers=None if before is None else self._accuracy_with_buffers_alone(before),
            steps=steps,
            phase_asked=steps > 0 or self._has_phase(),
            stopped_by=stopped_by,
            status="halted" if halted else "diverged" if diverged else "finished",
            alarms=len(alarmed),
            first_alarm_step=alarmed[0] if alarmed else None,
            rolled_back=sum(not r["admitted"] for r in rows),
            quarantined=sum(r["quarantined"] for r in rows),
            flagged_clean=_mean(r["flagged_clean"] for r in rows),
            flagged_poisoned=_mean(r["flagged_poisoned"] for r in rows),
            update_seconds=_mean(r["update_seconds"] for r in rows[1:]) or 0.0,
            seconds=sum(r["seconds"] for r in rows),
            trace=rows,
            images=progress.images,
            scores=score_columns(progress.scores, {int(step): mask for step, mask in progress.changed.items()}),
        )

    def _accuracy_with_buffers_alone(self, before: Weights) -> float | None:
        """Test accuracy with the parameters from before the last step and the buffers from after it.

        None where another model than the one that learns is served: its buffers are not this step's.
        """
        learner = self.learner
        if learner.defence.serve(learner.view()) is not None:
            return None
        now = Weights.of(learner.model)
        mixed = Weights(before.parameters, now.buffers)
        return self.evaluation.measure(learner, whole=True, weights=mixed).accuracy


def _reading(row: TraceRow) -> Reading:
    return Reading(row["step"], row["accuracy"], row["loss"], row["batch_loss"])


def _read(row: TraceRow) -> Read | None:
    """What a row says was measured after its step; None if nothing was."""
    if row["accuracy"] is None or row["test_samples"] is None:
        return None
    return Read(row["step"], row["accuracy"], row["test_samples"])


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None, unweighted: all batches of a stream are equally long."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
