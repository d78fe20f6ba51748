"""The online loop: a stream, an attack, a learner with its defence, monitors; one trace row a step."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from mithridate.core.attack import Attack
from mithridate.core.batch import AnyBatch, Batch, tensors_of
from mithridate.core.errors import ConfigError
from mithridate.core.model import WhiteBox
from mithridate.core.modes import BatchNormMode
from mithridate.core.registry import settings
from mithridate.core.sgd import LearningRate, Momentum
from mithridate.core.view import Need
from mithridate.core.watch import Monitor
from mithridate.maths.norms import sample_norms
from mithridate.simulation.run import Exchange, OnAlarm, Outcome, Progress, Simulation, Tested
from mithridate.simulation.scoring import CLEAN, OOD, RECEIVED, Scorer, score_batches
from mithridate.simulation.trace import Phase, Sent
from mithridate.training.learner import EvaluationPrecision, Learner, Update

IMAGE_DIMENSIONS = 4


@settings
class OnlineRun:
    """How the victim learns from the stream, and how long.

    Args:
        steps: Batches of the accumulative phase at most; the trigger batch comes on top.
        lr: Learning rate of the victim's SGD, in (0, 1e6).
        momentum: Momentum factor of the victim's SGD, in [0, 1).
        weight_decay: L2 penalty of the victim's SGD.
        restore_momentum: Go on with the burn-in's momentum instead of a fresh optimiser.
        update_mode: BatchNorm in the victim's updates: `train` uses and records the batch's statistics, `eval` none.
        on_alarm: What a monitor's alarm does: `record` it only; `trigger`: the attacker ends the phase and fires;
            `halt`: the service stops learning before the trigger.
        images: Pictures stored of the first accumulative batch and of the trigger, clean and poisoned.
        evaluate_every: Steps between two measurements of the test part; it is measured at the start, before and after
            the trigger in any case. Attacks and monitors know of no other than that of the start and those between.
        evaluate_size: Samples of the test part that are measured at the steps between, the same in the whole run, of
            each class its share; the seed draws them. At the start, before and after the trigger it is always the
            whole part. Unset: all.
        evaluate_precision: `bfloat16` measures with convolutions and products of matrices rounded to it, which is
            faster on processors that have it (AVX-512 BF16, AMX, GPUs), and many times slower on others.
        save_every: Steps between resume points.
        ood: An image set that detectors score beside the stream (its test part, fitted to the model's input); never
            learned from. Unset: none.

    Source:
        Pang et al., NeurIPS 2021, section 4: SGD, lr 0.1, momentum 0.9. The released code starts a fresh optimiser
        without weight decay.
    """

    steps: Annotated[int, Field(ge=0)] = 20
    lr: LearningRate = 0.1
    momentum: Momentum = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    restore_momentum: bool = False
    update_mode: BatchNormMode = "train"
    on_alarm: OnAlarm = "record"
    images: Annotated[int, Field(ge=0)] = 8
    evaluate_every: Annotated[int, Field(ge=1)] = 1
    evaluate_size: Annotated[int, Field(ge=1)] | None = None
    evaluate_precision: EvaluationPrecision = "float32"
    save_every: Annotated[int, Field(ge=1)] = 1
    ood: str | None = None


class Feed(Tested, Protocol):
    """Where a run's batches come from: a `Stream`, or what else gives the same batch when it is asked again."""

    def require(self, steps: int) -> None:
        """Refuse a run that is longer.

        Args:
            steps: Accumulative batches; the trigger batch comes on top.

        Raises:
            DataError: They do not fit.
        """

    def victim_batch(self, step: int, seed: int, device: torch.device | str = "cpu") -> AnyBatch:
        """One clean batch, which depends on the arguments alone.

        Args:
            step: Which one, from 0.
            seed: Of the run.
            device: Where the batch goes.
        """

    def trigger_batch(self, steps: int, seed: int, device: torch.device | str = "cpu") -> AnyBatch:
        """The batch after the last accumulative one.

        Args:
            steps: Accumulative batches before it.
            seed: Of the run.
            device: Where the batch goes.
        """


class _Online(Simulation):
    """Batches of a stream, poisoned before the learner learns from them."""

    key: ClassVar[str] = "attack"
    attack: Attack

    def __init__(
        self,
        learner: Learner,
        stream: Feed,
        attack: Attack,
        run: OnlineRun,
        *,
        monitors: Sequence[Monitor],
        seed: int,
        progress: Progress,
        scorers: Sequence[Scorer],
        ood: Sequence[Batch],
        surrogate: WhiteBox | None,
    ) -> None:
        trigger = stream.trigger_batch(run.steps, seed, learner.device)
        super().__init__(learner, stream, attack, run, trigger, seed=seed, monitors=monitors, progress=progress)
        self.stream, self.images, self.scorers, self.ood = stream, run.images, scorers, ood
        if surrogate is not None:
            self.available[Need.SURROGATE] = surrogate

    def exchange(self, index: int, phase: Phase, rng: torch.Generator) -> Exchange:
        """Craft one batch, and let the victim learn from it."""
        began = time.perf_counter()
        if phase == "trigger":
            clean: AnyBatch = self.available[Need.TRIGGER]
            sent = self.attack.trigger(clean, self.view(), rng=rng)
            momentum = None
        else:
            clean = self.stream.victim_batch(index, self.seed, self.learner.device)
            sent = self.attack.poison(clean, self.view(), rng=rng)
            momentum = self.attack.weight_momentum
        ascent = self.attack.ascent(self.view())
        crafted = time.perf_counter()
        if self.scorers:
            self._score(index + 1, clean, sent)
        scored = time.perf_counter()
        with _momentum(self.learner.optimiser, momentum):
            update = self.learner.update(sent)
        updated = time.perf_counter()
        self._picture(phase, clean, sent)
        return Exchange(_sent(clean, sent, update, ascent), crafted - began, updated - scored)

    def _score(self, step: int, clean: AnyBatch, sent: AnyBatch) -> None:
        sources = {CLEAN: clean, RECEIVED: sent}
        if self.ood:
            sources[OOD] = self.ood[(step - 1) % len(self.ood)]
        self.progress.scores |= score_batches(self.scorers, self.learner, step, sources)
        self.progress.changed[str(step)] = _changed(clean, sent).cpu()

    def _picture(self, phase: Phase, clean: AnyBatch, sent: AnyBatch) -> None:
        images = self.progress.images
        pictured = isinstance(clean.x, Tensor) and clean.x.ndim == IMAGE_DIMENSIONS
        if pictured and self.images and f"{phase}.clean" not in images:
            images[f"{phase}.clean"] = clean.x[: self.images].cpu().clone()
            images[f"{phase}.poisoned"] = sent.x[: self.images].cpu().clone()


def run_online(
    learner: Learner,
    stream: Feed,
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
        run: Length and options of the loop (its optimiser fields are for `victim_optimiser`).
        monitors: Watch the readings.
        seed: Order of the stream and all the attack's draws. Same seed, same machine: same bits.
        progress: Where an interrupted run had come to; the learner must be at the same point.
        on_step: Called after every step of the phase, for progress bars and resume points.
        scorers: Fitted detectors that score every batch, before the learner sees it and before it was poisoned.
        ood: Batches of another image set that the detectors score too, one a step, in turn; never learned from.
        surrogate: The model that an attack without access to the victim's crafts on.

    Raises:
        DataError: The stream is too short for the steps.
        ConfigError: Attack or defence cannot work on inputs of this kind.
        ThreatModelError: The attack looks at what it does not declare.
    """
    run = run or OnlineRun()
    stream.require(run.steps)
    return _Online(
        learner,
        stream,
        attack,
        run,
        monitors=monitors,
        seed=seed,
        progress=progress or Progress(),
        scorers=scorers,
        ood=ood,
        surrogate=surrogate,
    ).go(on_step)


def _changed(clean: AnyBatch, sent: AnyBatch) -> Tensor:
    """(n,) bool, the samples that the attack changed."""
    changed = torch.zeros(clean.size, dtype=torch.bool, device=clean.y.device)
    pairs = zip([*tensors_of(clean.x), clean.y], [*tensors_of(sent.x), sent.y], strict=True)
    for before, after in pairs:
        changed |= after.ne(before).reshape(clean.size, -1).any(1)
    return changed


def _share(flagged: Tensor | None, among: Tensor) -> float | None:
    return float(flagged[among].float().mean()) if flagged is not None and bool(among.any()) else None


def _sent(clean: AnyBatch, sent: AnyBatch, update: Update, ascent: tuple[float, float] | None) -> Sent:
    changed = _changed(clean, sent)
    linf, l2 = 0.0, 0.0
    if bool(changed.any()) and isinstance(clean.x, Tensor) and clean.x.is_floating_point():
        delta = sent.x - clean.x
        linf, l2 = float(delta.abs().max()), float(sample_norms(delta[changed], "l2").mean())
    return Sent(
        batch_loss=update.batch_loss if update.learned else None,
        gradient_norm=update.gradient_norm,
        bounded_norm=update.bounded_norm,
        update_norm=update.update_norm,
        objective_start=ascent[0] if ascent else None,
        objective_end=ascent[1] if ascent else None,
        poison_linf=linf,
        poison_l2=l2,
        poisoned=float(changed.float().mean()),
        quarantined=update.quarantined,
        flagged_clean=_share(update.flagged, ~changed.cpu()),
        flagged_poisoned=_share(update.flagged, changed.cpu()),
        admitted=update.verdict.admit,
        verdict=update.verdict.reason,
    )


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
    before = [group["momentum"] for group in optimiser.param_groups]
    for group in optimiser.param_groups:
        group["momentum"] = factor
    try:
        yield
    finally:
        for group, value in zip(optimiser.param_groups, before, strict=True):
            group["momentum"] = value
