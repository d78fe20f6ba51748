"""Flower, the server's side: a strategy that guards any other.

Needs the extra `flower` (flwr >= 1.41, < 2). The maths is in `guard.federation`; this file only carries records to it
and back. The attacker's side is `guard.flower_attack`.
"""

import copy
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies
from flwr.serverapp.strategy import FedXgbBagging, FedXgbCyclic, Strategy
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from mithridate.core.errors import ConfigError
from mithridate.core.registry import fields_of
from mithridate.guard.federation import (
    Guard,
    Lengths,
    Measure,
    State,
    Trusted,
    best_of,
    born_types,
    capped_counts,
    clipped,
    find_count_fault,
    find_excess,
    find_fault,
    find_overlength,
    judge,
    lengths_of,
)

log = logging.getLogger("flwr.mithridate")
"""A child of Flower's own logger, so that what was refused stands beside what Flower reports."""

NPY_HEADER = 4096
"""Bytes that a serialised array may be longer than its numbers."""

WIDEST = 16
"""Bytes of the widest number."""

LARGEST = 1e300
"""A metric beyond this would overflow in an average."""

KINDS = ("vetoed", "skipped", "refused", "missing", "flagged", "clipped", "capped")
"""What the guard does, the gravest first."""


@dataclass(frozen=True)
class Event:
    """One thing that the guard did.

    Args:
        round: Server round, from 1.
        phase: `train` or `evaluate`.
        event: `refused`, `missing` (no reply at all), `flagged` (above the limit of discrepancy), `clipped`, `capped`,
            `vetoed`, `skipped` (no aggregate was made, so the old model stays), or `closed`, the summary of the phase.
        node: Flower's id of the client; None where the event is about the whole round.
        reason: Why.
        counts: How many of each, in a summary.
        measures: What the gate measured, if it did: loss and accuracy of the aggregate.
    """

    round: int
    phase: str
    event: str
    node: int | None = None
    reason: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    measures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Tally:
    """How often the guard did one thing to one client for one reason.

    Args:
        node: Flower's id of the client; None: whole rounds.
        event: As in `Event`.
        phase: `train` or `evaluate`.
        times: How often; more than rounds if a client was refused several times in one.
        rounds: When, in order.
        reason: Why; where the reasons differ in their figures alone, that of the first time.
    """

    node: int | None
    event: str
    phase: str
    times: int
    rounds: tuple[int, ...]
    reason: str


@dataclass
class _Reply:
    """A reply that is fit to be aggregated, and what of it was replaced (None: it goes on as it came)."""

    message: Message
    node: int
    arrays_key: str
    metrics_key: str
    arrays: dict[str, NDArray[Any]]
    count: float
    lengths: Lengths = field(default_factory=Lengths)
    new_arrays: dict[str, NDArray[Any]] | None = None
    new_count: float | None = None

    @property
    def signature(self) -> tuple[object, ...]:
        """What Flower's strategies want to be the same in all replies: names of records, names and sizes of metrics."""
        metrics = self.message.content.metric_records[self.metrics_key]
        sizes = {(name, len(value) if isinstance(value, list) else None) for name, value in metrics.items()}
        return self.arrays_key, self.metrics_key, frozenset(sizes)

    def cleaned(self, weight_key: str) -> Message:
        """The message to pass on: the very one that came, or a copy with other content."""
        if self.new_arrays is None and self.new_count is None:
            return self.message
        content = RecordDict(dict(self.message.content))
        if self.new_arrays is not None:
            content[self.arrays_key] = ArrayRecord({k: Array(np.asarray(v)) for k, v in self.new_arrays.items()})
        if self.new_count is not None:
            metrics = dict(self.message.content.metric_records[self.metrics_key])
            content[self.metrics_key] = MetricRecord({**metrics, weight_key: self.new_count})
        made = copy.copy(self.message)
        made.content = content
        return made


class _RefusedError(Exception):
    """A reply is not passed on; the text says why."""


class GuardedStrategy(Strategy):
    """Any Flower strategy, behind a guard: it only ever sees replies that are fit to be aggregated.

    Refused, counted and named are: errors; replies of nodes that were not asked, or a second one of the same node; no
    arrays or metrics, or more than one record of either; arrays that are missing, unknown, unreadable, of another shape
    or a type that cannot hold the model's, NaN or infinite, negative where BatchNorm keeps variances, or absurdly far
    from the model; metrics that are not finite; a number of examples that is missing, not a number or not above 0; and
    records that are named or sized unlike those of most clients, since one such reply would stop Flower's strategies.
    What is left is capped, clipped and, if the guard says so, judged by discrepancy; the inner strategy aggregates it;
    the gate then measures the aggregate. A vetoed round returns no arrays, upon which Flower keeps the old model; the
    inner strategy's own state (momentum, second moments, current arrays) goes back to what it was before the round. The
    old model also stays if no reply is fit, or too few for the inner strategy.

    With `Guard()` and replies that are in order, the inner strategy gets the very messages that came. The round's
    metrics gain `guard-accepted`, `-refused`, `-missing`, `-flagged`, `-clipped`, `-capped`, `-vetoed` and `-skipped`,
    and `guard-loss` and `guard-accuracy` of the aggregate where the gate is on. At the end, `tallies` and `table` say
    who was refused, how often and why.

    Not for strategies whose arrays are no weights (FedXgbBagging, FedXgbCyclic), nor under secure aggregation, which
    hides single updates. Nodes are told apart by the id that the SuperLink gives them: who may join is its affair.

    Args:
        inner: The strategy that samples clients and aggregates.
        guard: The limits.
        trusted: Samples that the server knows to be clean; needed by the gate and by discrepancy.
        report_path: A JSON-lines file that gains one line an event; None keeps events in `events` alone.
        weight_key: Name of the metric that holds a client's number of examples; unset: the inner strategy's own.

    Raises:
        ConfigError: The inner strategy exchanges no weights or brings its own `start`; or limits are set that need
            trusted samples, and none are given.
    """

    def __init__(
        self,
        inner: Strategy,
        guard: Guard | None = None,
        *,
        trusted: Trusted | None = None,
        report_path: Path | str | None = None,
        weight_key: str | None = None,
    ) -> None:
        self.inner = inner
        self.guard = guard or Guard()
        self.trusted = trusted
        self.report_path = None if report_path is None else Path(report_path)
        self.weight_key = weight_key or _weight_key(inner)
        self.events: list[Event] = []
        """Everything that happened, oldest first."""
        _check_inner(inner)
        if self.guard.needs_trusted and trusted is None:
            raise ConfigError(
                "GuardedStrategy: max_loss_rise, max_accuracy_drop and max_discrepancy need trusted samples; give "
                "`trusted` (see mithridate.guard.federation.trusted_module), or leave these limits off."
            )
        self._past: list[dict[str, NDArray[Any]]] = []
        self._born: dict[str, np.dtype[Any]] = {}
        self._reference: Measure | None = None
        self._round = 0
        self._asked: dict[str, set[int]] = {}
        if self.report_path is not None:
            self.report_path.parent.mkdir(parents=True, exist_ok=True)
            self._write({"event": "opened", "inner": type(inner).__name__, "guard": _plain(fields_of(self.guard))})

    def summary(self) -> None:
        """Log the guard's settings, then the inner strategy's."""
        log.info("\t├──> Guard: %s", _plain(fields_of(self.guard)))
        self.inner.summary()

    def tallies(self) -> list[Tally]:
        """What the guard did so far: to whom, in which rounds and why; the gravest first."""
        found: dict[tuple[Any, ...], list[Event]] = {}
        for event in self.events:
            if event.event in KINDS:
                kind = re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", event.reason)
                found.setdefault((KINDS.index(event.event), event.node or 0, event.phase, kind), []).append(event)
        return [
            Tally(e[0].node, e[0].event, e[0].phase, len(e), tuple(dict.fromkeys(x.round for x in e)), e[0].reason)
            for _, e in sorted(found.items(), key=lambda item: item[0][:2])
        ]

    def table(self, most: int = 50) -> Table:
        """The tallies as a table to print with rich: `Console().print(strategy.table())`.

        Args:
            most: How many rows it has at most; what is left out is counted under it.
        """
        closed = sum(event.event == "closed" and event.phase == "train" for event in self.events)
        times = Counter(event.event for event in self.events)
        counts = ", ".join(f"{times[kind]} {kind}" for kind in KINDS if times[kind])
        tallies = self.tallies()
        rest = len(tallies) - most
        table = Table(
            title=f"The guard in {closed} rounds: {counts or 'nothing to object to'}",
            caption=f"and {rest} more rows" if rest > 0 else None,
            min_width=60,
        )
        for column in ("node", "what", "times", "rounds", "why"):
            table.add_column(column, justify="right" if column == "times" else "left", overflow="fold")
        for tally in tallies[:most]:
            what = tally.event if tally.phase == "train" else f"{tally.event} ({tally.phase})"
            who = "all" if tally.node is None else str(tally.node)
            row = (who, what, str(tally.times), _spans(tally.rounds), tally.reason)
            table.add_row(*(Text(cell) for cell in row))  # as text: a client's words are no markup
        return table

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What the inner strategy sends; the guard notes the model and who was asked."""
        state = {name: array.numpy() for name, array in arrays.items()}
        if server_round <= self._round or not self._born or state.keys() != self._born.keys():
            self._born = born_types(state, self.guard)
            self._past, self._reference = [], None
        self._round = server_round
        self._past.append(state)
        kept = self.guard.back if self.guard.looks_back and self.guard.old == "back" else 0
        del self._past[1 : len(self._past) - 1 - kept]  # the first, and as many before the last as are looked back at
        if self.guard.gated and self.trusted is not None:
            now = self.trusted.measure(state)
            if self._reference is None or self.guard.reference == "previous":
                self._reference = now
            elif self.guard.reference == "best":
                self._reference = best_of(self._reference, now)
        messages = list(self.inner.configure_train(server_round, arrays, config, grid))
        self._asked["train"] = {message.metadata.dst_node_id for message in messages}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the inner strategy makes of the replies that are fit; no arrays if none are, or if the gate says no.

        Raises:
            ConfigError: `configure_train` was never called.
        """
        if not self._past:
            raise ConfigError(
                "GuardedStrategy: aggregate_train was called before configure_train, so there is no model to compare "
                "updates with; let `start` call them in turn."
            )
        first = len(self.events)
        fit = self._fit_replies(server_round, "train", replies)
        fit = self._unflagged(server_round, fit)
        self._cap(server_round, "train", fit)
        arrays: ArrayRecord | None = None
        metrics: MetricRecord | None = None
        measures: dict[str, float] = {}
        if fit:
            before = _kept(self.inner)
            reason = ""
            try:
                arrays, metrics = self.inner.aggregate_train(server_round, [r.cleaned(self.weight_key) for r in fit])
            except (AggregationError, InconsistentMessageReplies) as error:
                if not any(e.event in {"refused", "missing"} for e in self.events[first:]):
                    raise  # every client was heard: the fault is not with what the guard left over
                reason = f"{type(self.inner).__name__} could not aggregate what was left: {error}"
            if arrays is not None:
                reason, measures = self._weigh(arrays)
            if reason:
                self._note(Event(server_round, "train", "vetoed", reason=reason, measures=measures))
                _put_back(self.inner, before)
                arrays = None
        if arrays is None and self._asked.get("train") and not any(e.event == "vetoed" for e in self.events[first:]):
            made = f"{type(self.inner).__name__} made no aggregate of {len(fit)} replies" if fit else "no reply was fit"
            self._note(Event(server_round, "train", "skipped", reason=f"{made}; the old model stays"))
        return arrays, self._closed(server_round, "train", len(fit), first, metrics, measures)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What the inner strategy sends; the guard notes who was asked."""
        messages = list(self.inner.configure_evaluate(server_round, arrays, config, grid))
        self._asked["evaluate"] = {message.metadata.dst_node_id for message in messages}
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """What the inner strategy makes of the replies that are fit. They are the clients' own claims, and stay so."""
        first = len(self.events)
        fit = self._fit_replies(server_round, "evaluate", replies)
        self._cap(server_round, "evaluate", fit)
        if not fit and not self._asked.get("evaluate"):
            return self.inner.aggregate_evaluate(server_round, [])
        metrics = None
        if fit:
            metrics = self.inner.aggregate_evaluate(server_round, [r.cleaned(self.weight_key) for r in fit])
        return self._closed(server_round, "evaluate", len(fit), first, metrics, {})

    def _fit_replies(self, server_round: int, phase: str, replies: Iterable[Message]) -> list[_Reply]:
        """The replies that can be aggregated, together too; the others are noted."""
        asked = self._asked.get(phase, set())
        heard: set[int] = set()
        fit: list[_Reply] = []
        for message in replies:
            node = message.metadata.src_node_id
            reason = "" if node in asked else "it was not asked in this round"
            if node in heard:
                reason = "a second reply in this round"
            if not reason:
                heard.add(node)
                try:
                    fit.append(self._read(message, node, phase))
                except _RefusedError as refusal:
                    reason = str(refusal)
            if reason:
                self._note(Event(server_round, phase, "refused", node, reason))
        for node in sorted(asked - heard):
            self._note(Event(server_round, phase, "missing", node, "no reply"))
        if not fit:
            return fit
        usual = Counter(reply.signature for reply in fit).most_common(1)[0][0]
        for reply in fit:
            if reply.signature != usual:
                reason = "its records or metrics are named or sized unlike those of most clients"
                self._note(Event(server_round, phase, "refused", reply.node, reason))
        return [reply for reply in fit if reply.signature == usual]

    def _read(self, message: Message, node: int, phase: str) -> _Reply:
        """One reply, opened and looked at by itself."""
        if message.has_error():
            words = str(message.error.reason)[:500]  # a stranger's: no line breaks and no codes for the terminal
            raise _RefusedError(f"error: {''.join(c if c.isprintable() else ' ' for c in words)}")
        if not message.has_content():
            raise _RefusedError("the reply is empty")
        arrays, metrics = message.content.array_records, message.content.metric_records
        if phase == "train" and len(arrays) != 1:
            raise _RefusedError(f"{len(arrays)} records of arrays, not one")
        if len(metrics) != 1:
            raise _RefusedError(f"{len(metrics)} records of metrics, not one")
        (metrics_key, record), *_ = metrics.items()
        if self.weight_key not in record:
            raise _RefusedError(f"no metric '{self.weight_key}'")
        count = record[self.weight_key]
        fault = find_count_fault(count) or _find_metric_fault(record)
        if fault or isinstance(count, list):
            raise _RefusedError(fault)
        if phase != "train":
            return _Reply(message, node, "", metrics_key, {}, count)
        (arrays_key, sent), *_ = arrays.items()
        model = self._past[-1]
        received = _opened(sent, model)
        fault = find_fault(received, model, self._born)
        if fault:
            raise _RefusedError(fault)
        lengths = lengths_of(received, model, self._born, self.guard)
        excess = find_excess(lengths, self.guard)
        if excess:
            raise _RefusedError(excess)
        reply = _Reply(message, node, arrays_key, metrics_key, received, count, lengths)
        if list(sent) != list(model):  # several strategies go by position: another order would mix arrays up
            reply.new_arrays = {name: received[name] for name in model}
        return reply

    def _unflagged(self, server_round: int, fit: list[_Reply]) -> list[_Reply]:
        """Clip what is too long; with discrepancy on, only (or refuse) what is flagged."""
        guard, model, kept = self.guard, self._past[-1], []
        for reply in fit:
            if guard.looks_back and self.trusted is not None:
                old = self._past[0] if guard.old == "start" else self._past[max(0, len(self._past) - 1 - guard.back)]
                found = self.trusted.discrepancy(old, reply.arrays, guard.divergence)
                limit = guard.discrepancy_limit(server_round)
                if found <= limit:  # NaN is not
                    kept.append(reply)
                    continue
                reason = f"discrepancy {found:.4g}, limit {limit:.4g}"
                self._note(Event(server_round, "train", "flagged", reply.node, reason))
                if guard.flagged == "refuse":
                    self._note(Event(server_round, "train", "refused", reply.node, reason))
                    continue
            overlength = find_overlength(reply.lengths, guard)
            if overlength:
                reply.new_arrays = clipped(reply.arrays, model, self._born, guard)
                self._note(Event(server_round, "train", "clipped", reply.node, overlength))
            kept.append(reply)
        return kept

    def _cap(self, server_round: int, phase: str, fit: list[_Reply]) -> None:
        """Let no client claim a weight that the caps do not allow."""
        for reply, allowed in zip(fit, capped_counts([r.count for r in fit], self.guard), strict=True):
            if allowed != reply.count:
                reply.new_count = allowed
                reason = f"claims {str(reply.count)[:20]} examples, counts for {allowed:g}"
                self._note(Event(server_round, phase, "capped", reply.node, reason))

    def _weigh(self, arrays: ArrayRecord) -> tuple[str, dict[str, float]]:
        """Why the aggregate must not be served, or nothing; and what was measured."""
        state = {name: array.numpy() for name, array in arrays.items()}
        bad = [name for name, array in state.items() if array.dtype.kind in "fc" and not np.isfinite(array).all()]
        if bad:
            return f"the aggregate's array '{bad[0]}' is not finite", {}
        if not self.guard.gated or self.trusted is None or self._reference is None:
            return "", {}
        measure = self.trusted.measure(state)
        return judge(self._reference, measure, self.guard).reason, dict(measure._asdict())

    def _closed(
        self,
        server_round: int,
        phase: str,
        accepted: int,
        first: int,
        metrics: MetricRecord | None,
        measures: Mapping[str, float],
    ) -> MetricRecord:
        """Note the summary of a phase, and give the round's metrics the counts."""
        seen = Counter(event.event for event in self.events[first:])
        counts = {"accepted": accepted, **{kind: seen[kind] for kind in KINDS}}
        self._note(Event(server_round, phase, "closed", counts=counts, measures=measures))
        out: dict[str, Any] = {} if metrics is None else dict(metrics)
        out |= {f"guard-{name}": number for name, number in counts.items()}
        out |= {f"guard-{name}": number for name, number in measures.items()}
        return MetricRecord(out)

    def _note(self, event: Event) -> None:
        self.events.append(event)
        if event.event in {"refused", "vetoed", "skipped"}:
            who = "the round" if event.node is None else f"node {event.node}"
            log.warning("guard: %s %s: %s", event.event, who, event.reason)
        if self.report_path is not None:
            self._write({key: _plain(v) for key, v in asdict(event).items() if v not in (None, "", {})})

    def _write(self, entry: Mapping[str, Any]) -> None:
        """Append one line in one write, so that a killed server leaves whole lines."""
        if self.report_path is None:
            return
        handle = os.open(self.report_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, (json.dumps(entry) + "\n").encode())
        finally:
            os.close(handle)


def _weight_key(inner: Strategy) -> str:
    """The metric that the inner strategy, or the one that it wraps in turn, weights by."""
    own = getattr(inner, "weighted_by_key", None)
    if own is not None:
        return str(own)
    wrapped = getattr(inner, "strategy", None)
    return _weight_key(wrapped) if isinstance(wrapped, Strategy) else "num-examples"


def _check_inner(inner: Strategy) -> None:
    name = type(inner).__name__
    if isinstance(inner, FedXgbBagging | FedXgbCyclic):
        raise ConfigError(f"GuardedStrategy: {name} exchanges trees, not weights, and no update can be measured.")
    if type(inner).start is not Strategy.start:
        raise ConfigError(
            f"GuardedStrategy: {name} has its own `start`, which would go past the guard; move what it adds into "
            "`evaluate_fn`, or into a subclass of GuardedStrategy."
        )


def _find_metric_fault(record: MetricRecord) -> str:
    """The first metric that no average survives; empty if there is none."""
    for name, value in record.items():
        for number in value if isinstance(value, list) else [value]:
            if not abs(number) <= LARGEST:  # NaN compares false, and a long integer need not be made a float
                return f"metric {name[:80]!r} is {str(number)[:20]}"
    return ""


def _opened(sent: ArrayRecord, model: State) -> dict[str, NDArray[Any]]:
    """The arrays of a reply; those that the model does not have are left closed."""
    received: dict[str, NDArray[Any]] = {}
    for name, array in sent.items():
        if name not in model:
            received[name] = np.empty(0)
            continue
        if len(array.data) > model[name].size * WIDEST + NPY_HEADER:
            raise _RefusedError(f"array '{name}' takes {len(array.data)} bytes, for {model[name].size} numbers")
        try:
            opened = array.numpy()
        except Exception as error:  # the bytes are a stranger's: whatever is wrong with them, it is no array
            raise _RefusedError(f"array '{name}' is unreadable ({type(error).__name__})") from error
        if not isinstance(opened, np.ndarray):
            raise _RefusedError(f"array '{name}' is no single array")
        received[name] = opened
    return received


def _kept(value: Any) -> Any:  # noqa: ANN401  (a strategy holds anything)
    """A strategy's state, to be put back: numbers, arrays, records and containers of them; other objects are shared."""
    if isinstance(value, Strategy):
        return {name: _kept(v) for name, v in vars(value).items()}
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, ArrayRecord):
        return ArrayRecord(dict(value))
    if type(value) in (list, tuple):
        return type(value)(_kept(v) for v in value)
    if type(value) is dict:
        return {key: _kept(v) for key, v in value.items()}
    return value


def _put_back(strategy: Strategy, state: Mapping[str, Any]) -> None:
    """Undo what a vetoed round did to a strategy, and to one that it wraps."""
    for name in vars(strategy).keys() - state.keys():
        delattr(strategy, name)
    for name, value in state.items():
        held = vars(strategy).get(name)
        if isinstance(held, Strategy):
            _put_back(held, value)
        else:
            setattr(strategy, name, value)


def _spans(rounds: Sequence[int]) -> str:
    """Rounds in short: 1-3, 5."""
    spans: list[list[int]] = []
    for number in rounds:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _plain(value: Any) -> Any:  # noqa: ANN401  (JSON has no better type)
    """JSON knows no infinity and no NaN: they become text."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
