"""Burn-in: train on clean data before the stream begins, once for all runs that share what determines it."""

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BeforeValidator, Field
from torch import nn
from torch.optim import SGD

from mithridate.core.compiling import asked_of_compiler, compiling
from mithridate.core.environment import environment
from mithridate.core.errors import CheckpointError, ConfigError
from mithridate.core.files import AbsolutePath, locked, path_of, remove_parts
from mithridate.core.modes import Precision, passes_in
from mithridate.core.past import Snapshot, Weights
from mithridate.core.registry import fields_of, settings
from mithridate.core.seeding import generator
from mithridate.core.sgd import LearningRate, Momentum
from mithridate.data.stream import Stream
from mithridate.defences.clip import Clip
from mithridate.maths.norms import Norm
from mithridate.training.checkpoint import load_snapshot, load_weights, save_snapshot
from mithridate.training.learner import Learner

METHOD = 1
"""Counts up when this file changes what a burn-in computes, so that old checkpoints are not reused."""

EVALUATION_BATCH = 500
"""Test samples that are measured at once."""

LATEST = "latest.safetensors"
"""Where a killed burn-in goes on."""

Schedule = Literal["constant", "linear", "cosine", "steps"]
"""How the learning rate goes on from `lr` at the first step."""

EpochKey = Annotated[str, BeforeValidator(str), Field(pattern=r"^(0|[1-9][0-9]*)$")]
"""An epoch as the key of a table, which TOML holds as text."""


@settings
class BurnIn:
    """Training on clean data before the stream begins.

    The learning rate falls by default. At a constant 0.1 a burn-in now and then ends on a spike of its loss, and which
    seed's does depends on the processor; `benchmarks/burn_in.py` prints start accuracies by schedule.

    Args:
        epochs: Passes over the burn-in part; 0 leaves the model as initialised.
        batch_size: Samples a step.
        lr: Learning rate of SGD at the first step, in (0, 1e6).
        schedule: How the learning rate falls, step by step: `cosine` (half a wave, from `lr` to 0), `linear` (a
            straight line, from `lr` to 0), `steps` (see `lower_after`), or `constant`.
        lower_after: For `steps`: epochs after which the learning rate is multiplied by `lower_by`, each >= 1; those
            after the last epoch lower nothing.
        lower_by: For `steps`: the factor, in (0, 1).
        momentum: Momentum factor of SGD, in [0, 1).
        weight_decay: L2 penalty of SGD.
        clip_norm: Gradients longer than this are shortened to it, > 0, in the units of the gradient; unset: none is.
        norm: In which norm `clip_norm` measures the whole gradient: `l2` or `linf` (its largest entry).
        evaluate_every: Epochs between two measurements of accuracy and loss on the test part, which the run's summary
            keeps (`burn_in_curve`); unset: none. They change no weight.
        checkpoints: Epochs whose model is kept besides the last, for those who look back (DSC, discrepancy): they never
            look at the last one, which is the model that the stream starts with.
        precision: Of the passes: `float32`; `tf32` of a GPU (elsewhere the same as `float32`); or `bfloat16` by
            autocast, which is faster where the processor has it, and many times slower where it has not. Weights,
            gradients and the optimiser stay in single precision.
        compile: Compile the model (`torch.compile`; on a GPU its passes are recorded and played as CUDA graphs) for
            the steps of the training: the same ones to rounding, but for dropout, which draws other numbers. They are
            faster after minutes of compiling.
        seed: Decides initialisation, order and augmentation. If it is set, all runs share one burn-in; unset: the
            run's seed.
        checkpoint: Path of a finished model (`.safetensors`, or `.pt` with tensors only) to start from instead of
            training; `epochs` then only says how long that was trained, and no `checkpoints` are kept.
        older: With `checkpoint`: paths of earlier states of the same model by epoch, in place of `checkpoints`:
            `older = { 20 = "epoch20.pt" }`.

    Source:
        Pang et al., NeurIPS 2021, section 4, "Burn-in phase": 40 epochs on CIFAR-10, 10 on MNIST, lr 0.1, constant;
        their code multiplies it by 0.1 after 50 epochs. Clipping and its curve: their Fig. 3 (a). Cosine: Loshchilov
        and Hutter, ICLR 2017, arXiv:1608.03983, Eq. (5), without restarts.
    """

    epochs: Annotated[int, Field(ge=0)] = 40
    batch_size: Annotated[int, Field(ge=1)] = 100
    lr: LearningRate = 0.1
    schedule: Schedule = "cosine"
    lower_after: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    lower_by: Annotated[float, Field(gt=0, lt=1)] = 0.1
    momentum: Momentum = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    norm: Norm = "l2"
    evaluate_every: Annotated[int, Field(ge=1)] | None = None
    checkpoints: tuple[Annotated[int, Field(ge=0)], ...] = ()
    precision: Precision = "float32"
    compile: bool = False
    seed: int | None = None
    checkpoint: AbsolutePath | None = None
    older: Mapping[EpochKey, AbsolutePath] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.checkpoint is None and self.older:
            raise ConfigError(
                "[burn_in] older names earlier states of a finished model, and there is no `checkpoint`; name it, or "
                "keep epochs of the training with `checkpoints`."
            )
        if newer := [int(epoch) for epoch in self.older if int(epoch) >= self.epochs]:
            raise ConfigError(
                f"[burn_in] older {newer}: not before the end of {self.epochs} epochs; say in `epochs` how long the "
                "model of `checkpoint` was trained."
            )
        late = [epoch for epoch in self.checkpoints if epoch > self.epochs]
        if late:
            raise ConfigError(f"[burn_in] checkpoints {late} come after the last of {self.epochs} epochs; lower them.")
        if (self.schedule == "steps") != bool(self.lower_after):
            raise ConfigError(
                '[burn_in] schedule = "steps" and lower_after (such as [50]) belong together; give both, or none.'
            )

    @property
    def older_epochs(self) -> Sequence[int]:
        """Epochs of the kept models that are older than the one that the stream starts with, the earliest first."""
        if self.checkpoint is not None:
            return sorted(map(int, self.older))
        return sorted({epoch for epoch in self.checkpoints if epoch < self.epochs})

    @property
    def depends_on_length(self) -> bool:
        """Whether the rate of a step depends on `epochs`, so that burn-ins of other lengths share no epoch."""
        return self.schedule in {"linear", "cosine"}

    def rate(self, passes: float) -> float:
        """The learning rate of a step. It follows from the step's place alone, so a resumed burn-in has the same bits.

        Args:
            passes: Passes over the burn-in part that were made before this step, fractions included, in [0, epochs).
        """
        if not self.depends_on_length:
            lowered = sum(epoch <= passes for epoch in self.lower_after or ())
            return self.lr * self.lower_by**lowered
        share = passes / self.epochs
        return self.lr * (1 - share if self.schedule == "linear" else (1 + math.cos(math.pi * share)) / 2)


class Measured(NamedTuple):
    """The test part after an epoch: accuracy (a fraction) and mean loss; None where it is no finite number."""

    epoch: int
    accuracy: float | None
    loss: float | None


@dataclass(frozen=True)
class BurnInResult:
    """A finished burn-in.

    Args:
        final: The learner at its end (optimiser state included).
        key: What determines it, hashed; empty without a cache, or if `BurnIn.checkpoint` was loaded.
        epochs: The kept models that are older than `final`, by epoch: paths of snapshots (none without a cache), or
            weights, if `BurnIn.older` named them. For `History`.
        seconds: Time that training took, now or when the cache was filled.
        reused: Whether it was read from the cache and not trained now.
        curve: What was measured along the way, by `BurnIn.evaluate_every`.
        environments: Where it was trained, each environment once (see `core.environment`); empty if
            `BurnIn.checkpoint` was loaded.
    """

    final: Snapshot
    key: str
    epochs: Mapping[int, Path | Weights] = field(default_factory=dict)
    seconds: float = 0.0
    reused: bool = False
    curve: Sequence[Measured] = ()
    environments: Sequence[Mapping[str, Any]] = ()


def burn_in_key(
    stream: Stream, fresh: nn.Module, model: Mapping[str, Any], how: BurnIn, *, seed: int, device: torch.device
) -> str:
    """A hash of everything that determines a burn-in: data, augmentation, model, settings, seed, torch, device type.

    The fresh model counts by its layers and initial weights, since a name and settings do not say what a function of
    the user's own builds today.

    The key leaves out settings that nothing uses, which epochs are kept and, where the rate does not depend on it, the
    number of epochs: burn-ins that differ in nothing else share their epochs.

    Args:
        stream: Gives the burn-in part.
        fresh: The model before its first step.
        model: What it was built from; plain values.
        how: Settings of the training.
        seed: What it draws from.
        device: Where it is trained; the kind of device counts.

    Returns:
        16 hex digits.
    """
    shared = {"checkpoints", "checkpoint", "older", "seed"} | (set() if how.depends_on_length else {"epochs"})
    shared |= (set() if how.lower_after else {"lower_by"}) | (set() if how.clip_norm else {"norm"})  # nothing uses them
    exact = how.precision != "bfloat16" and device.type != "cuda"  # torch's own default on a GPU is another one
    shared |= (set() if how.compile else {"compile"}) | ({"precision"} if exact else set())
    plan = {
        "method": METHOD,
        "data": stream.fingerprint,
        "augment": stream.settings.augment,
        "model": dict(model),
        "fresh": _fingerprint(fresh),
        "burn_in": {key: value for key, value in fields_of(how).items() if key not in shared},
        "seed": seed,
        "torch": torch.__version__,
        "device": device.type,
    }
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


def _fingerprint(module: nn.Module) -> str:
    """A hash of a model's layers and of all its tensors."""
    digest = hashlib.sha256(repr(module).encode())
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def burn_in(
    model: nn.Module,
    stream: Stream,
    how: BurnIn,
    *,
    seed: int,
    model_config: Mapping[str, Any] | None = None,
    cache: str | Path | None = None,
    on_epoch: Callable[[int, int], None] | None = None,
) -> BurnInResult:
    """Train `model` in place on the stream's burn-in part, or fetch the result of an earlier, equal training.

    Every epoch is written to the cache as it ends, so a killed burn-in goes on from its last epoch, with the same bits.
    A cached file that is damaged, or is not what its name says, is not used: its epochs are trained again.

    Args:
        model: Freshly built; on the device to train on.
        stream: Gives the burn-in part.
        how: Settings.
        seed: Used where `how.seed` is unset.
        model_config: What the model was built from; part of the cache's key. Needed with `cache`.
        cache: Directory of finished burn-ins; None keeps nothing.
        on_epoch: Called with (epochs done, epochs in all).

    Raises:
        CheckpointError: `how.checkpoint` or one of `how.older` does not fit.
        ConfigError: One of `how.older` is the model of `how.checkpoint` itself; or there is a cache and no
            `model_config`.
        WriteError: The cache lacks something, and cannot be written to.
    """
    if how.checkpoint is not None:
        load_weights(how.checkpoint, model)
        return BurnInResult(Learner(model, _sgd(model, how)).snapshot(), key="", epochs=_older(model, how))
    seed = seed if how.seed is None else how.seed
    clip = None if how.clip_norm is None else Clip(clip_norm=how.clip_norm, norm=how.norm)
    learner = Learner(model, _sgd(model, how), defence=clip, seed=seed)
    if cache is None:
        seconds, measured = 0.0, list[Measured]()
        for epoch in range(1, how.epochs + 1):
            began = time.perf_counter()
            _train_epoch(learner, stream, how, seed, epoch)
            seconds += time.perf_counter() - began
            measured += _measured(learner, stream, how, epoch)
            if on_epoch:
                on_epoch(epoch, how.epochs)
        here = [environment(learner.device)]
        return BurnInResult(learner.snapshot(), "", seconds=seconds, curve=measured, environments=here)
    if model_config is None:
        raise ConfigError(
            "burn_in: a cache is asked by what the model was built from, and `model_config` does not say it; give the "
            "model's settings, or no cache."
        )
    key = burn_in_key(stream, model, model_config, how, seed=seed, device=learner.device)
    folder = path_of(cache) / "burn_in" / key
    cached = _Cached(folder)
    if (finished := _finished(learner, how, cached)) is not None:
        return finished  # without a lock, so that a cache that can only be read serves too
    with locked(folder / ".lock"):
        remove_parts(folder)
        return _finished(learner, how, cached) or _train_or_resume(learner, stream, how, seed, cached, on_epoch)


@dataclass(frozen=True)
class _Cached:
    """The snapshots of one burn-in in the cache.

    Args:
        folder: Their folder, called by the burn-in's key.
    """

    folder: Path

    def file(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:04d}.safetensors"

    def older(self, how: BurnIn) -> dict[int, Path | Weights]:
        """The files of the epochs before the last that were asked for."""
        return {epoch: self.file(epoch) for epoch in how.older_epochs}

    def load(self, path: Path, epoch: int | None = None) -> tuple[Snapshot, dict[str, Any]] | None:
        """A snapshot with its note; None if it is missing, damaged, or of another burn-in or epoch."""
        try:
            snapshot, _, note = load_snapshot(path)
        except CheckpointError:
            return None
        right = isinstance(note, dict) and note.get("key") == self.folder.name and epoch in {None, note["epoch"]}
        return (snapshot, note) if right else None

    def before(self, epoch: int) -> tuple[Snapshot, dict[str, Any]] | None:
        """The newest snapshot that was taken before an epoch's end."""
        epochs = {int(path.stem.removeprefix("epoch-")) for path in self.folder.glob("epoch-*.safetensors")}
        latest = self.load(self.folder / LATEST)
        earlier = sorted((e for e in epochs if e < epoch), reverse=True)
        kept = next((found for e in earlier if (found := self.load(self.file(e), e)) is not None), None)
        if latest is None or latest[1]["epoch"] >= epoch:
            return kept
        return latest if kept is None or latest[1]["epoch"] > kept[1]["epoch"] else kept


def _finished(learner: Learner, how: BurnIn, cached: _Cached) -> BurnInResult | None:
    """The result, with the learner put there, if every epoch that is asked for is in the cache and whole."""
    found = {epoch: cached.load(cached.file(epoch), epoch) for epoch in {*how.checkpoints, how.epochs}}
    last = found[how.epochs]
    if last is None or None in found.values():
        return None
    snapshot, note = last
    learner.restore(snapshot)
    return BurnInResult(
        learner.snapshot(),
        cached.folder.name,
        cached.older(how),
        note["seconds"],
        reused=True,
        curve=_curve(note),
        environments=note["environments"],
    )


def _train_or_resume(
    learner: Learner,
    stream: Stream,
    how: BurnIn,
    seed: int,
    cached: _Cached,
    on_epoch: Callable[[int, int], None] | None,
) -> BurnInResult:
    """Train the epochs that the cache does not hold yet."""
    wanted = {*how.checkpoints, how.epochs}
    missing = sorted(epoch for epoch in wanted if cached.load(cached.file(epoch), epoch) is None)
    here = environment(learner.device)
    done, spent, environments = 0, 0.0, [here]
    curve: list[Measured] = []
    if (start := cached.before(missing[0])) is not None:
        snapshot, note = start
        learner.restore(snapshot)
        done, spent, curve = int(note["epoch"]), float(note["seconds"]), _curve(note)
        environments = note["environments"] if here in note["environments"] else [*note["environments"], here]

    def keep(path: Path, epoch: int) -> None:
        told = {"epoch": epoch, "seconds": spent, "curve": curve, "environments": environments}
        save_snapshot(path, learner.snapshot(), note={"key": cached.folder.name, **told})

    if 0 in missing:
        keep(cached.file(0), 0)
    latest = cached.folder / LATEST
    for epoch in range(done + 1, how.epochs + 1):
        began = time.perf_counter()
        _train_epoch(learner, stream, how, seed, epoch)
        spent += time.perf_counter() - began
        curve += _measured(learner, stream, how, epoch)
        keep(cached.file(epoch) if epoch in wanted else latest, epoch)
        if on_epoch:
            on_epoch(epoch, how.epochs)
    latest.unlink(missing_ok=True)
    return BurnInResult(
        learner.snapshot(), cached.folder.name, cached.older(how), spent, curve=curve, environments=environments
    )


def _curve(note: Mapping[str, Any]) -> list[Measured]:
    return [Measured(*values) for values in note["curve"]]


def _older(model: nn.Module, how: BurnIn) -> dict[int, Weights]:
    """The earlier states of a finished model that the settings name."""
    weights: dict[int, Weights] = {}
    now = model.state_dict()
    for epoch in how.older_epochs:
        path = how.older[str(epoch)]
        other = copy.deepcopy(model)
        load_weights(path, other)
        if all(torch.equal(now[name], t) for name, t in other.state_dict().items()):
            raise ConfigError(
                f"[burn_in] older, epoch {epoch}: {path} holds the model of `checkpoint` itself, so whoever looks back "
                "would compare it with itself; name the file of an earlier epoch."
            )
        weights[epoch] = Weights.of(other, f"burn-in epoch {epoch}").copied()
    return weights


def _sgd(model: nn.Module, how: BurnIn) -> SGD:
    return SGD(model.parameters(), lr=how.lr, momentum=how.momentum, weight_decay=how.weight_decay)


def _train_epoch(learner: Learner, stream: Stream, how: BurnIn, seed: int, epoch: int) -> None:
    """One pass; its order and augmentation depend on (seed, epoch) alone, its rates on the settings and the epoch."""
    part = stream.burn_in
    order = generator("burn-in order", seed, epoch)
    change = generator("burn-in augmentation", seed, epoch)
    lone = len(part) % how.batch_size == 1  # BatchNorm has no variance of one value
    steps = math.ceil(len(part) / how.batch_size) - lone
    with _compiled(learner) if how.compile else nullcontext(), passes_in(how.precision, learner.device):
        for step, batch in enumerate(part.batches(how.batch_size, rng=order, drop_last=lone, device=learner.device)):
            _set_rate(learner, how.rate(epoch - 1 + step / steps))
            learner.update(stream.augmented(batch, change) if stream.settings.augment else batch)
    _set_rate(learner, how.lr)  # whoever restores a snapshot with its optimiser learns at this rate, not at almost 0


@contextmanager
def _compiled(learner: Learner) -> Iterator[None]:
    """The model's passes compiled in place, so that its tensors keep their names, and as they were after the block."""
    before = learner.model._compiled_call_impl
    with compiling("[burn_in]"):
        try:
            learner.model.compile(**asked_of_compiler(learner.device))
            yield
        finally:
            learner.model._compiled_call_impl = before


def _measured(learner: Learner, stream: Stream, how: BurnIn, epoch: int) -> list[Measured]:
    """Accuracy and loss on the test part, if it is their turn."""
    if how.evaluate_every is None or epoch % how.evaluate_every:
        return []
    score = learner.evaluate(stream.test.batches(EVALUATION_BATCH, device=learner.device))
    return [Measured(epoch, *(value if math.isfinite(value) else None for value in score))]


def _set_rate(learner: Learner, lr: float) -> None:
    for group in learner.optimiser.param_groups:
        group["lr"] = lr
