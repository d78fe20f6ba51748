"""Flower, the server's side: any strategy behind the defences of this library.

Needs the extra `flower` (flwr >= 1.41, < 2). A round is one defended step (`training.step`); this file carries records
to it and back. The attacker's side is `guard.flower_attack`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from mithridate.core.batch import AnyBatch, check_batch
from mithridate.core.defence import Defence
from mithridate.core.errors import ConfigError
from mithridate.core.files import path_of
from mithridate.core.model import Criterion
from mithridate.core.past import Weights
from mithridate.core.registry import fields_of
from mithridate.core.tolerance import quality
from mithridate.core.updates import Updates
from mithridate.core.view import Need
from mithridate.defences.none import Standard
from mithridate.guard.events import KINDS, Event, Journal, Tally, log
from mithridate.guard.flower_inner import check_inner, loss_of, put_back, remembered, weighted_by
from mithridate.guard.flower_replies import RefusedError, Reply, opened
from mithridate.guard.limits import Layout, ReplyLimits, State, difference, excess, is_statistic, moved
from mithridate.training.history import History
from mithridate.training.step import DefendedStep

AT_ONCE = 8
"""Clients' rows that the defence is shown at a time: a copy of every update at once could be too much to hold."""


UNLIMITED = (
    "there is no defence, and no limit on updates: one hostile client decides what the model becomes. Give "
    "`limits=mithridate.guard.RECOMMENDED`, or a defence such as Clip(clip_norm=...)."
)


class FlowerRounds(NamedTuple):
    """What a Flower server says of its rounds to defences: every client's whole update is bounded, then averaged."""

    bound: Literal["after", "before"] = "before"
    distances: Literal["all", "without_norm"] = "all"


class BareWeights(nn.Module):
    """Weights of a model whose architecture the server does not know; they answer nothing."""

    def __init__(self, state: State) -> None:
        super().__init__()
        tensors = {name: torch.from_numpy(np.array(a, dtype=np.float64)) for name, a in state.items()}
        # `register_parameter` takes no dots, which the names of arrays have.
        self._parameters.update({name: nn.Parameter(t) for name, t in tensors.items()})


class GuardedStrategy(Strategy):
    """Any Flower strategy, behind a defence: it only ever sees replies that are fit to be aggregated.

    Refused, counted and named are: errors; replies of nodes that were not asked, or a second one of the same node; no
    arrays or metrics, or more than one record of either; arrays that are missing, unknown, unreadable, of another shape
    or a type that cannot hold the model's, NaN or infinite, negative where BatchNorm keeps variances, or absurdly far
    from the model; metrics that are not finite; a number of examples that is missing, not a number or not above 0; and
    records that are named or sized unlike those of more than half of the clients, since one such reply would stop
    Flower's strategies. Where no more than half agree, nobody is refused for it: each metric that more than half report
    in one size is passed on, and asked of everybody; the others are left out.

    A round is then one step of `DefendedStep`. The defence bounds each client's update: what it takes away from the
    global model, that is a gradient at learning rate 1 (`clip_norm` has the unit of the weights; give `dgc` lr = 1).
    The inner strategy aggregates; the defence may shorten the step of the aggregate, or refuse it. A refused round
    returns no arrays, upon which Flower keeps the old model; the inner strategy's own state (momentum, second moments,
    current arrays) goes back to what it was before the round. The old model also stays if no reply is fit, or too few
    for the inner strategy, or if the aggregate is not finite.

    Without a defence and with replies that are in order, the inner strategy gets the very messages that came. The
    round's metrics gain `guard-accepted`, `-refused`, `-missing`, `-bounded`, `-capped`, `-vetoed` and `-skipped`; and,
    where there are trusted samples, `guard-loss` and `guard-worst-accuracy` (of the class that fares worst) of the
    aggregate: look at them in honest rounds before you set the limits of a gate. At the end, `tallies` and `table` say
    who was refused, how often and why.

    What breaks it: what breaks the defence, which its own page says; what breaks the limits; and encrypted (secure)
    aggregation, under which no server can look at single updates. It is not for strategies whose arrays are no weights
    (FedXgbBagging, FedXgbCyclic). Nodes are told apart by the id that the SuperLink gives them: who may join is its
    affair.

    Args:
        inner: The strategy that samples clients and aggregates.
        defence: What stands in the round, the same object as in a simulation: `Clip`, `DGC`, `Gate`, `chain(...)`. None
            leaves the updates as they are.
        limits: What a reply must keep to before the defence looks at it. The default stops the malformed and absurd
            alone, of which a guard without a defence warns; `mithridate.guard.RECOMMENDED` bounds updates as well.
        module: Of the federation's architecture, for defences that look at the model; for this strategy alone, since
            its weights are overwritten. Parameters that do not require gradients must come back as they were sent.
        criterion: (logits, targets) -> mean loss, a scalar, for trusted samples.
        trusted: Samples that the server knows to be clean, for defences that declare them.
        report_path: A JSON-lines file that gains one line an event; None keeps events in `events` alone.
        weight_key: Name of the metric that holds a client's number of examples; unset: the inner strategy's own.
        loss_key: Name of the metric that holds a client's loss, if the inner strategy weights by it; unset: the
            inner strategy's own (`train_loss_key` of QFedAvg).

    Raises:
        ConfigError: The inner strategy exchanges no weights or brings its own `start`; or the defence needs something
            that is not given, or has nothing to do in a federation.
        DataError: The trusted samples are no batch.
    """

    def __init__(
        self,
        inner: Strategy,
        defence: Defence | None = None,
        *,
        limits: ReplyLimits | None = None,
        module: nn.Module | None = None,
        criterion: Criterion = F.cross_entropy,
        trusted: AnyBatch | None = None,
        report_path: Path | str | None = None,
        weight_key: str | None = None,
        loss_key: str | None = None,
    ) -> None:
        self.inner = inner
        self.defence = defence or Standard()
        self.limits = limits or ReplyLimits()
        self.module, self.criterion, self.trusted = module, criterion, trusted
        self.weight_key = weight_key or weighted_by(inner)
        self.loss_key = loss_key or loss_of(inner)
        check_inner(inner)
        _check_needs(self.defence, module, trusted)
        warning = "" if defence is not None or self.limits.bound_updates else UNLIMITED
        if warning:
            log.warning("guard: %s", warning)
        self._journal = Journal(None if report_path is None else path_of(report_path), self._settings(), warning)
        self._step: DefendedStep | None = None
        self._layout = Layout({}, ())
        self._state: State = {}
        self._round, self._phase = 0, "train"
        self._asked: dict[str, set[int]] = {}
        self._seen = Counter[str]()

    @property
    def events(self) -> list[Event]:
        """What happened, oldest first: the last ten thousand events."""
        return list(self._journal.events)

    def tallies(self) -> list[Tally]:
        """What was done so far: to whom, in which rounds and why; the gravest first."""
        return self._journal.tallies()

    def table(self, most: int = 50) -> Table:
        """The tallies as a table to print with rich: `Console().print(strategy.table())`.

        Args:
            most: How many rows it has at most; what is left out is counted under it.
        """
        return self._journal.table(most)

    def summary(self) -> None:
        """Log the defence and the limits, then the inner strategy's settings."""
        log.info("\t├──> Guard: %s", self._settings())
        self.inner.summary()

    def served_arrays(self, arrays: ArrayRecord) -> ArrayRecord:
        """The model that answers queries, for defences that serve another than the one that learns (`ema`).

        Flower knows of one model, which is the one that learns: it goes to clients, for training and for evaluation,
        and into `evaluate_fn` and the result. Ask here for what to measure or to deploy.

        Args:
            arrays: The global model after the last round, as Flower holds it; what the defence does not replace is
                taken from it.
        """
        served = None if self._step is None else self.defence.serve(self._step.view())
        if served is None:
            return arrays
        tensors = {**served.parameters, **served.buffers}
        return ArrayRecord({name: _like(tensors[name], a) if name in tensors else a for name, a in arrays.items()})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What the inner strategy sends; the guard notes the model and who was asked.

        Raises:
            ConfigError: (in the first round) arrays, limits, module and trusted samples do not fit each other.
        """
        self._state = _numpy(arrays)
        if self._step is None or server_round <= self._round or self._state.keys() != self._layout.born.keys():
            self._step = self._first_step()
        self._round = server_round
        messages = list(self.inner.configure_train(server_round, arrays, config, grid))
        self._asked["train"] = {message.metadata.dst_node_id for message in messages}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What inner strategy and defence make of the replies that are fit; no arrays if the old model stays.

        Raises:
            ConfigError: `configure_train` was never called.
        """
        if self._step is None:
            raise ConfigError(
                "GuardedStrategy: aggregate_train was called before configure_train, so there is no model to compare "
                "updates with; let `start` call them in turn."
            )
        self._round, self._phase, self._seen = server_round, "train", Counter()
        fit = self._fit_replies(replies)
        arrays, metrics, measures = self._learned(self._step, fit) if fit else (None, None, {})
        if arrays is None and self._asked.get("train") and not self._seen["vetoed"]:
            made = f"{type(self.inner).__name__} made no aggregate of {len(fit)} replies" if fit else "no reply was fit"
            self._note("skipped", reason=f"{made}; the old model stays")
        return arrays, self._closed(len(fit), metrics, measures)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What the inner strategy sends; the guard notes who was asked."""
        messages = list(self.inner.configure_evaluate(server_round, arrays, config, grid))
        self._asked["evaluate"] = {message.metadata.dst_node_id for message in messages}
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """What the inner strategy makes of the replies that are fit. They are the clients' own claims, and stay so."""
        self._round, self._phase, self._seen = server_round, "evaluate", Counter()
        fit = self._fit_replies(replies)
        self._cap(fit)
        if not fit and not self._asked.get("evaluate"):
            return self.inner.aggregate_evaluate(server_round, [])
        metrics = None
        if fit:
            metrics = self.inner.aggregate_evaluate(server_round, [r.passed_on() for r in fit])
        return self._closed(len(fit), metrics, {})

    def _settings(self) -> dict[str, Any]:
        return {
            "inner": type(self.inner).__name__,
            "defence": repr(self.defence),
            "limits": fields_of(self.limits),
        }

    def _first_step(self) -> DefendedStep:
        """A federation begins: where it starts is the checkpoint that defences may look back at."""
        self._layout = Layout.of(self._state, self.limits, self.module)
        module = self.module or BareWeights({name: self._state[name] for name in self._layout.trained})
        history = None
        if Need.HISTORY in self.defence.needs:
            history = History(keep=self.defence.lookback + 1 if self.defence.lookback else 0)
        device = next(module.parameters()).device
        step = DefendedStep(
            module,
            None,
            criterion=self.criterion,
            defence=self.defence,
            trusted=None if self.trusted is None else self.trusted.to(device),
            history=history,
        )
        _put(step, self._state)
        if step.trusted is not None:
            self._check_trusted(step, module)
        if history is not None:
            history.checkpoints[0] = Weights.of(module, "start of the federation").copied()
        return step

    def _check_trusted(self, step: DefendedStep, module: nn.Module) -> None:
        """Refuse a module that cannot judge the federation's model on the trusted samples."""
        own = [name for name, _ in module.named_buffers() if is_statistic(name) and name not in self._state]
        if own:
            raise ConfigError(
                f"GuardedStrategy: the module's '{own[0]}' is not among the model's arrays, so that trusted samples "
                "would be judged by statistics that no round fills; let clients exchange it, or leave `trusted` out."
            )
        try:
            quality(step.white_box, cast("AnyBatch", step.trusted))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ConfigError(
                f"GuardedStrategy: the module cannot be judged on the trusted samples ({error}); give samples and "
                "labels as the federation's model takes them."
            ) from error

    def _fit_replies(self, replies: Iterable[Message]) -> list[Reply]:
        """The replies that can be aggregated, together too; the others are noted."""
        asked = self._asked.get(self._phase, set())
        heard: set[int] = set()
        fit: list[Reply] = []
        for message in replies:
            node = message.metadata.src_node_id
            reason = "" if node in asked else "it was not asked in this round"
            if node in heard:
                reason = "a second reply in this round"
            if not reason:
                heard.add(node)
                try:
                    fit.append(self._checked(message))
                except RefusedError as refusal:
                    reason = str(refusal)
            if reason:
                self._note("refused", node, reason)
        for node in sorted(asked - heard):
            self._note("missing", node, "no reply")
        return self._alike(fit)

    def _alike(self, fit: list[Reply]) -> list[Reply]:
        """The replies that can be averaged with each other; more than half decide what is usual, or nobody does."""
        most = len(fit) / 2
        usual = {signature for signature, times in Counter(r.signature for r in fit).items() if times > most}
        alike = [reply for reply in fit if reply.signature in usual]
        if not usual:
            shared = {metric for metric, times in Counter(m for r in fit for m in r.sized).items() if times > most}
            alike = [reply for reply in fit if shared <= set(reply.sized)]
            for reply in alike:
                reply.shared = shared
        for reply in fit:
            if reply not in alike:
                reason = "its records or metrics are named or sized unlike those of most clients"
                self._note("refused", reply.node, reason)
        return alike

    def _checked(self, message: Message) -> Reply:
        """One reply, if it keeps to the limits."""
        if self._phase != "train":
            return opened(message, self.weight_key, None)
        reply = opened(message, self.weight_key, self._state, self.loss_key)
        fault = self._layout.fault(reply.arrays, self._state)
        for names, what in ((self._layout.trained, "update"), (self._layout.statistics, "statistics")):
            fault = fault or excess(difference(reply.arrays, self._state, names), self.limits.max_update_norm, what)
        if fault:
            raise RefusedError(fault)
        return reply

    def _learned(
        self, step: DefendedStep, fit: list[Reply]
    ) -> tuple[ArrayRecord | None, MetricRecord | None, dict[str, float]]:
        """A defended step on replies: the new global arrays, if the step stays."""
        before = remembered(self.inner)
        arrays, metrics = None, None
        reason = ""
        measures: dict[str, float] = {}
        _put(step, self._state)
        with step.taking():
            self._bound(step, fit)
            self._cap(fit)
            try:
                arrays, metrics = self.inner.aggregate_train(self._round, [r.passed_on() for r in fit])
            except (AggregationError, InconsistentMessageReplies) as error:
                if not self._seen["refused"] + self._seen["missing"]:
                    raise  # every client was heard: the fault is not with what the guard left over
                reason = f"{type(self.inner).__name__} could not aggregate what was left: {error}"
            if arrays is not None:
                reason, measures = self._taken(step, arrays)
        if reason:
            self._note("vetoed", reason=reason, measures=measures)
            put_back(self.inner, before)
            arrays = None
        return arrays, metrics, measures

    def _bound(self, step: DefendedStep, fit: list[Reply]) -> None:
        """Let the defence bound the clients' updates, and the limits what no defence is shown."""
        for names, what, clip_norm in (
            (self._layout.trained, "update", math.inf),
            (self._layout.statistics, "statistics", self.limits.statistics_clip_norm),
        ):
            self._shorten(fit, names, what, clip_norm)
        trained, shapes = self._layout.trained, {n: torch.Size(self._state[n].shape) for n in self._layout.trained}
        dtype = next(step.model.parameters()).dtype
        for some in (fit[start : start + AT_ONCE] for start in range(0, len(fit), AT_ONCE)):
            rows = np.stack([-reply.change(self._state, trained) for reply in some])
            updates = Updates(torch.from_numpy(rows).to(step.device, dtype), shapes)
            bounded = step.bound_updates(updates)
            if bounded is updates:
                continue
            lengths = torch.stack([updates.lengths(), bounded.lengths()], 1).tolist()
            for i, (reply, (was, now)) in enumerate(zip(some, lengths, strict=True)):
                if not torch.equal(bounded.rows[i], updates.rows[i]):
                    row = bounded.rows[i].detach().cpu().double().numpy()
                    reply.new_arrays |= moved(self._state, -row, reply.arrays, trained)
                    self._note("bounded", reply.node, f"update of l2 length {was:.4g}, bounded to {now:.4g}")
        for reply in fit:
            self._hold_frozen(reply)

    def _shorten(self, fit: list[Reply], names: tuple[str, ...], what: str, clip_norm: float) -> None:
        """Scale down the changes of these arrays that are longer than the limits allow."""
        if math.isinf(clip_norm) and math.isinf(self.limits.max_norm_ratio):
            return
        lengths = [float(np.linalg.norm(reply.change(self._state, names))) for reply in fit]
        bound = min(clip_norm, self.limits.longest(lengths))
        for reply, length in zip(fit, lengths, strict=True):
            if length > bound:
                change = reply.change(self._state, names) * (bound / length)
                reply.new_arrays |= moved(self._state, change, reply.arrays, names)
                self._note("bounded", reply.node, f"{what} of l2 length {length:.4g}, bounded to {bound:.4g}")

    def _hold_frozen(self, reply: Reply) -> None:
        for name in self._layout.frozen:
            received = reply.arrays[name]
            sent = self._state[name].astype(received.dtype)
            if not np.array_equal(received, sent):
                reply.new_arrays[name] = sent
                self._note("bounded", reply.node, f"it moved '{name}', which is frozen; put back")

    def _cap(self, fit: list[Reply]) -> None:
        """Let no client claim a weight that the caps do not allow."""
        for reply, allowed in zip(fit, self.limits.capped([r.count for r in fit]), strict=True):
            if allowed != reply.count:
                reply.new_metrics[self.weight_key] = allowed
                reason = f"claims {str(reply.count)[:20]} examples, counts for {allowed:g}"
                self._note("capped", reply.node, reason)
        if self._phase != "train" or self.loss_key is None:
            return
        losses = [float(cast("float", reply.metrics[self.loss_key])) for reply in fit]  # `opened` let no other pass
        for reply, loss, allowed in zip(fit, losses, self.limits.bounded_losses(losses), strict=True):
            if allowed != loss:
                reply.new_metrics[self.loss_key] = allowed
                self._note("capped", reply.node, f"claims a loss of {loss:.4g}, counts for {allowed:.4g}")

    def _taken(self, step: DefendedStep, arrays: ArrayRecord) -> tuple[str, dict[str, float]]:
        """Take the aggregate into the model, if the defence lets it stay: why it does not, and what was measured.

        Args:
            step: The one that is being taken.
            arrays: The aggregate; a shortened step is written into it, so that an inner strategy that goes on from this
                record (FedAvgM) goes on from what was kept.
        """
        state = _numpy(arrays)
        for name, array in state.items():
            if array.dtype.kind in "fc" and not np.isfinite(array).all():
                return f"the aggregate's array '{name}' is not finite", {}
        _put(step, state)
        measures = {}
        if step.trusted is not None:
            loss, worst = quality(step.white_box, step.trusted)
            measures = {"loss": loss, "worst-accuracy": worst}
        verdict, _ = step.advance()
        if not verdict.admit:
            return verdict.reason or "the defence refused the step", measures
        if verdict.parameters is not None:
            for name in [name for name in arrays if name in verdict.parameters]:
                arrays[name] = _like(verdict.parameters[name], arrays[name])
            self._note("bounded", reason=verdict.reason or "the defence shortened the step of the aggregate")
        return "", measures

    def _closed(self, accepted: int, metrics: MetricRecord | None, measures: Mapping[str, float]) -> MetricRecord:
        """Note the summary of a phase, and give the round's metrics the counts."""
        counts = {"accepted": accepted, **{kind: self._seen[kind] for kind in KINDS}}
        self._journal.note(Event(self._round, self._phase, "closed", counts=counts, measures=measures))
        out: dict[str, Any] = {} if metrics is None else dict(metrics)
        out |= {f"guard-{name}": number for name, number in {**counts, **measures}.items()}
        return MetricRecord(out)

    def _note(
        self, event: str, node: int | None = None, reason: str = "", measures: Mapping[str, float] | None = None
    ) -> None:
        self._seen[event] += 1
        self._journal.note(Event(self._round, self._phase, event, node, reason, measures=measures or {}))


def _numpy(arrays: ArrayRecord) -> dict[str, NDArray[Any]]:
    return {name: array.numpy() for name, array in arrays.items()}


def _like(tensor: Tensor, array: Array) -> Array:
    """A tensor as an array of the type that another has."""
    return Array(tensor.detach().cpu().numpy().astype(array.dtype))


def _put(step: DefendedStep, state: State) -> None:
    """Fill the model with arrays; what these leave out stays as it is."""

    def filled(now: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: torch.from_numpy(np.array(state[n])).to(t) if n in state else t for n, t in now.items()}

    step.put_parameters(filled(dict(step.model.named_parameters())))
    step.put_buffers(filled(dict(step.model.named_buffers())))


def _check_needs(defence: Defence, module: nn.Module | None, trusted: AnyBatch | None) -> None:
    defence.check_federation(FlowerRounds(), 1)
    given = {Need.MODEL: module, Need.HISTORY: module, Need.TRUSTED: trusted}
    for need in sorted(defence.needs):
        if given.get(need) is None:
            raise ConfigError(
                f"GuardedStrategy: {type(defence).__name__} needs the {need}; give `module`, one of the federation's "
                "architecture, and `trusted`, samples that the server knows to be clean, or take a defence that looks "
                "at updates alone (clip)."
            )
    if trusted is not None:
        check_batch(trusted, where="trusted samples")
        if module is None:
            raise ConfigError(
                "GuardedStrategy: `trusted` can only be looked at through a model; give `module`, too, or leave both."
            )
