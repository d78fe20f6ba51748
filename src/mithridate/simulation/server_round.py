"""A round's updates on the server: their sums or all of them, and what else it learns of the round's samples."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from mithridate.core.batch import Batch
from mithridate.core.defence import row_factors
from mithridate.core.errors import ConfigError
from mithridate.core.model import BatchNormMode, frozen_statistics
from mithridate.core.update import Gradient
from mithridate.core.update_attack import Honest
from mithridate.simulation.clients import FederatedRun, check_defence, has_rule
from mithridate.simulation.online import EVALUATION_BATCH
from mithridate.simulation.per_client.batch_statistics import Seen, recorded, watched
from mithridate.simulation.per_client.gradients import PASS, client_gradients
from mithridate.simulation.per_client.sums import SUMMED_PASS, summed_gradients
from mithridate.training.learner import Learner

AT_ONCE = 8
"""Rows that are bounded and added at a time: copies of so few go into memory that was just freed, not into fresh."""


class Notes:
    """What a server learns of a round's samples beside gradients: their loss, and BatchNorm statistics."""

    def __init__(self, learner: Learner, run: FederatedRun) -> None:
        self.learner, self.run = learner, run
        self.seen: Seen = {}
        self.total, self.samples = 0.0, 0

    @property
    def loss(self) -> float:
        """Mean over samples."""
        return self.total / self.samples

    @contextmanager
    def watched(self) -> Iterator[Seen]:
        """Note what BatchNorm layers are fed, if that is recorded."""
        if self.run.batch_norm != "synchronised":
            yield {}
            return
        with watched(self.learner.model) as seen:
            yield seen

    def add(self, seen: Seen, losses: Tensor, samples: int) -> None:
        """Add some clients, each with so many samples."""
        for name, moments in seen.items():
            if name in self.seen:
                self.seen[name].take(moments)
            else:
                self.seen[name] = moments
        self.total += float(losses.double().sum()) * samples
        self.samples += len(losses) * samples

    @torch.no_grad()
    def take(self, x: Tensor, y: Tensor) -> None:
        """Look at samples (clients, samples, ...), in eval mode."""
        learner, size = self.learner, max(1, EVALUATION_BATCH // y.shape[1])
        for pixels, labels in zip(torch.split(x, size), torch.split(y, size), strict=True):
            if len(labels) == 0:
                continue
            with self.watched() as seen, frozen_statistics(learner.model, "eval"):
                loss = learner.criterion(learner.model(pixels.flatten(0, 1)), labels.flatten())
            self.add(seen, loss.expand(len(labels)), labels.shape[1])

    def buffers(self, x: Tensor) -> dict[str, Tensor]:
        """The model's buffers after the round; the model itself is left alone."""
        if self.run.batch_norm == "averaged":
            return _averaged_buffers(self.learner, x)
        return recorded(self.learner.model, self.seen)


class Sheet:
    """A round's updates: the whole (client, parameter) matrix if somebody looks at it, else only sums."""

    def __init__(self, learner: Learner, run: FederatedRun, clients: Tensor, *, keep: bool, attacked: bool) -> None:
        """Clients are named in the order in which their rows will come."""
        self.learner, self.run, self.clients = learner, run, clients
        trained = {name: p for name, p in learner.model.named_parameters() if p.requires_grad}
        self.shapes = {name: p.shape for name, p in trained.items()}
        self.width = sum(p.numel() for p in trained.values())
        self.apart = apart(learner.model, run)
        pieces = [torch.full((p.numel(),), name not in self.apart) for name, p in trained.items()]
        self.looked_at = torch.cat(pieces).to(learner.device)
        first = next(iter(trained.values()))
        self.total = torch.zeros(self.width, dtype=first.dtype, device=first.device)
        # What an attacker sees: the sum before the bound on single rows.
        self.plain = torch.zeros_like(self.total) if attacked and run.bound == "before" else self.total
        self.rows = torch.empty(len(clients), self.width, dtype=first.dtype, device=first.device) if keep else None
        self.known = torch.zeros(0, dtype=torch.bool, device=first.device)
        self.filled, self.refused, self.length = 0, 0, 0.0
        self.notes = Notes(learner, run)
        # Whether lengths and sums will do, so that no row need be formed.
        self.summable = (
            not keep
            and run.batch_norm != "averaged"
            and (run.bound == "after" or row_factors(learner.defence, torch.ones(1)) is not None)
        )
        self._buffer: Tensor | None = None

    @property
    def mode(self) -> BatchNormMode:
        """BatchNorm while gradients are made."""
        return "train" if self.run.batch_norm == "averaged" else "eval"

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """(clients, parameters) of some clients, in a place that the next call may use again."""
        if self._buffer is None or len(self._buffer) < len(x):
            self._buffer = self.total.new_empty(len(x), self.width)
        learner = self.learner
        return client_gradients(learner.model, learner.criterion, x, y, mode=self.mode, out=self._buffer[: len(x)])

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in honest clients' updates, and note their samples."""
        size = max(1, SUMMED_PASS // y.shape[1])
        for pixels, labels in zip(torch.split(x, size), torch.split(y, size), strict=True):
            if len(labels) and not (self.summable and self._add_sums(pixels, labels)):
                few = max(1, PASS // y.shape[1])
                for some, theirs in zip(torch.split(pixels, few), torch.split(labels, few), strict=True):
                    self.send(self.gradients(some, theirs))
                self.notes.take(pixels, labels)

    def _add_sums(self, x: Tensor, y: Tensor) -> bool:
        """The same without rows; False if the model or a value that is not finite forbids it, nothing being added."""
        learner = self.learner
        with self.notes.watched() as seen:
            found = summed_gradients(
                learner.model,
                learner.criterion,
                x,
                y,
                factors=partial(row_factors, learner.defence) if self.run.bound == "before" else None,
                apart=self.apart,
                plain=self.plain is not self.total,
            )
        if isinstance(found, str):
            self.summable = False
            return False
        if not bool(found.lengths.isfinite().all()):
            return False
        self.notes.add(seen, found.losses, y.shape[1])
        self.total += found.total
        if found.plain is not None:
            self.plain += found.plain
        self.known = torch.cat([self.known, torch.ones_like(found.lengths, dtype=torch.bool)])
        self.length += float(found.lengths.sum())
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
        """Rows, each of them sent so many times."""
        lengths = torch.linalg.vector_norm(rows, dim=1)
        finite = lengths.isfinite()
        if not bool(finite.all()):
            finite = torch.isfinite(rows).all(1)  # a length may overflow though no entry does
        self.known = torch.cat([self.known, finite.repeat_interleave(times)])
        self.refused += int((~finite).sum()) * times
        if not bool(finite.any()):
            return
        rows = rows if bool(finite.all()) else rows[finite]
        self.length += float(lengths[finite].sum()) * times
        bounded = self._bounded(rows) if self.run.bound == "before" else rows
        self.total.add_(bounded.sum(0), alpha=times)
        if self.plain is not self.total:
            self.plain.add_(rows.sum(0), alpha=times)
        if self.rows is not None:
            self.rows[self.filled : self.filled + len(rows)] = bounded
        self.filled += len(rows) * times

    def honest(self, mine: Batch) -> Honest:
        """What an attacker who sees every update sees before it sends its own."""
        learner, mode = self.learner, self.mode
        return Honest(
            total=self.plain.clone(),
            bounded_total=self.total.clone(),
            n_honest=self.filled,
            x=mine.x,
            y=mine.y,
            rows=self.rows[: self.filled] if self.rows is not None else None,
            gradients=lambda x, y: client_gradients(learner.model, learner.criterion, x, y, mode=mode),
        )

    def aggregated(self) -> Gradient:
        """The round's update; zero where too few clients' were finite, or hostile ones could stop the server."""
        learner, defence = self.learner, self.learner.defence
        if self.filled == 0 or not self._enough():
            return Gradient(torch.zeros_like(self.total).unsqueeze(0), self.shapes)
        mean = (self.total / self.filled).unsqueeze(0)
        if self.rows is None or not has_rule(defence):
            row = mean
        else:
            whole = bool(self.looked_at.all())
            held = self.rows[: self.filled]
            seen = Gradient(
                held if whole else held[:, self.looked_at],
                self.shapes if whole else {"looked at": self._seen},
                self.clients[: len(self.known)][self.known],
            )
            row = mean.clone()
            row[:, self.looked_at] = defence.aggregate(seen, learner.view()).rows
        return Gradient(self._bounded(row) if self.run.bound == "after" else row, self.shapes)

    def _enough(self) -> bool:
        """Whether the defence's rule holds for the rows that are left after refusals."""
        if self.refused == 0:
            return True
        try:
            check_defence(self.learner.defence, self.run, self.filled)
        except ConfigError:
            return False
        return True

    @property
    def _seen(self) -> torch.Size:
        return torch.Size([int(self.looked_at.sum())])

    def _bounded(self, rows: Tensor) -> Tensor:
        """Rows after the defence's bound."""
        learner = self.learner
        if bool(self.looked_at.all()):
            return learner.defence.bound(Gradient(rows, self.shapes), learner.view()).rows
        out = rows.clone()
        part = Gradient(rows[:, self.looked_at], {"looked at": self._seen})
        out[:, self.looked_at] = learner.defence.bound(part, learner.view()).rows
        return out


def apart(model: torch.nn.Module, run: FederatedRun) -> frozenset[str]:
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

    def forward(buffers: dict[str, Tensor], own: Tensor) -> Tensor:
        answer: Tensor = functional_call(model, {**parameters, **buffers}, (own,))
        return answer

    flags = {name: m.training for name, m in model.named_modules()}
    model.train()
    try:
        for pixels in torch.split(x, max(1, PASS // x.shape[1])):
            held = {name: b.expand(len(pixels), *b.shape).clone() for name, b in before.items()}
            vmap(forward, randomness="error")(held, pixels)
            for name, own in held.items():
                sums[name] += own.double().sum(0)
    finally:
        for name, module in model.named_modules():
            module.training = flags[name]
        learner.restore_buffers(before)
    return {name: (total / len(x)).to(before[name].dtype) for name, total in sums.items()}
