"""Flower, the server's side: any strategy behind the defences of this library.

Needs the extra `flower` (flwr >= 1.41, < 2). A round is one defended step (`training.step`); this file carries records
to it and back. The attacker's side is `guard.flower_attack`.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies
from flwr.serverapp.strategy import Strategy
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from mithridate.core.batch import AnyBatch
from mithridate.core.defence import Defence
from mithridate.core.errors import ConfigError
from mithridate.core.files import path_of
from mithridate.core.registry import fields_of
from mithridate.core.targets import Criterion
from mithridate.defences.none import Standard
from mithridate.guard.events import Event, Journal, Tally, log
from mithridate.guard.flower_bounds import bound_updates, cap_examples, cap_losses
from mithridate.guard.flower_inner import check_inner, loss_of, put_back, remembered, weighted_by
from mithridate.guard.flower_model import array_like, check_needs, first_step, opened_arrays, put, take
from mithridate.guard.flower_replies import Reply, opened
from mithridate.guard.flower_screening import fit_replies, within_limits
from mithridate.guard.limits import Layout, ReplyLimits, State
from mithridate.guard.phase import Phase
from mithridate.training.step import DefendedStep

UNLIMITED = (
    "there is no defence, and no limit on updates: one hostile client decides what the model becomes. Give "
    "`limits=mithridate.guard.RECOMMENDED`, or a defence such as Clip(clip_norm=...)."
)


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
        ConfigError: The inner strategy exchanges no weights or brings its own `start`; the defence needs something that
            is not given, or has nothing to do in a federation; or `report_path` cannot be written.
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
        check_needs(self.defence, module, trusted)
        warning = "" if defence is not None or self.limits.bound_updates else UNLIMITED
        if warning:
            log.warning("guard: %s", warning)
        self._journal = Journal(None if report_path is None else path_of(report_path), self._settings(), warning)
        self._step: DefendedStep | None = None
        self._layout = Layout({}, ())
        self._state: State = {}
        self._round = 0
        self._asked: dict[str, set[int]] = {"train": set(), "evaluate": set()}

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
        return ArrayRecord({name: array_like(tensors[name], a) if name in tensors else a for name, a in arrays.items()})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What the inner strategy sends; the guard notes the model and who was asked.

        Raises:
            ConfigError: (in the first round) arrays, limits, module and trusted samples do not fit each other.
        """
        self._state = opened_arrays(arrays)
        if self._step is None or server_round <= self._round or self._state.keys() != self._layout.born.keys():
            self._layout = Layout.of(self._state, self.limits, self.module)
            self._step = first_step(
                self._state,
                self._layout,
                defence=self.defence,
                module=self.module,
                criterion=self.criterion,
                trusted=self.trusted,
            )
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
        phase = Phase(self._journal, server_round, "train")
        opening = partial(
            within_limits,
            weight_key=self.weight_key,
            loss_key=self.loss_key,
            layout=self._layout,
            model=self._state,
            limits=self.limits,
        )
        fit = fit_replies(replies, self._asked["train"], phase, opening)
        arrays, metrics, measures = self._learned(self._step, fit, phase) if fit else (None, None, {})
        if arrays is None and self._asked["train"] and not phase.counts["vetoed"]:
            made = f"{type(self.inner).__name__} made no aggregate of {len(fit)} replies" if fit else "no reply was fit"
            phase.note("skipped", reason=f"{made}; the old model stays")
        return arrays, _with_counts(metrics, phase.close(len(fit), measures))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What the inner strategy sends; the guard notes who was asked."""
        messages = list(self.inner.configure_evaluate(server_round, arrays, config, grid))
        self._asked["evaluate"] = {message.metadata.dst_node_id for message in messages}
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """What the inner strategy makes of the replies that are fit. They are the clients' own claims, and stay so."""
        phase = Phase(self._journal, server_round, "evaluate")
        opening = partial(opened, weight_key=self.weight_key, model=None)
        fit = fit_replies(replies, self._asked["evaluate"], phase, opening)
        cap_examples(fit, self.weight_key, self.limits, phase)
        if not fit and not self._asked["evaluate"]:
            return self.inner.aggregate_evaluate(server_round, [])
        metrics = self.inner.aggregate_evaluate(server_round, [r.passed_on() for r in fit]) if fit else None
        return _with_counts(metrics, phase.close(len(fit), {}))

    def _settings(self) -> dict[str, Any]:
        return {
            "inner": type(self.inner).__name__,
            "defence": repr(self.defence),
            "limits": fields_of(self.limits),
        }

    def _learned(
        self, step: DefendedStep, fit: list[Reply], phase: Phase
    ) -> tuple[ArrayRecord | None, MetricRecord | None, dict[str, float]]:
        """A defended step on replies: the new global arrays, if the step stays."""
        before = remembered(self.inner)
        arrays, metrics = None, None
        reason = ""
        measures: dict[str, float] = {}
        put(step, self._state)
        with step.taking():
            bound_updates(step, fit, layout=self._layout, model=self._state, limits=self.limits, phase=phase)
            cap_examples(fit, self.weight_key, self.limits, phase)
            if self.loss_key is not None:
                cap_losses(fit, self.loss_key, self.limits, phase)
            try:
                arrays, metrics = self.inner.aggregate_train(phase.server_round, [r.passed_on() for r in fit])
            except (AggregationError, InconsistentMessageReplies) as error:
                if not phase.counts["refused"] + phase.counts["missing"]:
                    raise  # every client was heard: the fault is not with what the guard left over
                reason = f"{type(self.inner).__name__} could not aggregate what was left: {error}"
            if arrays is not None:
                reason, measures = take(step, arrays, phase)
        if reason:
            phase.note("vetoed", reason=reason, measures=measures)
            put_back(self.inner, before)
            arrays = None
        return arrays, metrics, measures


def _with_counts(metrics: MetricRecord | None, counts: dict[str, float]) -> MetricRecord:
    """A round's metrics, and what the guard did in it."""
    out: dict[str, Any] = {} if metrics is None else dict(metrics)
    return MetricRecord(out | {f"guard-{name}": number for name, number in counts.items()})
