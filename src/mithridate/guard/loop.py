"""A guard in any training loop of torch: it lets a defence look at every step, and takes back the ones it refuses."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from mithridate.core.batch import AnyBatch
from mithridate.core.defence import Defence, Verdict
from mithridate.core.domain import Domain
from mithridate.core.environment import environment
from mithridate.core.errors import ConfigError, DataError, UserError
from mithridate.core.past import Weights
from mithridate.core.targets import Criterion
from mithridate.guard import ranks
from mithridate.guard.forms import OpenedBatches, called, opened
from mithridate.guard.judging import Judging
from mithridate.guard.ledger import Ledger
from mithridate.guard.loop_door import (
    GUARDED,
    changes_batches,
    check_loop,
    defence_of,
    described,
    history_for,
    inner,
    try_defence,
)
from mithridate.guard.quarantine import QUARANTINE, Quarantine
from mithridate.guard.record import StepRecord, Tracker
from mithridate.guard.step_log import StepLog
from mithridate.guard.surroundings import Stateful
from mithridate.training.history import History
from mithridate.training.rollback import put_weights
from mithridate.training.step import DefendedStep, Received

log = logging.getLogger("mithridate.guard")

Patience = Literal["warn", "stop", "accept"] | Callable[["Guard", StepRecord], None]


class GuardStopped(UserError):
    """So many refusals came in a row that the owner wants to be asked."""


class Guard:
    """Stands in a training loop: lets a defence judge each step of the optimiser, and takes back what it refuses.

    A refused step leaves parameters, buffers, the optimiser's state and counters, what is named in `also`, and the
    generators of torch, numpy and Python as they were, bit for bit, the very first step included. A step that is not
    finite is refused whatever the defence.

    Two ways, on one object. **Hooks**: once it is made, each `optimizer.step()` is judged, in any loop. **With**:

        with guard.step(batch) as batch:
            loss = criterion(model(batch.x), batch.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()

    is for defences that change the batch (`dsc`, `filter`, `at`), and for a loop that moves more than its optimiser
    inside a step. Where gradients of several batches are added up, pass each through `screen` before its forward pass.

    Args:
        model: As the loop calls it: a module, compiled or wrapped for several processes, if it is.
        optimizer: torch's own over the model's parameters; of a wrapped one, the inner one.
        defence: What judges: the name of one with its defaults (`gate`), a table with `name`, a settings object such as
            `mi.defences.Gate()`, or one of two by its purpose: `recommended`, the chain that held best in our runs, and
            `light`, the same with half of the trusted samples. Both serve another model than the one that learns: let
            the one answer that stands in `serving`.
        trusted: Samples that the owner knows to be clean, of every class: as a batch of the loop. What a gate needs.
        criterion: (logits, targets) -> mean loss, a scalar; by it trusted samples are judged.
        also: What a refused step leaves as it was besides: schedules, a GradScaler, averages of the weights. With
            hooks, each is taken to move at most once a step, after `optimizer.step()`; what it did for a refused step
            is undone when the next one begins (or by `settle`). A schedule that moves at the end of an epoch does not
            belong here.
        domain: What a valid input is, such as `mi.PIXELS`, or the least and the largest value; samples outside are left
            out of a batch that is screened. Unset: anything finite.
        history: Past states, for defences that look back; unset: the states that the defence looks back at, in memory.
        training: Clean batches that the model was trained on, for defences that declare them (`filter`): as batches of
            the loop, in a list or a loader, which are gone through more than once.
        warm_up: Steps, >= 0, that are not defended; only what is not finite is refused. A new head learns first. With
            `every`, all that are judged with the last of them are not defended either.
        every: Steps between two judgements, >= 1. A refusal takes all of them back; see `replay`.
        replay: Makes one step of the loop on a batch, such as `lambda batch: train_step(batch)`. With `every` above 1
            it is called on each batch of a refused window, and the steps are judged one by one: only culprits are
            lost. For `with` only.
        patience: Refusals in a row, >= 1, after which `on_refusals` is asked, and again whenever they have doubled.
        on_refusals: `warn` in the log; `stop`: raise `GuardStopped`; `accept`: take the model as the new reference (see
            `rebase`); or a function of the guard and the last step's record.
        folder: The guard's own: a log of the steps (`steps.jsonl`) and the refused batches (`quarantine`), which
            `mithridate report` and `mithridate quarantine` read. None: neither is kept.
        quarantine_bytes: Of the refused batches together, >= 0.
        trackers: Who else hears of every judgement (`StepRecord`), such as `mi.guard.Prometheus`.

    Raises:
        ConfigError: The optimiser is not the model's, is wrapped or already guarded, the model lies on several devices
            or is sharded, a setting is out of its range, or the defence cannot work here.
        DataError: The trusted samples are none, of one class, or do not fit the model.
        StoreError: `folder` holds other files than a guard's.
        WriteError: `folder` cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        defence: Defence | Mapping[str, Any] | str = "light",
        trusted: object | None = None,
        criterion: Criterion = functional.cross_entropy,
        also: Sequence[Stateful] = (),
        domain: Domain | tuple[Tensor | float, Tensor | float] | None = None,
        history: History | None = None,
        training: Iterable[object] | None = None,
        warm_up: int = 0,
        every: int = 1,
        replay: Callable[[Any], object] | None = None,
        patience: int = 10,
        on_refusals: Patience = "warn",
        folder: str | Path | None = None,
        quarantine_bytes: int = 2**30,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        whole = {"warm_up": (warm_up, 0), "every": (every, 1), "patience": (patience, 1)}
        for name, (value, least) in {**whole, "quarantine_bytes": (quarantine_bytes, 0)}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"guard: {name} is a whole number >= {least}, not {value!r}.")
        if not callable(on_refusals) and on_refusals not in {"warn", "stop", "accept"}:
            raise ConfigError(f"guard: on_refusals is warn, stop, accept or a function, not {on_refusals!r}.")
        check_loop(model, optimizer, also)
        self.defence = defence_of(defence)
        if every > 1 and (changes_batches(self.defence) or self.defence.lookback):
            raise ConfigError(
                f"guard: {type(self.defence).__name__} looks at each batch or each state, so it is asked at every "
                "step; take every = 1, or a defence that judges the model alone (gate)."
            )
        if replay is not None and every == 1:
            raise ConfigError("guard: replay is for every > 1; at every = 1 the refused step is the culprit.")
        self.model, self.optimizer, self.replay, self.on_refusals = model, optimizer, replay, on_refusals
        store = None if folder is None else Quarantine(Path(folder) / QUARANTINE, max_bytes=quarantine_bytes)
        if folder is not None:
            here = environment(next(model.parameters()).device)
            trackers = [
                StepLog(folder, defence=described(self.defence), environment=here, rank=ranks.rank()),
                *trackers,
            ]
        self.ledger = Ledger(patience, store, trackers)
        self._step = DefendedStep(
            inner(model),
            optimizer,
            criterion=criterion,
            defence=self.defence,
            trusted=None if trusted is None else opened(trusted)[0].to(next(inner(model).parameters()).device),
            history=history or history_for(self.defence),
            training=None if training is None else OpenedBatches(training),
            domain=None if domain is None else Domain(*domain),
            foreign=True,
        )
        self._judging = Judging(self._step, optimizer, also, warm_up=warm_up, every=every)
        self._inside = False  # a block of `step`
        self._given: Any = None  # the batch of that block
        self._last: AnyBatch | None = None
        with self._judging.by_itself():
            try_defence(self._step)
        self._hooks = (
            model.register_forward_pre_hook(self._on_forward, with_kwargs=True),
            optimizer.register_step_pre_hook(self._on_step),
            optimizer.register_step_post_hook(self._on_stepped),
        )
        GUARDED.add(optimizer)

    @property
    def attempts(self) -> int:
        """Steps that the optimiser has made, those that were taken back included."""
        return self._judging.attempts

    @property
    def steps(self) -> int:
        """Steps of the optimiser that stayed."""
        return self._step.step

    @property
    def refused(self) -> int:
        """Judgements that took a step, or a window of steps, back."""
        return self.ledger.refused

    @property
    def refusals_in_a_row(self) -> int:
        """Refusals since the last step that stayed."""
        return self.ledger.in_a_row

    @contextmanager
    def step(self, batch: Any) -> Iterator[Any]:  # noqa: ANN401  (any form of batch)
        """One step of the loop, which is judged when the block ends; everything that it moved is taken back if refused.

        What the block raises goes on up, once everything since the last judgement is taken back.

        Args:
            batch: As the loop has it: a pair, a mapping with `labels`, or a `Batch`.

        Yields:
            The batch as the defence lets it through, in the same form. If nothing of it is left, samples that can be
            learned from, and the step is taken back.

        Raises:
            ConfigError: The optimiser was stepped not at all, or twice; the defence has a loss of its own and `loss`
                was not asked for it; or another block is open.
            DataError: As for `screen`.
            GuardStopped: After so many refusals in a row, with `on_refusals = "stop"`.
        """
        if self._inside:
            raise ConfigError("guard.step inside guard.step: end the first block before the next one begins.")
        with self._judging.own_time():
            self._judging.begin()
        self._inside, self._given = True, batch
        try:
            yield self.screen(batch)
            self._check_block()
        except BaseException:
            self._judging.abandon()
            raise
        finally:
            self._inside = False
        if self._judging.attempt.stepped or self._judging.attempt.fault:
            self._conclude(everything=True)
        else:
            self._judging.forget()  # a scaler held an overflowing step back, and has to remember that it did

    def screen(self, batch: Any) -> Any:  # noqa: ANN401  (any form of batch)
        """A batch as the defence lets it through, before the forward pass; in the form that it came in.

        Args:
            batch: As the loop has it: a pair, a mapping with `labels`, or a `Batch`.

        Raises:
            DataError: It is none of these, or model and criterion cannot take it; or nothing of the first batch of all
                is left, so that there is nothing to go on with.
        """
        with self._judging.own_time():
            self._judging.begin()
            received_batch, form = opened(batch)
            received = self._step.screen(received_batch)
        self._judging.attempt.seen.append(received_batch)
        self._judging.attempt.screened = True
        self._judging.attempt.quarantined += received.quarantined
        self._judging.attempt.flagged += 0 if received.flagged is None else int(received.flagged.sum())
        if received.nothing_left:
            self._judging.attempt.fault = self._judging.attempt.fault or received.nothing_left
            usable = self._last if self._last is not None else self._step.trusted
            if usable is None:
                raise DataError(f"guard: {received.nothing_left}; and there is no earlier batch to go on with.")
            received = Received(usable.take(slice(0, received_batch.size)), None, None, 0)
        else:
            self._last = received.batch
        if received.weights is not None or self.defence.acts("loss"):
            self._judging.attempt.received[id(received.batch.y)] = received
        return form(received.batch)

    def loss(self, batch: Any) -> Tensor:  # noqa: ANN401  (any form of batch)
        """The loss to differentiate, for defences that have one of their own or weigh samples: a scalar.

        Args:
            batch: What `step` or `screen` gave.

        Raises:
            DataError: It is none of the forms that these give.
        """
        screened = opened(batch)[0]
        received = self._judging.attempt.received.get(id(screened.y), Received(screened, None, None, 0))
        self._judging.attempt.loss_taken = True
        return self._step.loss(received)

    def rebase(self) -> None:
        """Take the model as it is for the new reference: the owner's word that the task has changed.

        Raises:
            ConfigError: A step has begun, or `every` is above 1 and some are not judged yet.
        """
        if self._judging.made or self._inside:
            raise ConfigError("guard.rebase inside a step: call it between two steps.")
        self._step.memory.clear()
        self.ledger.in_a_row = 0

    def settle(self) -> None:
        """Undo what `also` did for a refused step; called by itself when the next one begins."""
        self._judging.settle()

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Inside the block the model is the one that should answer, where the defence serves another one (`ema`)."""
        served = self._step.defence.serve(self._step.view())
        if served is None:
            yield
            return
        own = Weights.of(self._step.model).copied()
        put_weights(self._step.model, served)
        try:
            yield
        finally:
            put_weights(self._step.model, own)

    def detach(self) -> None:
        """Leave the loop: steps that are not judged yet stay, and no further one is judged."""
        self.settle()
        for hook in self._hooks:
            hook.remove()
        GUARDED.discard(self.optimizer)
        self.ledger.close()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed loop needs to go on as if it had not ended: numbers and tensors; call it between two steps.

        With `every` above 1, steps that are not judged yet are taken as they are: save right after a judgement.
        """
        self.settle()
        history = self._step.history
        return {
            "attempts": self._judging.attempts,
            "refused": self.refused,
            "refusals_in_a_row": self.refusals_in_a_row,
            "step": self._step.step,
            "memory": {name: t.clone() for name, t in self._step.memory.items()},
            "history": {} if history is None else history.tensors(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave, after model and optimiser were loaded.

        Args:
            state_dict: Of a guard with the same defence.

        Raises:
            ConfigError: It is of something else.
        """
        missing = {"attempts", "refused", "refusals_in_a_row", "step", "memory", "history"} - state_dict.keys()
        if missing:
            raise ConfigError(
                f"guard: this is no state of a guard, it has no '{min(missing)}'; give what its state_dict() returned."
            )
        self._judging.close()
        self._judging.attempts = int(state_dict["attempts"])
        self.ledger.refused, self.ledger.in_a_row = int(state_dict["refused"]), int(state_dict["refusals_in_a_row"])
        self._step.step = int(state_dict["step"])
        self._step.memory.clear()
        self._step.memory.update({name: t.clone() for name, t in state_dict["memory"].items()})
        if self._step.history is not None:
            self._step.history.load(state_dict["history"])

    # Hooks

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        judging = self._judging
        if judging.mine or not module.training or not torch.is_grad_enabled():
            return
        if judging.attempt.begun and not self._inside and not judging.made and judging.around.scaled_down():
            judging.close()  # a scaler held the step back, and no hook of the optimiser said so
        with judging.own_time():
            judging.begin()
        batch = None if judging.attempt.screened else called(args, kwargs)
        if batch is not None:
            judging.attempt.seen.append(batch)

    def _on_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        judging = self._judging
        if judging.mine:
            return None
        if self.replay is not None and not self._inside:
            raise ConfigError(
                "guard: replay gets the batches of a refused window, which a hook does not know: write `with "
                "guard.step(batch) as batch:`, or leave replay out."
            )
        if self._inside and judging.attempt.stepped:
            raise ConfigError("the optimiser was stepped twice in one guard.step: give each step a block of its own.")
        if changes_batches(self.defence) and not judging.attempt.screened and judging.attempts >= judging.warm_up:
            raise ConfigError(
                f"{type(self.defence).__name__} changes the batch before the forward pass, which a hook cannot do: "
                "write `with guard.step(batch) as batch:`, or pass each batch through guard.screen."
            )
        with judging.own_time():
            judging.begin(seen=False)
        closure = kwargs.get("closure") or next((arg for arg in args[1:] if callable(arg)), None)
        if closure is None:
            with judging.own_time():
                judging.bound()
            return None

        def bounded(*inner: object) -> object:
            loss = closure(*inner)
            with judging.own_time():
                judging.bound()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": bounded}
        return tuple(bounded if arg is closure else arg for arg in args), kwargs

    def _on_stepped(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._judging.mine:
            return
        if self._judging.attempt.held_back:  # the optimiser itself has held the step back
            self._judging.attempt.held_back = False
            if not self._inside:
                self._judging.forget()
            return
        self._judging.attempt.stepped = True
        if not self._inside:
            self._conclude(everything=False)

    # A step

    def _conclude(self, *, everything: bool) -> None:
        """Judge, if it is time, and do what was said.

        Args:
            everything: Whether what the loop moved besides is behind us, too, so that it can be taken back at once.
        """
        if not self._judging.made_one(self._given if everything else None):
            return
        with self._judging.own_time():
            verdict = self._judging.judge(everything=everything)
        if not verdict.admit and self.replay is not None and self._gone_through():
            return
        seen = [batch for _, several in self._judging.window for batch in several]
        self._report(verdict, seen or self._judging.attempt.seen)
        self._judging.close()

    def _gone_through(self) -> bool:
        """Go through a refused window step by step; whether there was one."""
        judging = self._judging
        if len(judging.window) < 2 or self.replay is None:
            return False
        batches, judging.window = [given for given, _ in judging.window], []
        judging.attempts -= len(batches)
        every, judging.every = judging.every, 1
        replay, self.replay = self.replay, None
        judging.close()
        try:
            for batch in batches:
                with self.step(batch) as screened:
                    replay(screened)
        finally:
            judging.every, self.replay = every, replay
        return True

    def _report(self, verdict: Verdict, batches: Sequence[Any]) -> None:
        """Tell everybody who listens, and ask the owner after too many refusals in a row."""
        record = self.ledger.note(
            verdict,
            batches,
            attempt=self._judging.attempts,
            step=self._step.step - (self._judging.made if verdict.admit else 0),
            steps=self._judging.made,
            seconds=self._judging.attempt.seconds,
            quarantined=self._judging.attempt.quarantined,
            flagged=self._judging.attempt.flagged,
            warm_up=self._judging.attempts - self._judging.made < self._judging.warm_up,
        )
        if not self.ledger.impatient:
            return
        self._judging.close()
        log.warning("guard: %d refusals in a row; the last one: %s", record.refusals_in_a_row, record.reason)
        if callable(self.on_refusals):
            self.on_refusals(self, record)
        elif self.on_refusals == "accept":
            self.rebase()
        elif self.on_refusals == "stop":
            raise GuardStopped(
                f"the guard has refused {record.refusals_in_a_row} times in a row, and on_refusals = stop; the last: "
                f"{record.reason}. Look at what was refused; guard.rebase() takes the model as it is for the reference."
            )

    def _check_block(self) -> None:
        if not self._judging.attempt.stepped and not self._judging.attempt.fault and not self._judging.around.scales:
            raise ConfigError(
                "guard.step ended without optimizer.step(): call it once inside the block. Name a GradScaler, which "
                "may hold a step back, in `also`; where gradients of several batches are added up, pass all but the "
                "last through guard.screen."
            )
        if self._judging.attempt.received and not self._judging.attempt.loss_taken:
            raise ConfigError(
                f"{type(self.defence).__name__} has a loss of its own or weighs samples: differentiate "
                "guard.loss(batch)."
            )


attach = Guard
"""Put a guard into a loop: one line, and every `optimizer.step()` is judged."""
