"""Burn-in: train on clean data before the stream begins, once for all runs that share what determines it."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from filelock import FileLock
from pydantic import Field
from torch import nn
from torch.optim import SGD

from mithridate.core.errors import ConfigError
from mithridate.core.files import AbsolutePath, path_of
from mithridate.core.past import Snapshot
from mithridate.core.registry import fields_of, settings
from mithridate.core.seeding import generator
from mithridate.data.stream import Stream
from mithridate.training.checkpoint import load_snapshot, load_weights, save_snapshot
from mithridate.training.learner import Learner

METHOD = 1
"""Counts up when this file changes what a burn-in computes, so that old checkpoints are not reused."""

LATEST = "latest.safetensors"
"""Where a killed burn-in goes on."""

Schedule = Literal["constant", "linear", "cosine"]
"""How the learning rate goes from `lr` at the first step towards 0 at the last."""


@settings
class BurnIn:
    """Training on clean data before the stream begins.

    The learning rate falls by default. At a constant 0.1 a burn-in now and then ends on a spike of its loss, and which
    seed's does depends on the processor; `benchmarks/burn_in.py` prints start accuracies by schedule.

    Args:
        epochs: Passes over the burn-in part; 0 leaves the model as initialised.
        batch_size: Images a step.
        lr: Learning rate of SGD at the first step, > 0.
        schedule: How the learning rate falls, step by step: `cosine` (half a wave, from `lr` to 0), `linear` (a
            straight line, from `lr` to 0), or `constant`.
        momentum: Momentum factor of SGD.
        weight_decay: L2 penalty of SGD.
        checkpoints: Epochs whose model is kept besides the last (DSC and discrepancy look back at them).
        seed: Decides initialisation, order and augmentation. If it is set, all runs share one burn-in; unset: the
            run's seed.
        checkpoint: Path of a finished model (`.safetensors`, or `.pt` with tensors only) to start from instead of
            training; `epochs` is then not used.

    Source:
        Pang et al., NeurIPS 2021, section 4, "Burn-in phase": 40 epochs on CIFAR-10, 10 on MNIST, lr 0.1, constant.
        Cosine: Loshchilov and Hutter, ICLR 2017, arXiv:1608.03983, Eq. (5), without restarts.
    """

    epochs: Annotated[int, Field(ge=0)] = 40
    batch_size: Annotated[int, Field(ge=1)] = 100
    lr: Annotated[float, Field(gt=0)] = 0.1
    schedule: Schedule = "cosine"
    momentum: Annotated[float, Field(ge=0)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    checkpoints: tuple[Annotated[int, Field(ge=0)], ...] = ()
    seed: int | None = None
    checkpoint: AbsolutePath | None = None

    def __post_init__(self) -> None:
        late = [epoch for epoch in self.checkpoints if epoch > self.epochs]
        if late:
            raise ConfigError(f"[burn_in] checkpoints {late} come after the last of {self.epochs} epochs; lower them.")

    @property
    def depends_on_length(self) -> bool:
        """Whether the rate of a step depends on `epochs`, so that burn-ins of other lengths share no epoch."""
        return self.schedule != "constant"

    def rate(self, passes: float) -> float:
        """The learning rate of a step. It follows from the step's place alone, so a resumed burn-in has the same bits.

        Args:
            passes: Passes over the burn-in part that were made before this step, fractions included, in [0, epochs).
        """
        if self.schedule == "constant":
            return self.lr
        share = passes / self.epochs
        return self.lr * (1 - share if self.schedule == "linear" else (1 + math.cos(math.pi * share)) / 2)


@dataclass(frozen=True)
class BurnInResult:
    """A finished burn-in.

    Args:
        final: The learner at its end (optimiser state included).
        key: What determines it, hashed; empty without a cache, or if `BurnIn.checkpoint` was loaded.
        epochs: Paths of the kept snapshots by epoch; empty without a cache.
        seconds: Time that training took, now or when the cache was filled.
        reused: Whether it was read from the cache and not trained now.
    """

    final: Snapshot
    key: str
    epochs: Mapping[int, Path] = field(default_factory=dict)
    seconds: float = 0.0
    reused: bool = False


def burn_in_key(
    stream: Stream, fresh: nn.Module, model: Mapping[str, Any], how: BurnIn, *, seed: int, device: torch.device
) -> str:
    """A hash of everything that determines a burn-in: data, augmentation, model, settings, seed, torch, device type.

    The fresh model counts by its layers and initial weights, since a name and settings do not say what a function of
    the user's own builds today.

    The key leaves out which epochs are kept and, where the rate does not depend on it, the number of epochs: burn-ins
    that differ in nothing else share their epochs.
    """
    shared = {"checkpoints", "checkpoint", "seed"} | (set() if how.depends_on_length else {"epochs"})
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

    Args:
        model: Freshly built; on the device to train on.
        stream: Gives the burn-in part.
        how: Settings.
        seed: Used where `how.seed` is unset.
        model_config: What the model was built from; part of the cache's key. Needed with `cache`.
        cache: Directory of finished burn-ins; None keeps nothing.
        on_epoch: Called with (epochs done, epochs in all).

    Raises:
        CheckpointError: `how.checkpoint` does not fit, or a cached file is corrupt.
    """
    if how.checkpoint is not None:
        load_weights(Path(how.checkpoint), model)
        return BurnInResult(Learner(model, _sgd(model, how)).snapshot(), key="")
    seed = seed if how.seed is None else how.seed
    learner = Learner(model, _sgd(model, how))
    if cache is None:
        began = time.perf_counter()
        for epoch in range(1, how.epochs + 1):
            _train_epoch(learner, stream, how, seed, epoch)
            if on_epoch:
                on_epoch(epoch, how.epochs)
        return BurnInResult(learner.snapshot(), "", seconds=time.perf_counter() - began)
    key = burn_in_key(stream, model, model_config or {}, how, seed=seed, device=learner.device)
    folder = path_of(cache) / "burn_in" / key
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        return _train_or_resume(learner, stream, how, seed, folder, on_epoch)


def _train_or_resume(
    learner: Learner,
    stream: Stream,
    how: BurnIn,
    seed: int,
    folder: Path,
    on_epoch: Callable[[int, int], None] | None,
) -> BurnInResult:
    """Train the epochs that the folder does not hold yet."""
    wanted = {*how.checkpoints, how.epochs}
    missing = sorted(epoch for epoch in wanted if not _epoch_file(folder, epoch).exists())
    done, spent = 0, 0.0
    start = _epoch_file(folder, how.epochs) if not missing else _last_before(missing[0], folder)
    if start is not None:
        snapshot, _, note = load_snapshot(start)
        learner.restore(snapshot)
        done, spent = int(note["epoch"]), float(note["seconds"])

    def keep(path: Path, epoch: int) -> None:
        save_snapshot(path, learner.snapshot(), note={"epoch": epoch, "seconds": spent})

    if 0 in missing:
        keep(_epoch_file(folder, 0), 0)
    latest = folder / LATEST
    for epoch in range(done + 1, how.epochs + 1):
        began = time.perf_counter()
        _train_epoch(learner, stream, how, seed, epoch)
        spent += time.perf_counter() - began
        keep(_epoch_file(folder, epoch) if epoch in wanted else latest, epoch)
        if on_epoch:
            on_epoch(epoch, how.epochs)
    latest.unlink(missing_ok=True)
    epochs = {epoch: _epoch_file(folder, epoch) for epoch in sorted(wanted)}
    return BurnInResult(learner.snapshot(), folder.name, epochs, spent, reused=not missing)


def _epoch_file(folder: Path, epoch: int) -> Path:
    return folder / f"epoch-{epoch:04d}.safetensors"


def _last_before(epoch: int, folder: Path) -> Path | None:
    """The newest snapshot in the folder that was taken before an epoch's end."""
    snapshots = {int(path.stem.removeprefix("epoch-")): path for path in folder.glob("epoch-*.safetensors")}
    if (folder / LATEST).exists():
        snapshots[int(load_snapshot(folder / LATEST)[2]["epoch"])] = folder / LATEST
    before = [e for e in snapshots if e < epoch]
    return snapshots[max(before)] if before else None


def _sgd(model: nn.Module, how: BurnIn) -> SGD:
    return SGD(model.parameters(), lr=how.lr, momentum=how.momentum, weight_decay=how.weight_decay)


def _train_epoch(learner: Learner, stream: Stream, how: BurnIn, seed: int, epoch: int) -> None:
    """One pass; its order and augmentation depend on (seed, epoch) alone, its rates on the settings and the epoch."""
    part = stream.burn_in
    order = generator("burn-in order", seed, epoch)
    change = generator("burn-in augmentation", seed, epoch)
    lone = len(part) % how.batch_size == 1  # BatchNorm has no variance of one value
    steps = math.ceil(len(part) / how.batch_size) - lone
    for step, batch in enumerate(part.batches(how.batch_size, rng=order, drop_last=lone, device=learner.device)):
        _set_rate(learner, how.rate(epoch - 1 + step / steps))
        learner.update(stream.augmented(batch, change) if stream.settings.augment else batch)
    _set_rate(learner, how.lr)  # whoever restores a snapshot with its optimiser learns at this rate, not at almost 0


def _set_rate(learner: Learner, lr: float) -> None:
    for group in learner.optimiser.param_groups:
        group["lr"] = lr
