"""One defended step: what every driver (learner, federated server, a loop of the user's own) goes through."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mithridate.core.batch import AnyBatch, check_batch
from mithridate.core.defence import Defence, Screened, Verdict, checked
from mithridate.core.domain import Domain
from mithridate.core.errors import ConfigError, DataError, UserError
from mithridate.core.model import WhiteBox
from mithridate.core.modes import BatchNormMode, eager, in_mode
from mithridate.core.seeding import derived_seed, seeded_default
from mithridate.core.targets import IGNORED, Criterion, counted, improbable, loss_of, names_classes, unknown_labels
from mithridate.core.updates import Updates
from mithridate.core.view import Memory, Need, View
from mithridate.training.door import (
    TOO_FEW,
    check_parts,
    check_steps_on_a_gradient,
    check_trainable,
    kind,
    kinds,
    too_few,
)
from mithridate.training.history import History
from mithridate.training.rollback import Rollback, copied, fitted, write


class Received(NamedTuple):
    """A batch as it goes on to the model.

    Args:
        batch: What quarantine and defence left.
        weights: What each sample counts in the loss, one a sample, >= 0; None: all count 1.
        flagged: (n,) bool over the batch as received: the samples that the defence corrected, dropped or gives less
            weight, quarantined ones included; None if all are treated alike.
        quarantined: How many samples were shown to nobody: those with NaN or infinity, outside the domain, with a class
            number that the model has no output for, or with targets that should be probabilities and are none.
        fault: Why the defence could not screen what was left; empty if it could.
    """

    batch: AnyBatch
    weights: Tensor | None
    flagged: Tensor | None
    quarantined: int
    fault: str = ""

    @property
    def nothing_left(self) -> str:
        """Why no sample is left; empty if some are."""
        if self.fault or self.batch.size:
            return self.fault
        if self.flagged is not None and self.quarantined == len(self.flagged):
            return (
                "every sample is quarantined: not finite, outside the domain, of a class that the model has not, or "
                "with targets that are no probabilities"
            )
        return "the defence left no sample of the batch"


class DefendedStep:
    """A model, its optimiser and its defence: steps that can be taken back.

    A driver opens `taking`, which remembers where the step starts; then it either has samples (`screen`,
    `backward`, `bound`) or updates that others made (`bound_updates`, `put_gradient`); then `advance` steps the
    optimiser and does what the defence says. If anything raises inside `taking`, model, optimiser and notes are as
    before. A loop that calls its model and its optimiser by itself goes by `start`, `judged` and `conclude`, or
    `abandon`, which draw nothing and leave gradients alone.

    Args:
        model: Trained in place.
        optimiser: A torch optimiser over its parameters; None where something else changes the model.
        criterion: (logits, targets) -> mean loss, a scalar.
        defence: What stands in the step.
        trusted: Samples that the owner knows to be clean, for defences that declare them.
        history: Keeps past states of the model, for defences that look back; the step records into it.
        training: Clean batches that the model was trained on, for defences that declare them; a list, or anything
            that can be iterated more than once.
        domain: What a valid input is: samples outside are quarantined, and defences stay inside; None: unknown.
        seed: Of what the model draws in a step (dropout), with the step's number: a learner that goes on from a
            snapshot draws what it would have drawn. torch's own generators are left alone.
        foreign: Whether somebody else's loop steps the optimiser, so that it may be one that needs a closure.

    Raises:
        ConfigError: Something is not what its name says, no parameter of the model is trainable, or the optimiser has
            none of those that are, or cannot step on one dense gradient.
        DataError: The trusted set is no batch, or holds NaN or infinity.
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
        seed: int = 0,
        foreign: bool = False,
    ) -> None:
        check_parts(model, optimiser, criterion, defence)
        if not foreign:
            check_steps_on_a_gradient(optimiser)
        check_trainable(model, optimiser)
        if trusted is not None:
            check_batch(trusted, where="trusted samples")
            trusted = trusted.with_class_numbers()
            if not bool(trusted.finite().all()):
                raise DataError("trusted samples hold NaN or infinity; give clean ones.")
        self.model = model
        self.optimiser = optimiser
        self.criterion = criterion
        self.defence = defence or Defence()
        self.trusted = trusted
        self.history = history
        self.training = training
        self.domain = domain
        self.seed = seed
        self.step = 0
        self.memory: Memory = {}
        self._rollback = Rollback()
        self._notes: Memory = {}
        self._way = 0.0
        """How far the step that is judged has moved the parameters, in l2."""
        self._classes: float = min((m.out_features for m in model.modules() if isinstance(m, nn.Linear)), default=0)
        """Class numbers below this have an output of the model's, whichever linear layer is its head; known exactly
        once it has answered, and infinite if targets are no class numbers."""
        self._taken: tuple[str, ...] = ()
        """The kinds of inputs and targets that were last learned from."""

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
        with (
            nullcontext() if self.history is None else self.history.recording(self.step, self.model),
            seeded_default(derived_seed("step", self.seed, self.step), self.device),
        ):
            step = self.step
            try:
                self.start()
                yield
            except BaseException:
                self.step = step
                self.abandon()
                if self.optimiser is not None:
                    self.optimiser.zero_grad(set_to_none=True)
                raise

    def start(self) -> None:
        """Remember where a step starts, and let the defence take notes."""
        self._rollback.save(self.model, self.optimiser)
        self._notes = copied(self.memory, self._notes)
        self.defence.begin(self.view())

    def abandon(self) -> None:
        """Undo a step as if it had never been tried: model, optimiser and notes are as at its start."""
        self._rollback.restore()
        self.memory.clear()
        self.memory.update(copied(self._notes, {}))

    def screen(self, batch: AnyBatch) -> Received:
        """Quarantine the samples that nobody should see, and let the defence screen the rest.

        Args:
            batch: The samples as received; targets that are whole numbers of any type become int64.

        Raises:
            ConfigError: The defence cannot work on inputs or targets of this kind.
            DataError: It is no batch, or model or criterion cannot take inputs or targets of this kind.
        """
        check_batch(batch, where="batch that was received")
        batch = batch.with_class_numbers()
        good = self.usable(batch)
        quarantined = batch.size - int(good.sum())
        if quarantined:
            batch = batch.take(good)
        flagged = ~good if quarantined else None
        if batch.size == 0:
            return Received(batch, None, flagged, quarantined)
        batch = batch.to(self.device)
        if batch.y.dtype == torch.int64 and bool((batch.y == IGNORED).all()):
            fault = f"every target is {IGNORED}, which no loss counts: there is nothing to learn from"
            return Received(batch.take(slice(0)), None, flagged, quarantined, fault)
        self.defence.check_inputs(batch)
        try:
            with self._explained(batch):
                screened: Screened = checked(self.defence, batch, self.defence.screen(batch, self.view()))
        except ValueError as error:
            if TOO_FEW not in str(error):
                raise
            return Received(batch.take(slice(0)), None, flagged, quarantined, too_few(f"{batch.size} samples"))
        if screened.flagged is not None:
            flagged = ~good
            flagged[good] = screened.flagged.cpu()
        return Received(screened.batch, screened.weights, flagged, quarantined)

    def usable(self, batch: AnyBatch) -> Tensor:
        """(n,) bool, on the CPU: samples that are finite, inside the domain, and of a class that the model knows.

        Targets that the criterion reads as probabilities must be such, in [0, 1].

        Args:
            batch: A batch (see `check_batch`).

        Raises:
            DataError: The model cannot take inputs of this kind.
        """
        good = batch.finite()
        if self.domain is not None and isinstance(batch.x, Tensor):
            good &= self.domain.inside(batch.x).cpu()
        y = batch.y
        if (bad := improbable(self.criterion, y)) is not None:
            good &= ~bad.cpu()
        if y.dtype != torch.int64 or y.ndim > 2 or not bool(good.any()):
            return good
        if bool(unknown_labels(self._classes, y).any()):  # or it has not answered yet: see what it says
            one = batch.take(good.nonzero()[:1, 0]).to(self.device)
            with torch.no_grad(), self._explained(one):
                logits = self.white_box.logits(one.x)
            self._classes = logits.shape[-1] if names_classes(logits, one.y) else math.inf
            good &= ~unknown_labels(self._classes, y).cpu()
        return good

    @contextmanager
    def _explained(self, batch: AnyBatch) -> Iterator[None]:
        """Say that model or criterion cannot take the batch, where an error comes of that and not of the defence."""
        try:
            yield
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or TOO_FEW in str(error):
                raise
            # Values may be at fault in a batch of a kind that it took before only where they are positions (of tokens).
            if kinds(batch) == self._taken and not isinstance(error, IndexError):
                raise
            try:
                with torch.no_grad(), eager():  # what a compiler stumbles over is no fault of the batch
                    logits = self.white_box.logits(batch.x)
            except UserError:
                raise
            except Exception as own:  # whatever the model stumbles over
                reason = str(own).partition("\n")[0]
                raise DataError(
                    f"{type(self.model).__name__} cannot take inputs of {kind(batch)}: {reason}; give batches of the "
                    "shape and type that it was built for."
                ) from error
            with torch.no_grad():
                loss_of(self.criterion, logits, batch.y, where="the batch")
            raise

    def backward(self, received: Received, mode: BatchNormMode) -> Tensor:
        """Differentiate the defence's loss into the parameters' `.grad`; the loss, detached.

        Args:
            received: From `screen`, with samples in it.
            mode: BatchNorm: `train` uses and records the batch's statistics; `eval` leaves them alone. What is frozen
                (in eval mode by itself) stays so.

        Raises:
            DataError: Targets do not fit the model or the criterion, or the model cannot take the inputs.
            ConfigError: The criterion gives no scalar, or one that no trainable parameter has a part in.
        """
        for p in self.model.parameters():
            p.grad = None
        with in_mode(self.model, mode), self._explained(received.batch):
            loss = self.loss(received)
            torch.autograd.backward(loss)
        self._taken = kinds(received.batch)
        return loss.detach()

    def loss(self, received: Received) -> Tensor:
        """The defence's loss of what is left of a batch, to be differentiated; the model's mode is the caller's.

        Args:
            received: From `screen`, with samples in it.

        Raises:
            ConfigError: The criterion gives no scalar, or one that no trainable parameter has a part in.
        """
        criterion = self._checked_criterion if received.weights is None else self._weighted(received.weights)
        loss = self.defence.loss(self.model, received.batch, criterion, self.view())
        if not loss.requires_grad:
            raise ConfigError(
                "no trainable parameter has a part in the loss, so there is nothing to learn; let some parameters "
                "require gradients, and use no `torch.no_grad` or `detach` on the way from them to the loss."
            )
        return loss

    def _checked_criterion(self, logits: Tensor, y: Tensor) -> Tensor:
        if names_classes(logits, y):
            self._classes = logits.shape[-1]
        return loss_of(self.criterion, logits, y, where="the batch")

    def _weighted(self, weights: Tensor) -> Criterion:
        """The mean over targets that count of their losses times their samples' weights, from one that gives means."""

        def criterion(logits: Tensor, y: Tensor) -> Tensor:
            if len(y) != len(weights):
                raise ConfigError(
                    f"the defence gives weights to {len(weights)} samples, and its loss looks at {len(y)}; a part that "
                    "weighs samples cannot stand beside one that learns from others."
                )
            if not (count := counted(logits, y)):
                return self._checked_criterion(logits, y)  # NaN, which no step is made on
            total = torch.zeros((), dtype=logits.dtype, device=logits.device)
            for weight in torch.unique(weights):
                group = weights == weight
                if size := counted(logits[group], y[group]):
                    # The mean of a group times its size is the sum of its losses.
                    total = total + float(weight) * size * self._checked_criterion(logits[group], y[group])
            return total / count

        return criterion

    def bound(self, loss: Tensor | None = None) -> tuple[float, float]:
        """Let the defence bound the gradient in `.grad`; one that is not finite is left to `advance`, which refuses it.

        Args:
            loss: The mean loss behind it, if it is known.

        Returns:
            Its l2 length before and after.
        """
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        updates = Updates.of(gradients, loss=loss)
        length, version = float(torch.linalg.vector_norm(updates.rows)), updates.rows._version
        if not math.isfinite(length) and not bool(updates.rows.isfinite().all()):
            return length, length
        bounded = self.bound_updates(updates)
        if bounded is updates and updates.rows._version == version:  # nor was it written to in place
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

    def advance(self, length: float = math.nan) -> tuple[Verdict, float]:
        """Step the optimiser and do what the defence says: its verdict, and how far (l2) the parameters moved.

        A gradient, parameters or statistics that are not finite are refused before the defence is asked.

        Args:
            length: Of the gradient, in l2, if it is known.
        """
        fault = "" if math.isfinite(length) else self.unfit_gradient()
        if fault:
            return self.refuse(fault), 0.0
        if self.optimiser is not None:
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
        verdict = self.judged()
        return verdict, self.conclude(verdict)

    def judged(self) -> Verdict:
        """What the defence says of the step that was made; parameters or statistics not finite are refused unasked."""
        self._way = self._moved()
        spoiled = self._rollback.spoiled_buffer() if math.isfinite(self._way) else self._rollback.spoiled()
        if spoiled:
            return Verdict(admit=False, reason=f"the step would make '{spoiled}' not finite")
        self.step += 1
        try:
            return self.defence.admit(self._rollback.weights, self.view())
        finally:
            self.step -= 1

    def conclude(self, verdict: Verdict) -> float:
        """Do what was said of the step: how far (l2) the parameters have moved in the end.

        Args:
            verdict: From `judged`, or a refusal of the loop's own.
        """
        if not verdict.admit:
            self._rollback.restore()
            if verdict.forget and self.optimiser is not None:
                self.optimiser.state.clear()
            return 0.0
        if verdict.parameters is not None:
            self.put_parameters(verdict.parameters)
            self._way = self._moved()
        self.step += 1
        self.defence.committed(self.view())
        return self._way

    def refuse(self, reason: str) -> Verdict:
        """Take the step back, inside `taking`: model and optimiser are as they were before it.

        Args:
            reason: Why, for the trace.
        """
        self._rollback.restore()
        if self.optimiser is not None:
            self.optimiser.zero_grad(set_to_none=True)
        return Verdict(admit=False, reason=reason)

    def unfit_gradient(self) -> str:
        """Why no optimiser should see the gradient; empty if one may."""
        for name, p in self.model.named_parameters():
            if p.grad is not None and not bool(p.grad.isfinite().all()):
                return f"the gradient of '{name}' is not finite"
        return ""

    def _moved(self) -> float:
        lengths = [torch.linalg.vector_norm(d) for d in self._rollback.moved()]
        return float(torch.linalg.vector_norm(torch.stack(lengths)))

    def put_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Take the parameters from elsewhere, by name.

        Raises:
            CheckpointError: Names or shapes are not those of this model; nothing has changed then.
        """
        current = dict(self.model.named_parameters())
        write(current, fitted(current, parameters, "parameters"))

    def put_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Take the buffers (BatchNorm statistics and the like) from elsewhere, by name.

        Raises:
            CheckpointError: Names or shapes are not those of this model; nothing has changed then.
        """
        current = dict(self.model.named_buffers())
        write(current, fitted(current, buffers, "buffers"))
