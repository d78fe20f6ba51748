"""A round on the server: clients' updates come in, one update goes out, and what is learned of the samples beside."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import vmap

from mithridate.core.aggregator import Context, NotFiniteError
from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError
from mithridate.core.model import call_with
from mithridate.core.modes import BatchNormMode, in_mode
from mithridate.core.seeding import generator
from mithridate.core.update_attack import Honest
from mithridate.core.updates import Updates
from mithridate.core.view import Memory
from mithridate.maths.calculus import gradient
from mithridate.simulation.clients import FederatedRun
from mithridate.simulation.per_client.batch_statistics import LayerMoments, merge, recorded, watched
from mithridate.simulation.per_client.gradients import PASS, client_gradients
from mithridate.simulation.per_client.sums import SUMMED_PASS, summed_gradients
from mithridate.training.burn_in import EVALUATION_BATCH
from mithridate.training.learner import Learner
from mithridate.training.rollback import copied

AT_ONCE = 8
"""Rows that are bounded and added at a time: copies of so few go into memory that was just freed, not into fresh."""

CHUNK = 500
"""Trusted samples whose gradient is computed at once."""


class SampleNotes:
    """What a server learns of a round's samples beside gradients: their loss, and BatchNorm statistics."""

    def __init__(self, learner: Learner, run: FederatedRun) -> None:
        self.learner, self.run = learner, run
        self.by_layer: LayerMoments = {}
        self.total, self.samples = 0.0, 0

    @property
    def loss(self) -> float:
        """The mean loss over all samples."""
        return self.total / self.samples

    @contextmanager
    def watched(self) -> Iterator[LayerMoments]:
        """Collect the moments of BatchNorm layers' inputs, if the run records them."""
        if self.run.batch_norm != "synchronised":
            yield {}
            return
        with watched(self.learner.model) as by_layer:
            yield by_layer

    def add(self, by_layer: LayerMoments, losses: Tensor, samples: int) -> None:
        """Add what some clients' samples gave; `samples` is how many each client has."""
        merge(self.by_layer, by_layer)
        self.total += float(losses.double().sum()) * samples
        self.samples += len(losses) * samples

    @torch.no_grad()
    def take(self, x: Tensor, y: Tensor) -> None:
        """Compute and add what samples (clients, samples, ...) give, in eval mode."""
        learner, size = self.learner, max(1, EVALUATION_BATCH // y.shape[1])
        for inputs, labels in zip(torch.split(x, size), torch.split(y, size), strict=True):
            if len(labels) == 0:
                continue
            with self.watched() as by_layer:
                loss = learner.criterion(learner.white_box.logits(inputs.flatten(0, 1)), labels.flatten(0, 1))
            self.add(by_layer, loss.expand(len(labels)), labels.shape[1])

    def buffers(self, x: Tensor) -> dict[str, Tensor]:
        """The model's buffers after the round; the model itself is left alone."""
        if self.run.batch_norm == "averaged":
            return _averaged_buffers(self.learner, x)
        return recorded(self.learner.model, self.by_layer)


class ServerRound:
    """A round's updates: the whole (client, parameter) matrix if rule or attack looks at it, else only sums.

    Args:
        learner: The server's model, with its defence.
        run: How the server learns.
        clients: Ids, in the order in which their rows will come.
        rule_notes: The robust rule's notes between rounds; written to.
        left_out: Further clients of the round, whose batch the model cannot take: they count as refused.
        keep: Whether all rows stay in memory.
        attacked: Whether some of the clients are hostile.
    """

    def __init__(
        self,
        learner: Learner,
        run: FederatedRun,
        clients: Tensor,
        rule_notes: Memory,
        *,
        left_out: int,
        keep: bool,
        attacked: bool,
    ) -> None:
        self.learner, self.run, self.clients, self.rule_notes = learner, run, clients, rule_notes
        trained = {name: p for name, p in learner.model.named_parameters() if p.requires_grad}
        self.shapes = {name: p.shape for name, p in trained.items()}
        self.width = sum(p.numel() for p in trained.values())
        self.unmeasured = unmeasured_parameters(learner.model, run)
        pieces = [torch.full((p.numel(),), name not in self.unmeasured) for name, p in trained.items()]
        self.measured = torch.cat(pieces).to(learner.device)
        first = next(iter(trained.values()))
        self.total = torch.zeros(self.width, dtype=first.dtype, device=first.device)
        # What an attacker sees: the sum before the bound on single rows.
        self.unbounded_total = torch.zeros_like(self.total) if attacked and run.bound == "before" else self.total
        self.rows = torch.empty(len(clients), self.width, dtype=first.dtype, device=first.device) if keep else None
        self.accepted = torch.zeros(0, dtype=torch.bool, device=first.device)
        self.filled, self.refused, self.length = 0, left_out, 0.0
        self.notes = SampleNotes(learner, run)
        # Whether lengths and sums will do, so that no row need be formed.
        self.summable = (
            not keep and run.batch_norm != "averaged" and (run.bound == "after" or not self._bound_looks_at_rows())
        )
        self._buffer: Tensor | None = None

    @property
    def mode(self) -> BatchNormMode:
        """BatchNorm while gradients are computed."""
        return "train" if self.run.batch_norm == "averaged" else "eval"

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """(clients, parameters) of some clients, in memory that the next call may overwrite."""
        if self._buffer is None or len(self._buffer) < len(x):
            self._buffer = self.total.new_empty(len(x), self.width)
        learner = self.learner
        return client_gradients(learner.model, learner.criterion, x, y, mode=self.mode, out=self._buffer[: len(x)])

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in honest clients' updates, and note their samples."""
        size = max(1, SUMMED_PASS // y.shape[1])
        for inputs, labels in zip(torch.split(x, size), torch.split(y, size), strict=True):
            if len(labels) and not (self.summable and self._add_sums(inputs, labels)):
                fewer = max(1, PASS // y.shape[1])
                for few, few_labels in zip(torch.split(inputs, fewer), torch.split(labels, fewer), strict=True):
                    self.send(self.gradients(few, few_labels))
                self.notes.take(inputs, labels)

    def _bound_looks_at_rows(self) -> bool:
        """Whether the defence's bound needs more than the lengths of rows; its notes are not touched."""

        class LookedError(Exception):
            pass

        def look() -> Tensor:
            raise LookedError

        learner = self.learner
        view = dataclasses.replace(learner.view(), memory=copied(learner.memory, {}))
        probe = Updates(look, self._measured_shapes, lengths=torch.ones(1, device=learner.device))
        try:
            return learner.defence.bound(probe, view).factors is None
        except LookedError:
            return True

    def _factors(self, lengths: Tensor) -> Tensor | None:
        """What the defence's bound multiplies rows of these lengths by."""

        def look() -> Tensor:
            raise AssertionError("a bound looked at rows, which it had not done before")

        return self.learner.bound_updates(Updates(look, self._measured_shapes, lengths=lengths)).factors

    def _add_sums(self, x: Tensor, y: Tensor) -> bool:
        """Take in honest clients' updates as sums; False, and nothing added, where model or numbers do not allow it."""
        learner = self.learner
        with self.notes.watched() as by_layer:
            sums = summed_gradients(
                learner.model,
                learner.criterion,
                x,
                y,
                factors=self._factors if self.run.bound == "before" else None,
                unmeasured=self.unmeasured,
                unweighted=self.unbounded_total is not self.total,
            )
        if isinstance(sums, str):
            self.summable = False
            return False
        if not bool(sums.lengths.isfinite().all()):
            return False
        self.notes.add(by_layer, sums.losses, y.shape[1])
        self.total += sums.total
        if sums.unweighted is not None:
            self.unbounded_total += sums.unweighted
        self.accepted = torch.cat([self.accepted, torch.ones_like(sums.lengths, dtype=torch.bool)])
        self.length += float(sums.lengths.sum())
        self.filled += len(x)
        return True

    def send(self, rows: Tensor) -> None:
        """Take in rows as they were sent; those that are not finite are refused."""
        if len(rows) > 1 and rows.stride(0) == 0 and self.rows is None:  # all are views of a single row
            self._take_in(rows[:1], times=len(rows))
            return
        for piece in torch.split(rows, AT_ONCE):
            self._take_in(piece)

    def _take_in(self, rows: Tensor, times: int = 1) -> None:
        """Take in rows, each of them sent `times` times."""
        lengths = torch.linalg.vector_norm(rows, dim=1)
        finite = lengths.isfinite()
        if not bool(finite.all()):
            finite = torch.isfinite(rows).all(1)  # a length may overflow though no entry does
        self.accepted = torch.cat([self.accepted, finite.repeat_interleave(times)])
        self.refused += int((~finite).sum()) * times
        if not bool(finite.any()):
            return
        rows = rows if bool(finite.all()) else rows[finite]
        self.length += float(lengths[finite].sum()) * times
        bounded = self._bounded(rows) if self.run.bound == "before" else rows
        self.total.add_(bounded.sum(0), alpha=times)
        if self.unbounded_total is not self.total:
            self.unbounded_total.add_(rows.sum(0), alpha=times)
        if self.rows is not None:
            self.rows[self.filled : self.filled + len(rows)] = bounded
        self.filled += len(rows) * times

    def _summed(self, x: Tensor, y: Tensor) -> Tensor:
        """(parameters,), the sum of clients' gradients; no row is formed where the model allows that."""
        learner, size = self.learner, max(1, SUMMED_PASS // y.shape[1])
        total = torch.zeros_like(self.total)
        for inputs, labels in zip(torch.split(x, size), torch.split(y, size), strict=True):
            sums = "" if self.mode == "train" else summed_gradients(learner.model, learner.criterion, inputs, labels)
            if isinstance(sums, str):
                rows = client_gradients(learner.model, learner.criterion, x, y, mode=self.mode)
                return rows.sum(0)
            total += sums.total
        return total

    def honest(self, hostile: Batch) -> Honest:
        """What an attacker who sees every update sees before it sends its own.

        Args:
            hostile: The samples of the hostile clients.
        """
        learner, mode = self.learner, self.mode
        return Honest(
            total=self.unbounded_total.clone(),
            bounded_total=self.total.clone(),
            n_honest=self.filled,
            x=hostile.x,
            y=hostile.y,
            rows=self.rows[: self.filled] if self.rows is not None else None,
            gradients=lambda x, y: client_gradients(learner.model, learner.criterion, x, y, mode=mode),
            summed=self._summed,
        )

    def aggregated(self) -> Updates:
        """The round's update; zero where too few rows are finite for the rule: nobody hostile may stop the server.

        One that is not finite is shown to no bound, and the learner refuses to step on it.
        """
        if self.filled == 0 or not self._enough():
            return Updates(torch.zeros_like(self.total).unsqueeze(0), self.shapes)
        row = (self.total / self.filled).unsqueeze(0)
        if self.run.aggregator is not None:
            row = row.clone()
            try:
                row[:, self.measured] = self._by_rule().unsqueeze(0)
            except NotFiniteError:
                row.fill_(torch.nan)
        if not bool(row.isfinite().all()):
            return Updates(row, self.shapes)
        return Updates(self._bounded(row) if self.run.bound == "after" else row, self.shapes)

    def _by_rule(self) -> Tensor:
        """What the robust rule makes of the measured parameters."""
        rule, learner = self.run.aggregator, self.learner
        if rule is None or self.rows is None:
            raise AssertionError("a rule has all rows")
        rows = self.rows[: self.filled]
        context = Context(
            clients=self.clients[: len(self.accepted)][self.accepted],
            rng=generator("aggregator", self.run.rule_name, learner.step),
            trusted=self._trusted_update() if rule.needs_trusted else None,
            memory=self.rule_notes,
        )
        return rule.aggregate(rows if bool(self.measured.all()) else rows[:, self.measured], context)

    def _trusted_update(self) -> Tensor:
        """The server's own update: the gradient on its trusted samples, BatchNorm in eval mode."""
        learner = self.learner
        if learner.trusted is None:
            return self.total.new_zeros(0)
        box = learner.white_box
        with box.objective("eval") as objective:
            gradients = gradient(objective, box.parameters, *learner.trusted, chunk=CHUNK)
        return Updates.of(gradients).rows[0][self.measured]

    def _enough(self) -> bool:
        """Whether the rule holds for the rows that are left after refusals."""
        if self.refused == 0 or self.run.aggregator is None:
            return True
        try:
            self.run.aggregator.check(self.filled)
        except ConfigError:
            return False
        return True

    @property
    def _measured_shapes(self) -> dict[str, torch.Size]:
        if bool(self.measured.all()):
            return self.shapes
        return {"measured": torch.Size([int(self.measured.sum())])}

    def _bounded(self, rows: Tensor) -> Tensor:
        """Rows after the defence's bound."""
        learner = self.learner
        if bool(self.measured.all()):
            return learner.bound_updates(Updates(rows, self.shapes)).rows
        out = rows.clone()
        out[:, self.measured] = learner.bound_updates(Updates(rows[:, self.measured], self._measured_shapes)).rows
        return out


def unmeasured_parameters(model: torch.nn.Module, run: FederatedRun) -> frozenset[str]:
    """Names of the parameters that distances and bounds do not look at."""
    if run.distances == "all":
        return frozenset()
    norms = (torch.nn.modules.batchnorm._NormBase, torch.nn.GroupNorm, torch.nn.LayerNorm, torch.nn.RMSNorm)
    layers = {name for name, module in model.named_modules() if isinstance(module, norms)}
    return frozenset(name for name, _ in model.named_parameters() if name.rpartition(".")[0] in layers)


@torch.no_grad()
def _averaged_buffers(learner: Learner, x: Tensor) -> dict[str, Tensor]:
    """Means over the clients of the statistics that each would have recorded from its own batch."""
    model = learner.model
    before = {name: b.clone() for name, b in model.named_buffers()}
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    sums = {name: torch.zeros_like(b, dtype=torch.float64) for name, b in before.items()}

    def forward(buffers: dict[str, Tensor], samples: Tensor) -> Tensor:
        answer: Tensor = call_with(model, {**parameters, **buffers}, (samples,))
        return answer

    try:
        with in_mode(model, "train"):
            for inputs in torch.split(x, max(1, PASS // x.shape[1])):
                by_client = {name: b.expand(len(inputs), *b.shape).clone() for name, b in before.items()}
                vmap(forward, randomness="error")(by_client, inputs)
                for name, values in by_client.items():
                    sums[name] += values.double().sum(0)
    finally:
        learner.put_buffers(before)
    return {name: (total / len(x)).to(before[name].dtype) for name, total in sums.items()}
