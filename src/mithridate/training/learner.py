"""A model, its optimiser and its defence: one update at a time."""

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from mithridate.core.batch import PIXELS, Batch, check_domain
from mithridate.core.defence import ADMITTED, FLAGGED, Defence, Verdict
from mithridate.core.errors import CheckpointError, DataError
from mithridate.core.model import BatchNormMode, Criterion, Snapshot, WhiteBox
from mithridate.core.update import Gradient
from mithridate.core.view import Memory, Need, View
from mithridate.training.history import History


@dataclass(frozen=True)
class Update:
    """What one call of `Learner.update` did.

    Args:
        batch_loss: Mean loss of the batch that the defence let through, before the step; NaN if none was left.
        gradient_norm: l2 length of its gradient.
        bounded_norm: The same after the defence bounded it.
        update_norm: l2 distance of the parameters before and after.
        learned: Samples that the gradient was computed on.
        verdict: Whether the step was kept, and why not.
        seconds: Wall-clock time, the defence's included.
        quarantined: Samples with NaN or infinite pixels, which were taken out before anything looked at them.
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
    """Accuracy as a fraction and mean loss."""

    accuracy: float
    loss: float


class Learner:
    """A model that learns online: any `nn.Module` that gives logits, any torch optimiser.

    Args:
        model: The module; trained in place.
        optimiser: A torch optimiser over its parameters.
        criterion: (logits, labels) -> mean loss.
        defence: What stands between batches and the model.
        trusted: Samples that the owner knows to be clean, for defences that declare them.
        history: Keeps past states of the model, for defences that look back; the learner records into it.
        training: Clean batches that the model was trained on, for defences that declare them; a list, or anything
            that can be iterated more than once.
        update_mode: BatchNorm in an update: `train` uses and records the batch's statistics; `eval` leaves them alone.

    Raises:
        DataError: (from `update`) the batch must not reach a model, or its labels do not fit the logits.
    """

    def __init__(
        self,
        model: nn.Module,
        optimiser: Optimizer,
        *,
        criterion: Criterion = F.cross_entropy,
        defence: Defence | None = None,
        trusted: Batch | None = None,
        history: History | None = None,
        training: Iterable[Batch] | None = None,
        update_mode: BatchNormMode = "train",
    ) -> None:
        self.model = model
        self.optimiser = optimiser
        self.criterion = criterion
        self.defence = defence or Defence()
        self.trusted = trusted
        self.history = history
        self.training = training
        self.update_mode = update_mode
        self.step = 0
        self.memory: Memory = {}

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return next(self.model.parameters()).device

    @property
    def white_box(self) -> WhiteBox:
        """Read access for attacks and defences."""
        return WhiteBox(self.model, self.criterion)

    def view(self) -> View:
        """What the defence sees now."""
        things: dict[Need, Any] = {Need.MODEL: self.white_box}
        if self.trusted is not None:
            things[Need.TRUSTED] = self.trusted
        if self.history is not None:
            things[Need.HISTORY] = self.history
        if self.training is not None:
            things[Need.TRAINING] = self.training
        return View(self.step, self.memory, things, self.defence.needs, type(self.defence).__name__)

    def update(self, batch: Batch) -> Update:
        """Quarantine, screen, differentiate, bound, step, admit: one batch.

        Samples with NaN or infinite pixels never reach the defence or the model: they are taken out and counted. If
        anything raises, the learner is as it was before the call.

        Args:
            batch: As received from the stream.

        Returns:
            Norms, the loss and the verdict. A NaN loss is not an error: it is reported.
        """
        began = time.perf_counter()
        finite = _finite(batch)
        quarantined = len(finite) - int(finite.sum())
        if quarantined:
            batch = Batch(batch.x[finite], batch.y[finite])
        if quarantined and not len(batch.x):
            return _unlearned(began, "every sample has NaN or infinite pixels: quarantined", quarantined, ~finite)
        check_domain(batch, PIXELS, where="batch given to Learner.update")
        if self.history is not None:
            self.history.record(self.step, self.model)
        self.memory.pop(FLAGGED, None)
        batch = self.defence.screen(batch.to(self.device), self.view())
        flagged = _over_all(self.memory.get(FLAGGED), finite)
        if len(batch.x) == 0:
            return _unlearned(began, "the defence left no sample of the batch", quarantined, flagged)

        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        before = self._before(buffers)
        try:
            loss = self._backward(batch)
            gradient_norm, bounded_norm = self._bound()
        except BaseException:
            self.restore_buffers(buffers)
            self.optimiser.zero_grad(set_to_none=True)
            raise
        verdict, update_norm = self._step(before)
        return Update(
            batch_loss=loss,
            gradient_norm=gradient_norm,
            bounded_norm=bounded_norm,
            update_norm=update_norm,
            learned=len(batch.x),
            verdict=verdict,
            seconds=time.perf_counter() - began,
            quarantined=quarantined,
            flagged=flagged,
        )

    def begin_round(self) -> None:
        """Before a federated round: what `update` does first, so that `bound` and `aggregate` find the same notes.

        The history takes in the model as it is, and the defence is shown a batch of no samples: a server sees none, but
        some defences take notes of the model then.
        """
        if self.history is not None:
            self.history.record(self.step, self.model)
        nothing = Batch(torch.zeros(0, 1, device=self.device), torch.zeros(0, dtype=torch.int64, device=self.device))
        self.defence.screen(nothing, self.view())

    def apply(self, gradient: Gradient, *, batch_loss: float, learned: int, buffers: Mapping[str, Tensor]) -> Update:
        """Step on a gradient that was made elsewhere, in a federated round; the defence may still refuse the step.

        Call `begin_round` before the clients are asked.

        Args:
            gradient: One row, of every trainable parameter.
            batch_loss: Mean loss behind it, for the record.
            learned: Clients behind it.
            buffers: Taken over with the step (BatchNorm statistics), and rolled back with it.
        """
        began = time.perf_counter()
        own = dict(self.model.named_parameters())
        before = self._before(dict(self.model.named_buffers()))
        self.restore_buffers(buffers)
        self.optimiser.zero_grad(set_to_none=True)
        for name, g in gradient.named().items():
            own[name].grad = g.clone()
        length = float(torch.linalg.vector_norm(gradient.rows))
        verdict, update_norm = self._step(before)
        return Update(batch_loss, length, length, update_norm, learned, verdict, time.perf_counter() - began)

    def _before(self, buffers: Mapping[str, Tensor]) -> Snapshot | None:
        """What a defence that can refuse the step goes back to, with these buffers; None for others."""
        if type(self.defence).admit is Defence.admit:
            return None
        return replace(self.snapshot(), buffers={name: b.detach().clone() for name, b in buffers.items()})

    def _step(self, before: Snapshot | None) -> tuple[Verdict, float]:
        """Step, ask the defence, do what it says; the verdict, and how far the parameters have moved."""
        old = [p.detach().clone() for p in self.model.parameters()]
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        verdict = ADMITTED if before is None else self._admit(before)
        return verdict, _length(p.detach() - o for p, o in zip(self.model.parameters(), old, strict=True))

    def _admit(self, before: Snapshot) -> Verdict:
        """Ask for the verdict and do what it says."""
        try:
            verdict = self.defence.admit(before, self.view())
        except BaseException:
            self.restore(before)
            raise
        if not verdict.admit:
            self.restore(before)
        elif verdict.parameters is not None:
            self.restore_parameters(verdict.parameters)
        return verdict

    def _backward(self, batch: Batch) -> float:
        self.model.train(self.update_mode == "train")
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.defence.loss(self.model, batch, self._checked_criterion, self.view())
        torch.autograd.backward(loss)
        return float(loss.detach())

    def _checked_criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        low, high = int(labels.min()), int(labels.max())
        if logits.ndim != 2 or high >= logits.shape[1] or low < 0:
            raise DataError(
                f"the model gives logits of shape {tuple(logits.shape)}, but the batch has labels {low} to {high}; "
                "build the model with as many outputs as there are classes."
            )
        return self.criterion(logits, labels)

    def _bound(self) -> tuple[float, float]:
        """Let the defence bound the gradient; lengths before and after."""
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        gradient = Gradient.of(grads)
        length = float(torch.linalg.vector_norm(gradient.rows))
        bounded = self.defence.bound(gradient, self.view())
        if bounded is gradient:
            return length, length
        for name, g in bounded.named().items():
            grads[name].copy_(g)
        return length, float(torch.linalg.vector_norm(bounded.rows))

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Score:
        """Accuracy and mean loss of the model that is served, in eval mode; train flags come back as they were."""
        flags = {name: m.training for name, m in self.model.named_modules()}
        self.model.eval()
        hits, loss, count = 0, 0.0, 0
        served = self.defence.serve(self.view())
        for batch in batches:
            x, y = batch.to(self.device)
            logits = self.model(x) if served is None else served.logits(self.model, x)
            hits += int((logits.argmax(1) == y).sum())
            loss += float(self.criterion(logits, y)) * len(y)
            count += len(y)
        for name, m in self.model.named_modules():
            m.training = flags[name]
        return Score(hits / count, loss / count)

    def snapshot(self) -> Snapshot:
        """All that the learner is now, as detached copies."""
        return Snapshot(
            parameters={name: p.detach().clone() for name, p in self.model.named_parameters()},
            buffers={name: b.detach().clone() for name, b in self.model.named_buffers()},
            optimiser=copy.deepcopy(self.optimiser.state_dict()),
            step=self.step,
        )

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Become what the snapshot holds, bit for bit: parameters, buffers, optimiser state and step.

        Raises:
            CheckpointError: Names or shapes are not those of this model and optimiser; nothing has changed then.
        """
        parameters, buffers = dict(self.model.named_parameters()), dict(self.model.named_buffers())
        _require_fit(parameters, snapshot.parameters, "parameters")
        _require_fit(buffers, snapshot.buffers, "buffers")
        try:
            self.optimiser.load_state_dict(copy.deepcopy(dict(snapshot.optimiser)))
        except ValueError as error:
            raise CheckpointError(
                f"the optimiser state is of another optimiser: {error}; build the same one."
            ) from error
        _write(parameters, snapshot.parameters)
        _write(buffers, snapshot.buffers)
        self.step = snapshot.step

    @torch.no_grad()
    def restore_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Take only the buffers (BatchNorm statistics and the like) from elsewhere."""
        own = dict(self.model.named_buffers())
        _require_fit(own, buffers, "buffers")
        _write(own, buffers)

    @torch.no_grad()
    def restore_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Take only the parameters from elsewhere."""
        own = dict(self.model.named_parameters())
        _require_fit(own, parameters, "parameters")
        _write(own, parameters)


def _finite(batch: Batch) -> Tensor:
    """(n,) bool, the samples without NaN or infinite pixels; all where the batch is none, which is said elsewhere."""
    x = batch.x
    if x.ndim < 2 or not x.is_floating_point() or len(x) != len(batch.y):
        return torch.ones(len(x), dtype=torch.bool)
    return torch.isfinite(x).flatten(1).all(1)


def _over_all(flagged: Tensor | None, finite: Tensor) -> Tensor | None:
    """Flags of the samples that were not quarantined, over all samples; None if there is nothing to say."""
    if flagged is None and bool(finite.all()):
        return None
    spread = ~finite.cpu()
    if flagged is not None:
        spread[finite.cpu()] = flagged.cpu()
    return spread


def _unlearned(began: float, reason: str, quarantined: int, flagged: Tensor | None) -> Update:
    """What is said of a batch of which nothing was left."""
    seconds = time.perf_counter() - began
    return Update(torch.nan, 0.0, 0.0, 0.0, 0, Verdict(admit=False, reason=reason), seconds, quarantined, flagged)


def _require_fit(into: Mapping[str, Tensor], values: Mapping[str, Tensor], what: str) -> None:
    if into.keys() != values.keys():
        missing, extra = sorted(into.keys() - values.keys()), sorted(values.keys() - into.keys())
        raise CheckpointError(
            f"the {what} are of another model: missing {missing[:3] or 'none'}, unexpected {extra[:3] or 'none'}; "
            "build the model with the settings that the checkpoint was made with."
        )
    for name, target in into.items():
        if target.shape != values[name].shape:
            raise CheckpointError(
                f"{what[:-1]} '{name}' has shape {tuple(values[name].shape)}, the model wants {tuple(target.shape)}; "
                "build the model with the width and classes that the checkpoint was made with."
            )


def _write(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, target in into.items():
        target.copy_(values[name])


def _length(pieces: Iterable[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p) for p in pieces])))
