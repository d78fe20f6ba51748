"""The online loop: a stream, an attack, a learner with its defence, monitors; one trace row a step."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.optim import SGD, Optimizer

from mithridate.core.attack import Attack
from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError
from mithridate.core.model import BatchNormMode, Snapshot, WhiteBox
from mithridate.core.registry import settings
from mithridate.core.seeding import generator
from mithridate.core.update_attack import UpdateAttack
from mithridate.core.view import Memory, Need, View
from mithridate.core.watch import Monitor, Reading
from mithridate.data.stream import Stream
from mithridate.maths.norms import sample_norms
from mithridate.simulation.scoring import CLEAN, OOD, RECEIVED, Scorer, score_batches, score_columns
from mithridate.training.learner import Learner, Score, Update

Row = dict[str, Any]
"""One row of the trace; `bench.store.TRACE_SCHEMA` says what the columns mean."""

EVALUATION_BATCH = 500


@settings
class OnlineRun:
    """How the victim learns from the stream, and how long.

    Args:
        steps: Batches of the accumulative phase at most; the trigger batch comes on top.
        lr: Learning rate of the victim's SGD.
        momentum: Its momentum factor.
        weight_decay: Its L2 penalty.
        restore_momentum: Go on with the burn-in's momentum instead of a fresh optimiser.
        update_mode: BatchNorm in the victim's updates: `train` uses and records the batch's statistics, `eval` none.
        on_alarm: What a monitor's alarm does: `record` it only; `trigger`: the attacker ends the phase and fires;
            `halt`: the service stops learning before the trigger.
        images: Pictures stored of the first accumulative batch and of the trigger, clean and poisoned.
        save_every: Steps between resume points.
        ood: An image set that detectors score beside the stream (its test part, fitted to the model's input); never
            learned from. Unset: none.

    Source:
        Pang et al., NeurIPS 2021, section 4: SGD, lr 0.1, momentum 0.9. The released code starts a fresh optimiser
        without weight decay.
    """

    steps: Annotated[int, Field(ge=0)] = 20
    lr: Annotated[float, Field(gt=0)] = 0.1
    momentum: Annotated[float, Field(ge=0)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    restore_momentum: bool = False
    update_mode: BatchNormMode = "train"
    on_alarm: Literal["record", "trigger", "halt"] = "record"
    images: Annotated[int, Field(ge=0)] = 8
    save_every: Annotated[int, Field(ge=1)] = 1
    ood: str | None = None


@dataclass
class Progress:
    """Where a run is: enough, with the learner's snapshot, to go on as if nothing had happened.

    Args:
        rows: Trace rows so far, the state before the stream first.
        memory: The attack's notes.
        images: Pictures taken so far.
        scores: What detectors said so far; see `simulation.scoring.score_batches`.
        changed: By step (as text), which received samples had been poisoned; kept where there are scores.
    """

    rows: list[Row] = field(default_factory=list)
    memory: Memory = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What one run came to.

    Args:
        accuracy_start: Test accuracy before the stream, a fraction.
        accuracy_before_trigger: After the accumulative phase.
        accuracy_after_trigger: After the one step on the trigger batch; None if the service was halted before it.
        drop: accuracy_before_trigger - accuracy_after_trigger; positive is damage. None if halted.
        accuracy_after_buffers: As if the trigger step had changed nothing but the buffers (BatchNorm statistics); None
            if halted, or if the defence serves another model than the one that learns.
        steps: Accumulative batches that the victim was sent.
        stopped_by: What ended the phase: `steps`, `attack` or `monitor`.
        status: `finished`, `diverged` (a loss became NaN or infinite) or `halted`.
        alarms: Steps at which a monitor raised an alarm, the trigger step included.
        first_alarm_step: The first of them; None if there was none.
        rolled_back: Steps that the defence did not keep.
        quarantined: Samples with NaN or infinite pixels that were kept from the model.
        flagged_clean: Share of the samples nobody had changed that the defence corrected, dropped or gave less weight,
            over all steps; None if there were none, or the defence treats all samples alike.
        flagged_poisoned: The same of the poisoned ones; 1 minus it is the attack's success (Zhu et al., Table 8).
        update_seconds: Mean time of one update, the defence's included.
        seconds: Time of all steps, evaluation included.
        trace: One row a step.
        images: Stored pictures.
        scores: What detectors said of each sample, by column; see `simulation.scoring.score_columns`.
    """

    accuracy_start: float
    accuracy_before_trigger: float
    accuracy_after_trigger: float | None
    drop: float | None
    accuracy_after_buffers: float | None
    steps: int
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
    trace: Sequence[Row]
    images: Mapping[str, Tensor]
    scores: Mapping[str, NDArray[Any]]

    def summary(self) -> dict[str, Any]:
        """The plain numbers, without trace, images and scores."""
        return {k: v for k, v in self.__dict__.items() if k not in {"trace", "images", "scores"}}


def online_optimiser(learner_parameters: Iterator[torch.nn.Parameter], run: OnlineRun) -> SGD:
    """The victim's optimiser in the stream: a fresh SGD."""
    return SGD(learner_parameters, lr=run.lr, momentum=run.momentum, weight_decay=run.weight_decay)


def adopt_momentum(optimiser: Optimizer, burned_in: Snapshot) -> None:
    """Give a fresh optimiser the state that the burn-in ended with; its own settings stay."""
    state = optimiser.state_dict()
    optimiser.load_state_dict({"state": burned_in.optimiser["state"], "param_groups": state["param_groups"]})


def start_row(learner: Learner, test: Sequence[Batch]) -> Row:
    """The trace row of the state before the first step."""
    began = time.perf_counter()
    score = learner.evaluate(test)
    measured = ("batch_loss", "gradient_norm", "bounded_norm", "update_norm", "poison_linf", "poison_l2")
    return {
        "step": 0,
        "phase": "start",
        "accuracy": score.accuracy,
        "loss": score.loss,
        **dict.fromkeys(measured),
        "poisoned": 0.0,
        "quarantined": 0,
        "flagged_clean": None,
        "flagged_poisoned": None,
        "admitted": True,
        "verdict": "",
        "alarms": "",
        "craft_seconds": 0.0,
        "update_seconds": 0.0,
        "seconds": time.perf_counter() - began,
    }


def phase_end(rows: Sequence[Row], steps: int, on_alarm: str, ready: Callable[[], bool]) -> str | None:
    """What ends the phase before the trigger now, if anything does: `steps`, `attack` or `monitor`.

    Args:
        rows: Of the trace so far.
        steps: The most there may be before the trigger.
        on_alarm: As in the run's settings.
        ready: Asks the attacker.
    """
    alarmed = bool(rows[-1]["alarms"])
    if alarmed and on_alarm == "halt":  # first: the service does not ask the attacker
        return "monitor"
    if len(rows) - 1 >= steps:
        return "steps"
    if ready():
        return "attack"
    return "monitor" if alarmed and on_alarm == "trigger" else None


class _Loop:
    """The pieces of one run, bound together; `run_online` is its only user."""

    def __init__(
        self,
        learner: Learner,
        stream: Stream,
        attack: Attack,
        run: OnlineRun,
        monitors: Sequence[Monitor],
        seed: int,
        progress: Progress,
        scorers: Sequence[Scorer],
        ood: Sequence[Batch],
        surrogate: WhiteBox | None,
    ) -> None:
        self.learner, self.stream, self.attack, self.run = learner, stream, attack, run
        self.monitors, self.seed, self.progress = monitors, seed, progress
        self.scorers, self.ood = scorers, ood
        self.test = list(stream.test.batches(EVALUATION_BATCH, device=learner.device))
        self.things: dict[Need, Any] = {
            Need.MODEL: learner.white_box,
            Need.TRIGGER: stream.trigger_batch(run.steps, seed, learner.device),
        }
        if len(stream.validation):
            self.things[Need.VALIDATION] = stream.validation.all(learner.device)
        if learner.history is not None:
            self.things[Need.HISTORY] = learner.history
        if surrogate is not None:
            self.things[Need.SURROGATE] = surrogate

    def view(self) -> View:
        """What the attack sees now."""
        return attack_view(self.attack, self.learner, self.progress, self.things)

    def start(self) -> None:
        """The row of the state before the stream."""
        self.progress.rows.append(start_row(self.learner, self.test))

    def step(self, phase: str) -> None:
        """Craft one batch, let the victim learn from it, measure."""
        began = time.perf_counter()
        index = len(self.progress.rows) - 1
        rng = generator("attack", self.seed, index)
        if phase == "trigger":
            clean = self.things[Need.TRIGGER]
            sent = self.attack.trigger(clean, self.view(), rng=rng)
            momentum = None
        else:
            clean = self.stream.victim_batch(index, self.seed, self.learner.device)
            sent = self.attack.poison(clean, self.view(), rng=rng)
            momentum = self.attack.weight_momentum
        crafted = time.perf_counter()
        if self.scorers:
            self._score(index + 1, clean, sent)
        scored = time.perf_counter()
        with _momentum(self.learner.optimiser, momentum):
            update = self.learner.update(sent)
        updated = time.perf_counter()
        if phase != "trigger":
            self.attack.fed(self.view(), generator("attack, fed", self.seed, index))
        adapted = time.perf_counter()
        score = self.learner.evaluate(self.test)
        self._picture(phase, clean, sent)
        row = _row(index + 1, phase, clean, sent, update, score)
        row["craft_seconds"] = crafted - began + adapted - updated
        row["update_seconds"] = updated - scored
        self.progress.rows.append(row)
        row["alarms"] = "; ".join(alarms_of(self.monitors, self.progress.rows))
        row["seconds"] = time.perf_counter() - began

    def _score(self, step: int, clean: Batch, sent: Batch) -> None:
        sources = {CLEAN: clean, RECEIVED: sent}
        if self.ood:
            sources[OOD] = self.ood[(step - 1) % len(self.ood)]
        self.progress.scores |= score_batches(self.scorers, self.learner, step, sources)
        self.progress.changed[str(step)] = _changed(clean, sent).cpu()

    def _picture(self, phase: str, clean: Batch, sent: Batch) -> None:
        if f"{phase}.clean" not in self.progress.images and self.run.images:
            self.progress.images[f"{phase}.clean"] = clean.x[: self.run.images].cpu().clone()
            self.progress.images[f"{phase}.poisoned"] = sent.x[: self.run.images].cpu().clone()

    def phase_over(self) -> str | None:
        """What ends the accumulative phase now, if anything does."""
        rows, run = self.progress.rows, self.run
        return phase_end(rows, run.steps, run.on_alarm, lambda: self.attack.ready(self.view()))


def attack_view(
    attack: Attack | UpdateAttack, learner: Learner, progress: Progress, things: Mapping[Need, Any]
) -> View:
    """What an attack sees now: what it declares of the things, and the accuracies published so far."""
    rows = progress.rows
    now = {**things, Need.ACCURACY: (rows[0]["accuracy"], rows[-1]["accuracy"])}
    return View(learner.step, progress.memory, now, attack.needs, type(attack).__name__)


def alarms_of(monitors: Sequence[Monitor], rows: Sequence[Row]) -> list[str]:
    """What monitors say of a trace so far."""
    readings = [Reading(r["step"], r["accuracy"], r["loss"], r["batch_loss"]) for r in rows]
    return [text for monitor in monitors if (text := monitor.alarm(readings)) is not None]


def accuracy_with_buffers_alone(learner: Learner, test: Sequence[Batch], before: Snapshot) -> float | None:
    """Test accuracy with the parameters from before the last step and the buffers from after it.

    Args:
        learner: After the step; comes back as it was.
        test: What accuracy is measured on.
        before: The learner before the step.

    Returns:
        None where another model than the one that learns is served: its buffers are not this step's.
    """
    if learner.defence.serve(learner.view()) is not None:
        return None
    after = learner.snapshot()
    learner.restore(before)
    learner.restore_buffers(after.buffers)
    score = learner.evaluate(test)
    learner.restore(after)
    return score.accuracy


def run_online(
    learner: Learner,
    stream: Stream,
    attack: Attack,
    run: OnlineRun | None = None,
    *,
    monitors: Sequence[Monitor] = (),
    seed: int = 0,
    progress: Progress | None = None,
    on_step: Callable[[Progress], None] | None = None,
    scorers: Sequence[Scorer] = (),
    ood: Sequence[Batch] = (),
    surrogate: WhiteBox | None = None,
) -> Outcome:
    """Let a learner learn from a stream under attack: an accumulative phase, then one trigger batch.

    Args:
        learner: After its burn-in, with its defence; changed in place.
        stream: Where batches come from.
        attack: What happens to them.
        run: Length and options of the loop (its optimiser fields are for `online_optimiser`).
        monitors: Watch the readings.
        seed: Order of the stream and all the attack's draws. Same seed, same machine: same bits.
        progress: Where an interrupted run had come to; the learner must be at the same point.
        on_step: Called after every step of the phase, for progress bars and resume points.
        scorers: Fitted detectors that score every batch, before the learner sees it and before it was poisoned.
        ood: Batches of another image set that they score too, one a step, in turn; never learned from.
        surrogate: The model that an attack without access to the victim's crafts on.

    Raises:
        DataError: The stream is too short for the steps.
        ThreatModelError: The attack looks at what it does not declare.
    """
    run = run or OnlineRun()
    stream.require(run.steps)
    progress = progress or Progress()
    loop = _Loop(learner, stream, attack, run, monitors, seed, progress, scorers, ood, surrogate)
    if not progress.rows:
        loop.start()
    while (stopped_by := loop.phase_over()) is None:
        loop.step("accumulative")
        if on_step:
            on_step(progress)
    halted = stopped_by == "monitor" and run.on_alarm == "halt"
    after_buffers = None
    if not halted:
        before = learner.snapshot()
        loop.step("trigger")
        after_buffers = accuracy_with_buffers_alone(learner, loop.test, before)
    return outcome_of(progress, stopped_by, halted, after_buffers)


def outcome_of(progress: Progress, stopped_by: str, halted: bool, after_buffers: float | None) -> Outcome:
    """What a run came to.

    Args:
        progress: At its end.
        stopped_by: What ended the phase before the trigger.
        halted: Whether the service stopped before the trigger.
        after_buffers: As in `Outcome.accuracy_after_buffers`.
    """
    rows = progress.rows
    before = rows[-1]["accuracy"] if halted else rows[-2]["accuracy"]
    after = None if halted else rows[-1]["accuracy"]
    losses = [r[key] for r in rows for key in ("loss", "batch_loss") if r[key] is not None]
    alarmed = [r["step"] for r in rows if r["alarms"]]
    diverged = not all(math.isfinite(loss) for loss in losses)
    return Outcome(
        accuracy_start=rows[0]["accuracy"],
        accuracy_before_trigger=before,
        accuracy_after_trigger=after,
        drop=None if after is None else before - after,
        accuracy_after_buffers=after_buffers,
        steps=sum(r["phase"] == "accumulative" for r in rows),
        stopped_by=stopped_by,
        status="halted" if halted else "diverged" if diverged else "finished",
        alarms=len(alarmed),
        first_alarm_step=alarmed[0] if alarmed else None,
        rolled_back=sum(not r["admitted"] for r in rows),
        quarantined=sum(r["quarantined"] for r in rows),
        flagged_clean=_mean(rows, "flagged_clean"),
        flagged_poisoned=_mean(rows, "flagged_poisoned"),
        update_seconds=_mean(rows[1:], "update_seconds") or 0.0,
        seconds=sum(r["seconds"] for r in rows),
        trace=rows,
        images=progress.images,
        scores=score_columns(progress.scores, {int(step): mask for step, mask in progress.changed.items()}),
    )


def _mean(rows: Sequence[Row], column: str) -> float | None:
    """Mean of a column over the steps that have it; all batches of a stream are equally long."""
    found = [row[column] for row in rows if row[column] is not None]
    return sum(found) / len(found) if found else None


def _changed(clean: Batch, sent: Batch) -> Tensor:
    """(n,) bool, the samples that were poisoned."""
    return sent.x.ne(clean.x).flatten(1).any(1)


def _share(flagged: Tensor | None, among: Tensor) -> float | None:
    return float(flagged[among].float().mean()) if flagged is not None and bool(among.any()) else None


def _row(step: int, phase: str, clean: Batch, sent: Batch, update: Update, score: Score) -> Row:
    delta = sent.x - clean.x
    changed = _changed(clean, sent)
    return {
        "step": step,
        "phase": phase,
        "accuracy": score.accuracy,
        "loss": score.loss,
        "batch_loss": update.batch_loss if update.learned else None,
        "gradient_norm": update.gradient_norm,
        "bounded_norm": update.bounded_norm,
        "update_norm": update.update_norm,
        "poison_linf": float(delta.abs().max()),
        "poison_l2": float(sample_norms(delta[changed], "l2").mean()) if bool(changed.any()) else 0.0,
        "poisoned": float(changed.float().mean()),
        "quarantined": update.quarantined,
        "flagged_clean": _share(update.flagged, ~changed.cpu()),
        "flagged_poisoned": _share(update.flagged, changed.cpu()),
        "admitted": update.verdict.admit,
        "verdict": update.verdict.reason,
    }


@contextmanager
def _momentum(optimiser: Optimizer, factor: float | None) -> Iterator[None]:
    """Another momentum factor for the steps inside; None changes nothing."""
    if factor is None:
        yield
        return
    if any("momentum" not in group for group in optimiser.param_groups):
        raise ConfigError(
            f"weight_momentum needs an optimiser with momentum, not {type(optimiser).__name__}; unset it."
        )
    own = [group["momentum"] for group in optimiser.param_groups]
    for group in optimiser.param_groups:
        group["momentum"] = factor
    try:
        yield
    finally:
        for group, value in zip(optimiser.param_groups, own, strict=True):
            group["momentum"] = value
