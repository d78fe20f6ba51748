"""A learner: it learns from batches by defended steps, and is measured."""

import copy
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from mithridate.core.batch import AnyBatch, check_batch
from mithridate.core.defence import Defence, Verdict
from mithridate.core.domain import Domain
from mithridate.core.errors import CheckpointError, DataError
from mithridate.core.model import answer
from mithridate.core.modes import BatchNormMode, frozen_statistics
from mithridate.core.past import Snapshot, Weights, uncompiled
from mithridate.core.targets import Criterion, counted, loss_of, right_answers
from mithridate.core.updates import Updates
from mithridate.training.door import TOO_FEW, too_few
from mithridate.training.history import History
from mithridate.training.rollback import put_weights, require_weights
from mithridate.training.step import DefendedStep

EvaluationPrecision = Literal["float32", "bfloat16"]
"""`float32`: the model's own precision; `bfloat16`: convolutions and products of matrices rounded to it (autocast)."""


@dataclass(frozen=True)
class Update:
    """What one step did.

    Args:
        batch_loss: Mean loss of the batch that the defence let through, before the step; NaN if none was left.
        gradient_norm: l2 length of the gradient of that loss.
        bounded_norm: l2 length of the gradient after the defence bounded it.
        update_norm: l2 distance of the parameters before and after.
        learned: Samples (or clients) that the gradient was computed on.
        verdict: Whether the step was kept, and why not.
        seconds: Wall-clock time, the defence's included.
        quarantined: Samples with NaN or infinity, outside the domain, of a class that the model has not, or with
            targets that should be probabilities and are none, which were taken out before anything looked at them.
        flagged: (n,) bool over the batch as received, the samples that the defence corrected, dropped or gave less
            weight, quarantined ones included; None if the defence treats all samples alike.
    """

    batch_loss: float
    gradient_norm: float
    bounded_norm: float
    update_norm: float
    learned: int
    verdict: Verdict
    seconds: float
    quarantined: int = 0
    flagged: Tensor | None = None


class Score(NamedTuple):
    """Accuracy as a fraction (NaN where targets have none, as in regression) and mean loss."""

    accuracy: float
    loss: float


class Learner(DefendedStep):
    """A model that learns online: any `nn.Module`, any torch optimiser, inputs and targets of any kind.

    Args:
        model: The module; gives a tensor, or an object with `.logits`; trained in place.
        optimiser: A torch optimiser over its parameters.
        criterion: (logits, targets) -> mean loss.
        defence: What stands between batches and the model.
        trusted: Samples that the owner knows to be clean, for defences that declare them.
        history: Keeps past states of the model, for defences that look back; the learner records into it.
        training: Clean batches that the model was trained on, for defences that declare them; a list, or anything
            that can be iterated more than once.
        domain: What a valid input is (pixels: `PIXELS`): samples outside are quarantined, and defences that change
            samples stay inside; unset: taken from the stream in a simulation, else unknown.
        seed: Of what the model draws in a step (dropout), with the step's number; torch's own generators are left
            alone, and a learner that goes on from a snapshot draws what it would have drawn.
        update_mode: BatchNorm in an update: `train` uses and records the batch's statistics; `eval` leaves them alone.
            Layers that are in eval mode while the model is in train mode are frozen, and stay so.

    Raises:
        ConfigError: No parameter of the model is trainable, or the optimiser has none of those that are.
        DataError: The trusted set is no batch, or holds NaN or infinity.
    """

    optimiser: Optimizer

    def __init__(
        self,
        model: nn.Module,
        optimiser: Optimizer,
        *,
        criterion: Criterion = F.cross_entropy,
        defence: Defence | None = None,
        trusted: AnyBatch | None = None,
        history: History | None = None,
        training: Iterable[AnyBatch] | None = None,
        domain: Domain | None = None,
        seed: int = 0,
        update_mode: BatchNormMode = "train",
    ) -> None:
        super().__init__(
            model,
            optimiser,
            criterion=criterion,
            defence=defence,
            trusted=trusted,
            history=history,
            training=training,
            domain=domain,
            seed=seed,
        )
        self.update_mode = update_mode

    def update(self, batch: AnyBatch) -> Update:
        """Learn from one batch: a defended step.

        Samples with NaN or infinity, outside the domain, with a class number that the model has no output for, or with
        targets outside [0, 1] where the criterion (cross-entropy of torch) reads probabilities never reach the defence
        or the model: they are taken out and counted. A gradient or step that is not finite is
        refused, whatever the defence, and so is a batch that BatchNorm cannot train on. If anything raises, the learner
        is as it was before the call.

        Args:
            batch: The samples as received from the stream.

        Returns:
            Norms, the loss and the verdict. A NaN loss is not an error: it is reported.

        Raises:
            DataError: It is no batch, or its inputs or targets are not of the kind that model and criterion take.
            ConfigError: The criterion gives no scalar, or one that no trainable parameter has a part in.
        """
        began = time.perf_counter()
        with self.taking():
            received = self.screen(batch)
            loss, lengths, moved = torch.tensor(torch.nan), (0.0, 0.0), 0.0
            verdict = Verdict(admit=False, reason=received.nothing_left)
            if not received.nothing_left:
                try:
                    loss = self.backward(received, self.update_mode)
                except ValueError as error:
                    if TOO_FEW not in str(error):
                        raise
                    verdict = self.refuse(too_few(f"{received.batch.size} samples"))
                else:
                    lengths = self.bound(loss)
                    verdict, moved = self.advance(lengths[1])
        return Update(
            batch_loss=float(loss),
            gradient_norm=lengths[0],
            bounded_norm=lengths[1],
            update_norm=moved,
            learned=received.batch.size,
            verdict=verdict,
            seconds=time.perf_counter() - began,
            quarantined=received.quarantined,
            flagged=received.flagged,
        )

    def apply(self, update: Updates, *, batch_loss: float, learned: int, buffers: Mapping[str, Tensor]) -> Update:
        """Step on a gradient that was made elsewhere; call it inside `taking`.

        Args:
            update: One row, of every trainable parameter.
            batch_loss: Mean loss behind it, for the record.
            learned: Clients behind it.
            buffers: Taken over with the step (BatchNorm statistics), and rolled back with it.

        Raises:
            CheckpointError: Names or shapes of the buffers are not those of the model.
        """
        began = time.perf_counter()
        self.put_buffers(buffers)
        self.put_gradient(update)
        length = float(torch.linalg.vector_norm(update.rows))
        verdict, moved = self.advance(length)
        return Update(batch_loss, length, length, moved, learned, verdict, time.perf_counter() - began)

    @torch.no_grad()
    def evaluate(
        self, batches: Iterable[AnyBatch], weights: Weights | None = None, *, precision: EvaluationPrecision = "float32"
    ) -> Score:
        """Accuracy and mean loss of the model that is served, in eval mode; train flags come back as they were.

        Args:
            batches: On the learner's device or not.
            weights: Weights of the model to measure in place of the one that is served.
            precision: Of the forward passes; the loss is computed in single precision or the model's own.

        Raises:
            DataError: There is no sample, or inputs or targets are not of the kind that model and criterion take.
        """
        hits, targets, loss, count = 0, 0, 0.0, 0
        served = weights or self.defence.serve(self.view())
        with frozen_statistics(self.model, "eval"):
            for batch in batches:
                check_batch(batch, where="batch to evaluate")
                x, y = on_device = batch.with_class_numbers().to(self.device)
                with self._explained(on_device), _rounded(self.device, precision):
                    logits = answer(self.model, x) if served is None else served.logits(self.model, x)
                if precision == "bfloat16":
                    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                size = counted(logits, y)
                mean = loss_of(self.criterion, logits, y, where="batch to evaluate")
                loss += float(mean) * size if size else 0.0  # of nothing the mean is NaN
                right = right_answers(logits, y)
                if right is not None:
                    hits, targets = hits + int(right.sum()), targets + right.numel()
                count += size
        if count == 0:
            raise DataError("there is no sample to evaluate the model on; give at least one whose target counts.")
        return Score(hits / targets if targets else torch.nan, loss / count)

    def snapshot(self) -> Snapshot:
        """All that the learner is now, as detached copies."""
        now = Weights.of(self.model).copied()
        parameters, buffers = (
            {uncompiled(name): t for name, t in tensors.items()} for tensors in (now.parameters, now.buffers)
        )
        in_eval = tuple(dict.fromkeys(_place(name) for name, m in self.model.named_modules() if not m.training))
        return Snapshot(parameters, buffers, copy.deepcopy(self.optimiser.state_dict()), self.step, in_eval)

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Become what the snapshot holds, bit for bit: parameters, buffers, optimiser state, train flags and step.

        Raises:
            CheckpointError: Names or shapes are not those of this model and optimiser; nothing has changed then.
        """
        weights = require_weights(self.model, Weights(snapshot.parameters, snapshot.buffers))  # nothing has changed yet
        wanted = copy.deepcopy(dict(snapshot.optimiser))
        try:
            self.optimiser.load_state_dict(wanted)
        except ValueError as error:
            raise CheckpointError(
                f"the optimiser state is of another optimiser: {error}; build the same one."
            ) from error
        for index, loaded in _by_index(self.optimiser):  # torch makes floats of whole numbers, and of other precisions
            for key, value in wanted["state"].get(index, {}).items():
                if isinstance(value, Tensor) and isinstance(loaded.get(key), Tensor):
                    loaded[key] = value.to(loaded[key].device)
        put_weights(self.model, weights)
        if snapshot.in_eval is not None:
            for name, m in self.model.named_modules():
                m.training = _place(name) not in snapshot.in_eval
        self.step = snapshot.step


def _rounded(device: torch.device, precision: EvaluationPrecision) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()


def _place(module_name: str) -> str:
    """The name of a module as it was before compiling."""
    return uncompiled(f"{module_name}.").strip(".")


def _by_index(optimiser: Optimizer) -> list[tuple[int, dict[str, Any]]]:
    """The state of each parameter, numbered as in a state dict."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    return [(index, optimiser.state[p]) for index, p in enumerate(parameters) if p in optimiser.state]
