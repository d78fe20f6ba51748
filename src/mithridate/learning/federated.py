"""The federated loop: rounds of clients, an attack on their updates, a defended server; one trace row a round."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.func import functional_call, vmap
from torch.optim import SGD

from mithridate.batch_statistics import Seen, recorded, watched
from mithridate.core import (
    Batch,
    BatchNormMode,
    Defence,
    Gradient,
    Honest,
    Monitor,
    Need,
    UpdateAttack,
    View,
    frozen_statistics,
    row_factors,
)
from mithridate.data.shards import Shards, divide, sampled
from mithridate.data.stream import Stream
from mithridate.defences.chain import Chain
from mithridate.defences.robust import Robust
from mithridate.defences.skip import Skip
from mithridate.errors import ConfigError, DataError
from mithridate.learning.learner import Learner, Update
from mithridate.learning.online import (
    EVALUATION_BATCH,
    Outcome,
    Progress,
    Row,
    accuracy_with_buffers_alone,
    alarms_of,
    outcome_of,
    phase_end,
    start_row,
)
from mithridate.per_client import PASS, SUMMED_PASS, client_gradients, summed_gradients
from mithridate.registry import settings
from mithridate.seeding import derived_seed, generator

GIB = 2**30
AT_ONCE = 8
"""Rows that are bounded and added at a time: copies of so few go into memory that was just freed, not into fresh."""


@settings
class FederatedRun:
    """How the server learns from its clients, and how long.

    A client's update is the gradient of its loss; the server takes the mean over the round's clients, or what the
    defence's `aggregate` makes of the rows, and steps with SGD.

    Args:
        rounds: Rounds before the trigger round at most; that one comes on top.
        per_round: Clients sampled in a round, >= 1; unset: all of them.
        local_batch: Samples a client draws from its shard in a round, >= 1; unset: the whole shard, or as many as the
            smallest shard of the round holds.
        lr: Learning rate of the server's SGD.
        momentum: Its momentum factor.
        weight_decay: Its L2 penalty.
        restore_momentum: Go on with the burn-in's momentum instead of a fresh optimiser.
        bound: Where the defence's `bound` (clipping) acts: on the aggregate (`after`, threat model C.2), or on each
            client's row (`before`, C.3).
        batch_norm: Statistics of BatchNorm. `synchronised`: clients use the global running statistics, which then take
            in what each layer was fed by all of the round's samples, as one batch; `averaged`: each client uses its
            own batch's, and the clients' running statistics are averaged; `frozen`: nothing is recorded.
        distances: Which parameters a robust rule and a bound look at: `all`, or all but those of normalisation layers
            (`without_norm`), which then follow the mean, unbounded.
        max_matrix: Largest (client, parameter) matrix that is held at once, in GiB, > 0. Only a robust rule, or an
            attack that looks at every update, has it held.
        on_alarm: What a monitor's alarm does: `record` it only; `trigger`: the attacker ends the phase and fires;
            `halt`: the service stops learning before the trigger.
        save_every: Rounds between resume points.

    Source:
        Pang et al., NeurIPS 2021, section 4.2: SGD, lr 0.1, momentum 0.9, statistics of BatchNorm synchronised.
    """

    rounds: Annotated[int, Field(ge=0)] = 20
    per_round: Annotated[int, Field(ge=1)] | None = None
    local_batch: Annotated[int, Field(ge=1)] | None = None
    lr: Annotated[float, Field(gt=0)] = 0.1
    momentum: Annotated[float, Field(ge=0)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    restore_momentum: bool = False
    bound: Literal["after", "before"] = "after"
    batch_norm: Literal["synchronised", "averaged", "frozen"] = "synchronised"
    distances: Literal["all", "without_norm"] = "all"
    max_matrix: Annotated[float, Field(gt=0)] = 4.0
    on_alarm: Literal["record", "trigger", "halt"] = "record"
    save_every: Annotated[int, Field(ge=1)] = 1

    @property
    def steps(self) -> int:
        """As of an online run: steps before the trigger at most."""
        return self.rounds


@dataclass(frozen=True)
class Federation:
    """Clients and their images.

    Args:
        stream: Gives test, validation and trusted parts.
        shards: Positions in the stream's victim part, a client each.
        seed: Of sampling and of the clients' draws.
    """

    stream: Stream
    shards: Sequence[NDArray[np.int64]]
    seed: int

    def require(self, run: FederatedRun) -> None:
        """Refuse a run that asks for more clients or samples, in any round, than there are.

        Raises:
            DataError: It does.
        """
        for number in range(run.rounds + 1):
            self._drawn(number, run)

    def _drawn(self, number: int, run: FederatedRun) -> tuple[NDArray[np.int64], int]:
        """The clients of a round, and how many samples each brings."""
        who = sampled(len(self.shards), run.per_round or len(self.shards), round_=number, seed=self.seed)
        smallest = min(len(self.shards[client]) for client in who)
        size = smallest if run.local_batch is None else run.local_batch
        if size > smallest:
            raise DataError(
                f"local_batch = {size}, and a client of round {number} holds {smallest} images; lower it, use fewer "
                "clients, or another partition."
            )
        return who, size

    def round(self, number: int, run: FederatedRun, device: torch.device | str = "cpu") -> tuple[NDArray[Any], Batch]:
        """The clients of a round, and their samples: x (clients, samples, ...), y (clients, samples).

        Args:
            number: Which round, from 0; with the seed it decides everything.
            run: How many clients and samples.
            device: Where the samples go.

        Raises:
            DataError: More clients or samples are asked for than there are.
        """
        who, size = self._drawn(number, run)
        chosen = []
        for client in who:
            rng = np.random.default_rng(derived_seed("local batch", self.seed, number, int(client)))
            chosen.append(rng.permutation(self.shards[client])[:size])
        batch = self.stream.victim.batch(np.concatenate(chosen), device)
        if self.stream.settings.augment_stream:
            batch = self.stream.augmented(batch, generator("federated augmentation", self.seed, number))
        return who, Batch(batch.x.reshape(len(who), size, *batch.x.shape[1:]), batch.y.reshape(len(who), size))


def federate(stream: Stream, how: Shards, *, seed: int) -> Federation:
    """Divide the stream's victim part among clients.

    Args:
        stream: Whose images.
        how: Clients and partition.
        seed: Of the division, the sampling and the clients' draws.

    Raises:
        DataError: There are too few images.
    """
    return Federation(stream, divide(stream.victim, how, seed=seed), seed)


def check_defence(defence: Defence, run: FederatedRun, clients: int) -> None:
    """Refuse a defence that would do nothing in a federation, or cannot work with so many clients.

    Args:
        defence: What stands before the model.
        run: Where bounds act.
        clients: In a round.

    Raises:
        ConfigError: It acts on samples, of which a server sees none; it reads what a server has not; or its rule needs
            more clients.
    """
    for part in _parts(defence):
        cls = type(part)
        acts = cls.screen is not Defence.screen or cls.loss is not Defence.loss
        if acts and not part.notes_only:
            raise ConfigError(
                f"{cls.__name__} acts on training samples, and the server of a federation sees none, so it would do "
                "nothing; take one that acts on updates (clip, dgc, robust) or on the model (gate, bound_update, ema)."
            )
        if isinstance(part, Skip) and (part.watch == "loss" or run.bound == "before"):
            raise ConfigError(
                "skip: the server of a federation knows the one update of a round, but no loss; set "
                'watch = "gradient", and bound = "after" in [federated].'
            )
        if isinstance(part, Robust):
            part.check(clients)


def _check_model(model: torch.nn.Module, run: FederatedRun) -> None:
    """Refuse a model whose clients would draw random numbers in train mode."""
    dropout = (m for m in model.modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd))
    if run.batch_norm == "averaged" and any(m.p > 0 for m in dropout):
        raise ConfigError(
            'batch_norm = "averaged" computes gradients in train mode, in which the model\'s dropout would draw anew '
            'for every client and no run could be repeated; use "synchronised" or "frozen".'
        )


def _parts(defence: Defence) -> list[Defence]:
    """The defences that a chain is made of; another one is its own part."""
    return [one for part in defence.built for one in _parts(part)] if isinstance(defence, Chain) else [defence]


def _rules(defence: Defence) -> bool:
    """Whether it makes the round's update by a rule of its own, not by the mean."""
    return any(type(part).aggregate is not Defence.aggregate for part in _parts(defence))


def hostile_clients(attack: UpdateAttack, clients: int) -> int:
    """How many of a round's clients an attack has: its share, rounded up."""
    return min(math.ceil(attack.ratio * clients - 1e-9), clients)


@dataclass(frozen=True)
class Collected:
    """What the server has of a round.

    Args:
        aggregate: One row.
        taken: Clients behind it.
        refused: Clients whose update was not finite; they are left out.
        lengths: Mean l2 length of the rows as sent.
        hostile: Share of hostile clients.
        loss: Mean loss of the honest data before the step.
        buffers: BatchNorm statistics after the round.
    """

    aggregate: Gradient
    taken: int
    refused: int
    lengths: float
    hostile: float
    loss: float
    buffers: Mapping[str, Tensor]


class _Rounds:
    """The pieces of one run, bound together; `run_federated` is its only user."""

    def __init__(
        self,
        learner: Learner,
        federation: Federation,
        attack: UpdateAttack,
        run: FederatedRun,
        monitors: Sequence[Monitor],
        progress: Progress,
    ) -> None:
        self.learner, self.federation, self.attack, self.run = learner, federation, attack, run
        self.monitors, self.progress = monitors, progress
        device, stream = learner.device, federation.stream
        federation.require(run)
        clients = run.per_round or len(federation.shards)
        check_defence(learner.defence, run, clients)
        _check_model(learner.model, run)
        self.keep = self._keeps(clients)
        self.test = list(stream.test.batches(EVALUATION_BATCH, device=device))
        _, trigger = federation.round(run.rounds, run, device)
        self.things: dict[Need, Any] = {
            Need.MODEL: learner.white_box,
            Need.TRIGGER: Batch(trigger.x.flatten(0, 1), trigger.y.flatten()),
        }
        if len(stream.validation):
            self.things[Need.VALIDATION] = stream.validation.all(device)

    def view(self) -> View:
        """What the attack sees now."""
        rows = self.progress.rows
        now = {**self.things, Need.ACCURACY: (rows[0]["accuracy"], rows[-1]["accuracy"])}
        return View(self.learner.step, self.progress.memory, now, self.attack.needs, type(self.attack).__name__)

    def start(self) -> None:
        """The row of the state before the first round."""
        self.progress.rows.append(start_row(self.learner, self.test))

    def step(self, phase: str) -> None:
        """One round: collect, aggregate, step, measure."""
        began = time.perf_counter()
        self.learner.begin_round()
        index = len(self.progress.rows) - 1
        number = self.run.rounds if phase == "trigger" else index
        rng = generator("update attack", self.federation.seed, index)
        collected = self._collect(number, phase, rng)
        made = time.perf_counter()
        update = self.learner.apply(
            collected.aggregate,
            batch_loss=collected.loss,
            learned=collected.taken,
            buffers=collected.buffers,
        )
        updated = time.perf_counter()
        if phase != "trigger":
            self.attack.fed(self.view())
        score = self.learner.evaluate(self.test)
        row = _row(index + 1, phase, collected, update)
        row |= {"accuracy": score.accuracy, "loss": score.loss}
        row |= {"craft_seconds": made - began, "update_seconds": updated - made, "alarms": ""}
        self.progress.rows.append(row)
        row["alarms"] = "; ".join(alarms_of(self.monitors, self.progress.rows))
        row["seconds"] = time.perf_counter() - began

    def _collect(self, number: int, phase: str, rng: torch.Generator) -> Collected:
        """Every client's update, the hostile ones' replaced, to one row."""
        who, data = self.federation.round(number, self.run, self.learner.device)
        n = len(data.y)
        hostile = hostile_clients(self.attack, n)
        clients = torch.from_numpy(who).to(self.learner.device)
        sheet = _Sheet(self.learner, self.run, torch.roll(clients, -hostile), keep=self.keep, attacked=hostile > 0)
        sheet.add(data.x[hostile:], data.y[hostile:])
        mine = Batch(data.x[:hostile], data.y[:hostile])
        sheet.notes.take(mine.x, mine.y)
        if hostile:
            honest = sheet.honest(mine)
            craft = self.attack.craft_trigger if phase == "trigger" else self.attack.craft
            sheet.send(craft(honest, self.view(), rng))
        return Collected(
            aggregate=sheet.aggregated(),
            taken=sheet.filled,
            refused=sheet.refused,
            lengths=sheet.length / max(sheet.filled, 1),
            hostile=hostile / n,
            loss=sheet.notes.loss,
            buffers=sheet.notes.buffers(data.x),
        )

    def _keeps(self, n: int) -> bool:
        """Whether all rows of a round are held at once, because somebody looks at them.

        Raises:
            ConfigError: They are too many.
        """
        defence = self.learner.defence
        attacked = self.attack.every_row and hostile_clients(self.attack, n) > 0
        if not _rules(defence) and not attacked:
            return False
        trained = [p for p in self.learner.model.parameters() if p.requires_grad]
        width = sum(p.numel() for p in trained)
        size = n * width * trained[0].element_size() / GIB
        if size > self.run.max_matrix:
            who = type(self.attack if attacked else defence).__name__
            raise ConfigError(
                f"{who} looks at all updates of a round at once: {n} clients of {width:,} parameters are {size:.1f} "
                f"GiB, more than max_matrix = {self.run.max_matrix:g}; use fewer clients a round, or raise it."
            )
        return True


class _Notes:
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


class _Sheet:
    """A round's updates: the whole (client, parameter) matrix if somebody looks at it, else only sums."""

    def __init__(self, learner: Learner, run: FederatedRun, clients: Tensor, *, keep: bool, attacked: bool) -> None:
        """Clients are named in the order in which their rows will come."""
        self.learner, self.run, self.clients = learner, run, clients
        trained = {name: p for name, p in learner.model.named_parameters() if p.requires_grad}
        self.shapes = {name: p.shape for name, p in trained.items()}
        self.width = sum(p.numel() for p in trained.values())
        self.apart = _apart(learner.model, run)
        pieces = [torch.full((p.numel(),), name not in self.apart) for name, p in trained.items()]
        self.looked_at = torch.cat(pieces).to(learner.device)
        first = next(iter(trained.values()))
        self.total = torch.zeros(self.width, dtype=first.dtype, device=first.device)
        # What an attacker sees: the sum before the bound on single rows.
        self.plain = torch.zeros_like(self.total) if attacked and run.bound == "before" else self.total
        self.rows = torch.empty(len(clients), self.width, dtype=first.dtype, device=first.device) if keep else None
        self.known = torch.zeros(0, dtype=torch.bool, device=first.device)
        self.filled, self.refused, self.length = 0, 0, 0.0
        self.notes = _Notes(learner, run)
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
            make_own=lambda: client_gradients(learner.model, learner.criterion, mine.x, mine.y, mode=mode),
        )

    def aggregated(self) -> Gradient:
        """The round's update; zero where too few clients' were finite, or hostile ones could stop the server."""
        learner, defence = self.learner, self.learner.defence
        if self.filled == 0 or not self._enough():
            return Gradient(torch.zeros_like(self.total).unsqueeze(0), self.shapes)
        mean = (self.total / self.filled).unsqueeze(0)
        if self.rows is None or not _rules(defence):
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


def _apart(model: torch.nn.Module, run: FederatedRun) -> frozenset[str]:
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


def _row(number: int, phase: str, collected: Collected, update: Update) -> Row:
    return {
        "step": number,
        "phase": phase,
        "batch_loss": update.batch_loss,
        "gradient_norm": collected.lengths,
        "bounded_norm": update.bounded_norm,
        "update_norm": update.update_norm,
        "poison_linf": None,
        "poison_l2": None,
        "poisoned": collected.hostile,
        "quarantined": collected.refused,
        "flagged_clean": None,
        "flagged_poisoned": None,
        "admitted": update.verdict.admit,
        "verdict": update.verdict.reason,
    }


def federated_optimiser(learner_parameters: Any, run: FederatedRun) -> SGD:  # noqa: ANN401  (as torch's own)
    """The server's optimiser: a fresh SGD."""
    return SGD(learner_parameters, lr=run.lr, momentum=run.momentum, weight_decay=run.weight_decay)


def run_federated(
    learner: Learner,
    federation: Federation,
    attack: UpdateAttack,
    run: FederatedRun | None = None,
    *,
    monitors: Sequence[Monitor] = (),
    progress: Progress | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> Outcome:
    """Let a server learn from clients, some of them hostile: rounds before the trigger, then one trigger round.

    Args:
        learner: The server's model after its burn-in, with its defence; changed in place.
        federation: The clients.
        attack: What hostile clients send.
        run: Length and options of the loop (its optimiser fields are for `federated_optimiser`).
        monitors: Watch the readings.
        progress: Where an interrupted run had come to; the learner must be at the same point.
        on_step: Called after every round before the trigger, for progress bars and resume points.

    Returns:
        As of the online loop; `steps` counts rounds, `quarantined` counts refused updates.

    Raises:
        DataError: More clients or samples are asked for than there are.
        ConfigError: The defence does not work in a federation, or not with so few clients (see `check_defence`); or
            somebody has to see more updates at once than `max_matrix` allows.
        ThreatModelError: The attack looks at what it does not declare.
    """
    run = run or FederatedRun()
    progress = progress or Progress()
    loop = _Rounds(learner, federation, attack, run, monitors, progress)
    if not progress.rows:
        loop.start()
    while (stopped_by := phase_end(progress.rows, run.rounds, run.on_alarm, lambda: attack.ready(loop.view()))) is None:
        loop.step("accumulative")
        if on_step:
            on_step(progress)
    halted = stopped_by == "monitor" and run.on_alarm == "halt"
    after_buffers = None
    if not halted:
        before = learner.snapshot()
        loop.step("trigger")
        after_buffers = accuracy_with_buffers_alone(learner, loop.test, before)
    return outcome_of(progress, stopped_by, halted, after_buffers)
