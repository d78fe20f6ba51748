"""A target as a run sees it: a learner that begins anew for every attack, and the batches that it is fed."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mithridate.audit.plan import AuditBudget
from mithridate.audit.target import Target, TargetSamples
from mithridate.core.batch import AnyBatch, each_tensor, tensors_of
from mithridate.core.defence import Defence
from mithridate.core.domain import Domain
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.modes import BatchNormMode
from mithridate.core.past import Snapshot, Weights
from mithridate.core.registry import config_of
from mithridate.core.view import Need
from mithridate.data.part import Part
from mithridate.data.shards import Shards
from mithridate.data.stream import Stream
from mithridate.simulation.clients import Federation, federate
from mithridate.training.calibrate import calibrated
from mithridate.training.checkpoint import tensors_digest
from mithridate.training.door import kind
from mithridate.training.history import History
from mithridate.training.learner import Learner


@dataclass(frozen=True, eq=False)
class GivenBatches:
    """Batches in the order in which a user gave them, as what `run_online` is fed.

    Args:
        batches: Those of the phase, and the trigger.
        test: What accuracy is measured on.
        validation: The attacker's own samples.
        domain: What a valid input is.
    """

    batches: Sequence[AnyBatch]
    test: Part
    validation: Part
    domain: Domain

    @classmethod
    def of(cls, samples: TargetSamples) -> "GivenBatches":
        """The data of a target."""
        test, validation = (_part(name, getattr(samples, name)) for name in ("test", "validation"))
        return cls(samples.batches, test, validation, samples.domain)

    def require(self, steps: int) -> None:
        """Refuse a run that is longer.

        Args:
            steps: Accumulative batches; the trigger batch comes on top.

        Raises:
            DataError: They do not fit.
        """
        if steps + 1 > len(self.batches):
            raise DataError(
                f"{steps} batches and a last one are wanted, and the stream has {len(self.batches)}; give more, or "
                "lower [budget] batches."
            )

    def victim_batch(self, step: int, seed: int, device: torch.device | str = "cpu") -> AnyBatch:
        """One batch; the same in every seed that the user's function gave it in.

        Args:
            step: Which one, from 0.
            seed: Decides nothing here: the user's function has been told.
            device: Where the batch goes.
        """
        return self.batches[step].to(device)

    def trigger_batch(self, steps: int, seed: int, device: torch.device | str = "cpu") -> AnyBatch:
        """The batch after the last one of the phase; takes and returns what `victim_batch` does."""
        return self.victim_batch(steps, seed, device)


def _part(name: str, batch: AnyBatch) -> Part:
    return Part(name, each_tensor(batch.x, lambda t: t.cpu().numpy()), batch.y.cpu().numpy())


@dataclass(frozen=True, eq=False)
class Victim:
    """A target in its first state, for one attack after another.

    Args:
        target: What the user's function gave.
        samples: Its data.
        defence: Its guard; None if there is none.
        seed: Of the runs.
        begin: The first state.

    Raises:
        DataError: The test targets are such that there is no accuracy to lose.
    """

    target: Target
    samples: TargetSamples
    defence: Defence | None
    seed: int
    begin: Snapshot = field(init=False)

    def __post_init__(self) -> None:
        learner = self._learner(None, "train")
        start = learner.evaluate(self.samples.test.split(500))
        if math.isnan(start.accuracy):
            raise DataError(
                "the test targets are neither class numbers nor many labels, so there is no accuracy to lose; an audit "
                "asks what attacks cost in accuracy."
            )
        object.__setattr__(self, "begin", learner.snapshot())

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.target.model.parameters()).device

    def put_back(self) -> None:
        """Leave model and optimiser as they were given; a function may give the same ones again."""
        self._learner(None, "train").restore(self.begin)

    def learner(self, *, guarded: bool, mode: BatchNormMode = "train") -> Learner:
        """The model as it was given, with or without its guard.

        Args:
            guarded: With it.
            mode: BatchNorm in its updates.

        Raises:
            ConfigError: The guard looks back, and the target names no older state; or it compares with training
                samples, and the target names none.
        """
        learner = self._learner(self.defence if guarded else None, mode)
        learner.restore(self.begin)
        learner.memory.clear()
        if guarded:
            calibrated(learner, self.samples.batches[0].size)
        return learner

    def _learner(self, defence: Defence | None, mode: BatchNormMode) -> Learner:
        target, samples, history = self.target, self.samples, None
        trusted = samples.trusted
        if trusted is not None and isinstance(target.model, torch.nn.Module):  # what is none, the learner refuses
            trusted = trusted.to(next(target.model.parameters(), torch.empty(0)).device)
        if (defence is not None and (defence.lookback or defence.old_epochs)) or target.older:
            if defence is not None and defence.old_epochs and not target.older:
                raise ConfigError(
                    f"{type(defence).__name__} looks back at an older state of the model; give Target(..., "
                    "older={EPOCH: model.state_dict()}), kept before the model was trained on."
                )
            history = History(keep=defence.lookback + 1 if defence else 0, checkpoints=self._older)
        if defence is not None and Need.TRAINING in defence.needs and samples.training is None:
            raise ConfigError(
                f"{type(defence).__name__} compares with samples that the model was trained on; give Target(..., "
                "training=...), other ones than the trusted."
            )
        return Learner(
            target.model,
            target.optimizer,
            criterion=target.criterion,
            defence=defence,
            trusted=trusted,
            history=history,
            training=None if samples.training is None else list(samples.training.split(500)),
            domain=samples.domain,
            seed=self.seed,
            update_mode=mode,
        )

    @cached_property
    def _older(self) -> dict[int, Weights]:
        """The states from before."""
        model = self.target.model
        parameters, buffers = (dict(named) for named in (model.named_parameters(), model.named_buffers()))
        derived = {n: b for n, b in buffers.items() if n not in model.state_dict()}  # which no state dict holds
        return {
            epoch: Weights(
                {n: t for n, t in state.items() if n in parameters},
                {**derived, **{n: t for n, t in state.items() if n in buffers}},
                f"the target's epoch {epoch}",
            ).copied()
            for epoch, state in self.target.older.items()
        }

    @cached_property
    def beginning(self) -> str:
        """A hash of the model and the stream."""
        tensors = Weights(self.begin.parameters, self.begin.buffers).named()
        return tensors_digest(tensors | _tensors({f"batch{i}": b for i, b in enumerate(self.samples.batches)}))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of all that the user's function decides of a run."""
        named = {"test": self.samples.test, "validation": self.samples.validation}
        if isinstance(self.target.stream, Stream):  # of which a federation divides all
            named["victim"] = self.target.stream.victim.all()
        for name in ("trusted", "training"):
            given = getattr(self.samples, name)
            named |= {} if given is None else {name: given}
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.target.optimizer.param_groups]
        criterion = getattr(self.target.criterion, "__qualname__", type(self.target.criterion).__name__)
        text = json.dumps([type(self.target.optimizer).__name__, groups, criterion, _table(self.defence)], default=str)
        return hashlib.sha256(f"{self.beginning} {tensors_digest(_tensors(named))} {text}".encode()).hexdigest()[:16]

    def federation(self, clients: int) -> Federation:
        """The stream's samples, divided among clients.

        Args:
            clients: How many.

        Raises:
            ConfigError: The target has batches, and no `Stream`.
            DataError: There are too few samples.
        """
        stream = self.target.stream
        if not isinstance(stream, Stream):
            raise ConfigError(
                "[federated] divides samples among clients, and the target's stream is a list of batches; give a "
                "Stream, such as mi.Stream.from_arrays(x, y)."
            )
        test, validation = (_part(name, getattr(self.samples, name)) for name in ("test", "validation"))
        whole = replace(stream, domain=self.samples.domain, test=test, validation=validation)
        return federate(whole, Shards(clients=clients), seed=self.seed)

    def scale(self, budget: AuditBudget) -> Tensor | None:
        """By which an attack's inputs are divided, so that the budget is one number; None if it is one.

        Args:
            budget: Of the attacker.

        Raises:
            ConfigError: There are not as many numbers as features.
        """
        x = self.samples.batches[0].x
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return None
        shape = x.shape[1:]
        if budget.unit == "value" and not isinstance(budget.eps, tuple):
            return None
        scale = torch.ones(shape, dtype=x.dtype)
        if budget.unit == "std":
            scale = torch.cat([batch.x for batch in self.samples.batches]).std(0).cpu()
        if isinstance(budget.eps, tuple):
            if len(budget.eps) != scale.numel():
                raise ConfigError(
                    f"[budget] eps lists {len(budget.eps)} numbers, and a sample has {scale.numel()} values; give one "
                    "a value, or a single number for all."
                )
            scale = scale * torch.tensor(budget.eps, dtype=x.dtype).reshape(shape)
        return scale

    def facts(self) -> dict[str, Any]:
        """What the target is, in plain words and numbers."""
        x = self.samples.batches[0].x
        return {
            "model": type(self.target.model).__name__,
            "parameters": sum(p.numel() for p in self.target.model.parameters()),
            "optimiser": type(self.target.optimizer).__name__,
            "lr": self.target.optimizer.param_groups[0].get("lr"),
            "inputs": kind(self.samples.batches[0]),
            "movable": isinstance(x, Tensor) and x.is_floating_point(),
            "batch_size": self.samples.batches[0].size,
            "test_samples": self.samples.test.size,
            "attackers_samples": self.samples.validation.size,
            "trusted_samples": 0 if self.samples.trusted is None else self.samples.trusted.size,
            "defence": _table(self.defence),
        }


def _tensors(batches: Mapping[str, AnyBatch]) -> dict[str, Tensor]:
    """The tensors of several batches, by name."""
    return {f"{name}.{i}": t for name, batch in batches.items() for i, t in enumerate([*tensors_of(batch.x), batch.y])}


def _table(defence: Defence | None) -> object:
    """Its settings; of a class that is registered nowhere, what it says of itself."""
    if defence is None:
        return None
    try:
        return config_of(defence)
    except ConfigError:
        return repr(defence)
