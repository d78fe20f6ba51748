"""One defended step: what every driver (learner, federated server, a loop of the user's own) goes through."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mithridate.core.batch import AnyBatch, check_batch
from mithridate.core.defence import Defence, Screened, Verdict, checked
from mithridate.core.domain import Domain
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.model import BatchNormMode, Criterion, WhiteBox, in_mode
from mithridate.core.tolerance import check_labels
from mithridate.core.updates import Updates
from mithridate.core.view import Memory, Need, View
from mithridate.training.history import History
from mithridate.training.rollback import Rollback, copied, require_fit, write


class Received(NamedTuple):
    """A batch as it goes on to the model.

    Args:
        batch: What quarantine and defence left.
        weights: What each sample counts in the loss, one a sample, >= 0; None: all count 1.
        flagged: (n,) bool over the batch as received: the samples that the defence corrected, dropped or gives less
            weight, quarantined ones included; None if all are treated alike.
        quarantined: How many samples had NaN or infinity, and were shown to nobody.
    """

    batch: AnyBatch
    weights: Tensor | None
    flagged: Tensor | None
    quarantined: int

    @property
    def nothing_left(self) -> str:
        """Why no sample is left; empty if some are."""
        if self.batch.size:
            return ""
        if self.flagged is not None and self.quarantined == len(self.flagged):
            return "every sample has NaN or infinite pixels: quarantined"
        return "the defence left no sample of the batch"


class DefendedStep:
    """A model, its optimiser and its defence: steps that can be taken back.

    A driver opens `taking`, which remembers where the step starts; then it either has samples (`screen`,
    `backward`, `bound`) or updates that others made (`bound_updates`, `put_gradient`); then `advance` steps the
    optimiser and does what the defence says. If anything raises inside `taking`, model, optimiser and notes are as
    before.

    Args:
        model: Trained in place.
        optimiser: A torch optimiser over its parameters; None where something else changes the model.
        criterion: (logits, targets) -> mean loss, a scalar.
        defence: What stands in the step.
        trusted: Samples that the owner knows to be clean, for defences that declare them.
        history: Keeps past states of the model, for defences that look back; the step records into it.
        training: Clean batches that the model was trained on, for defences that declare them; a list, or anything
            that can be iterated more than once.
        domain: What a valid input is, for defences that change samples; None: unknown, and nothing is clamped.
    """

    def __init__(
        self,
        model: nn.Module,
        optimiser: Optimizer | None,
        *,
        criterion: Criterion,
        defence: Defence | None = None,
        trusted: AnyBatch | None = None,
        history: History | None = None,
        training: Iterable[AnyBatch] | None = None,
        domain: Domain | None = None,
    ) -> None:
        self.model = model
        self.optimiser = optimiser
        self.criterion = criterion
        self.defence = defence or Defence()
        self.trusted = trusted
        self.history = history
        self.training = training
        self.domain = domain
        self.step = 0
        self.memory: Memory = {}
        self._rollback = Rollback()
        self._notes: Memory = {}

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
        available: dict[Need, Any] = {Need.MODEL: self.white_box}
        for need, value in (
            (Need.TRUSTED, self.trusted),
            (Need.HISTORY, self.history),
            (Need.TRAINING, self.training),
        ):
            if value is not None:
                available[need] = value
        name = type(self.defence).__name__
        return View(self.step, self.memory, available, self.defence.needs, name, self.domain or Domain())

    @contextmanager
    def taking(self) -> Iterator[None]:
        """A step begins: remember where it starts, let the defence take notes; undo everything if the block raises."""
        if self.history is not None:
            self.history.record(self.step, self.model)
        self._rollback.save(self.model, self.optimiser)
        self._notes, step = copied(self.memory, self._notes), self.step
        try:
            self.defence.begin(self.view())
            yield
        except BaseException:
            self._rollback.restore()
            self.step = step
            self.memory.clear()
            self.memory.update(copied(self._notes, {}))
            if self.optimiser is not None:
                self.optimiser.zero_grad(set_to_none=True)
            raise

    def screen(self, batch: AnyBatch) -> Received:
        """Quarantine what is not finite, and let the defence screen the rest.

        Args:
            batch: The samples as received.

        Raises:
            DataError: It is no batch.
        """
        check_batch(batch, where="batch that was received")
        finite = batch.finite()
        quarantined = batch.size - int(finite.sum())
        if quarantined:
            batch = batch.take(finite)
        flagged = ~finite if quarantined else None
        if batch.size == 0:
            return Received(batch, None, flagged, quarantined)
        batch = batch.to(self.device)
        screened: Screened = checked(self.defence, batch, self.defence.screen(batch, self.view()))
        if screened.flagged is not None:
            flagged = ~finite
            flagged[finite] = screened.flagged.cpu()
        return Received(screened.batch, screened.weights, flagged, quarantined)

    def backward(self, received: Received, mode: BatchNormMode) -> Tensor:
        """Differentiate the defence's loss into the parameters' `.grad`; the loss, detached.

        Args:
            received: From `screen`, with samples in it.
            mode: BatchNorm: `train` uses and records the batch's statistics; `eval` leaves them alone.

        Raises:
            DataError: Targets do not fit the model or the criterion.
            ConfigError: The criterion gives no scalar.
        """
        for p in self.model.parameters():
            p.grad = None
        criterion = self._checked_criterion if received.weights is None else self._weighted(received.weights)
        with in_mode(self.model, mode):
            loss = self.defence.loss(self.model, received.batch, criterion, self.view())
            torch.autograd.backward(loss)
        return loss.detach()

    def _checked_criterion(self, logits: Tensor, y: Tensor) -> Tensor:
        check_labels(logits, y, where="the batch")
        try:
            loss = self.criterion(logits, y)
        except (RuntimeError, ValueError, IndexError) as error:
            raise DataError(
                f"the criterion cannot compare outputs {logits.dtype} {tuple(logits.shape)} with targets {y.dtype} "
                f"{tuple(y.shape)}: {error}; give targets, or a model, of the shape that the criterion takes."
            ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ConfigError(
                f"the criterion gives {shape}, and a loss is one number: give one that averages over samples "
                '(reduction="mean").'
            )
        return loss.reshape(())

    def _weighted(self, weights: Tensor) -> Criterion:
        """The mean over samples of their losses times their weights, from a criterion that gives means."""

        def criterion(logits: Tensor, y: Tensor) -> Tensor:
            if len(y) != len(weights):
                raise ConfigError(
                    f"the defence gives weights to {len(weights)} samples, and its loss looks at {len(y)}; a part that "
                    "weighs samples cannot stand beside one that learns from others."
                )
            total = torch.zeros((), dtype=logits.dtype, device=logits.device)
            for weight in torch.unique(weights):
                group = weights == weight
                # The mean of a group times its size is the sum of its losses.
                total = total + float(weight) * int(group.sum()) * self._checked_criterion(logits[group], y[group])
            return total / len(y)

        return criterion

    def bound(self, loss: Tensor | None = None) -> tuple[float, float]:
        """Let the defence bound the gradient in `.grad`.

        Args:
            loss: The mean loss behind it, if it is known.

        Returns:
            Its l2 length before and after.
        """
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        updates = Updates.of(gradients, loss=loss)
        length = float(torch.linalg.vector_norm(updates.rows))
        bounded = self.bound_updates(updates)
        if bounded is updates:
            return length, length
        for name, g in bounded.named().items():
            gradients[name].copy_(g)
        return length, float(torch.linalg.vector_norm(bounded.rows))

    def bound_updates(self, updates: Updates) -> Updates:
        """Clients' updates as the defence bounds them."""
        return self.defence.bound(updates, self.view())

    def put_gradient(self, update: Updates) -> None:
        """Take one row that was made elsewhere for the gradient."""
        parameters = dict(self.model.named_parameters())
        for p in parameters.values():
            p.grad = None
        for name, g in update.named().items():
            parameters[name].grad = g.clone()

    def advance(self) -> tuple[Verdict, float]:
        """Step the optimiser and do what the defence says: its verdict, and how far (l2) the parameters moved."""
        if self.optimiser is not None:
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        verdict = self.defence.admit(self._rollback.weights, self.view())
        if not verdict.admit:
            self._rollback.restore()
            self.step -= 1
        else:
            if verdict.parameters is not None:
                self.put_parameters(verdict.parameters)
            self.defence.committed(self.view())
        lengths = [torch.linalg.vector_norm(d) for d in self._rollback.moved()]
        return verdict, float(torch.linalg.vector_norm(torch.stack(lengths)))

    def put_parameters(self, parameters: Any) -> None:  # noqa: ANN401  (a mapping of tensors)
        """Take the parameters from elsewhere, by name.

        Raises:
            CheckpointError: Names or shapes are not those of this model; nothing has changed then.
        """
        current = dict(self.model.named_parameters())
        require_fit(current, parameters, "parameters")
        write(current, parameters)

    def put_buffers(self, buffers: Any) -> None:  # noqa: ANN401  (a mapping of tensors)
        """Take the buffers (BatchNorm statistics and the like) from elsewhere, by name.

        Raises:
            CheckpointError: Names or shapes are not those of this model; nothing has changed then.
        """
        current = dict(self.model.named_buffers())
        require_fit(current, buffers, "buffers")
        write(current, buffers)
