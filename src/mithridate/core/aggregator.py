"""What an aggregator is: the updates of one round's clients in, one update out."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Generator, Tensor

from mithridate.core.errors import ConfigError, DataError, ThreatModelError
from mithridate.core.registry import settings
from mithridate.core.view import Memory
from mithridate.maths.rows import lengths, squared_distances

LARGEST = 1e300
"""The largest entry that a row may hold: sums and differences of such entries do not overflow in float64."""

Hostile = Annotated[int, Field(ge=0)]

Property = Literal["translation", "scale", "consensus"]
"""`translation`: all rows moved by v move the result by v. `scale`: all rows (and the trusted update) times c > 0 give
the result times c. `consensus`: identical rows give that row."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a rule may look at besides the rows of this round.

    Args:
        clients: Whose rows they are: (n,) int64, each id once.
        rng: On the CPU; drawn from by rules that draw.
        weights: (n,), finite, >= 0, not all zero: how much each client's row counts, as by its number of samples,
            capped by the caller (a client can claim any number); None counts all alike.
        trusted: (P,): the server's own update, from data that it knows to be clean.
        memory: The rule's private notes between rounds; the caller keeps and saves them.
    """

    clients: Tensor
    rng: Generator
    weights: Tensor | None = None
    trusted: Tensor | None = None
    memory: Memory = field(default_factory=dict)

    def shares(self) -> Tensor:
        """Each row's share in an average: (n,) float64, summing to one."""
        counts = torch.ones(len(self.clients)) if self.weights is None else self.weights
        double = counts.double()
        scaled = double / double.max()  # a sum of weights near the largest float would overflow
        return scaled / scaled.sum()


class Spread(NamedTuple):
    """How far apart rows lie, in l2.

    Args:
        diameter: The largest distance between two of them.
        widths: Largest less smallest entry of each column (P,): the sides of the smallest box that holds them all.
        length: The length of the longest.
    """

    diameter: float
    widths: Tensor
    length: float

    @classmethod
    def of(cls, rows: Tensor) -> "Spread":
        """The spread of some rows (n, P)."""
        widths = rows.amax(0).double() - rows.amin(0).double()
        return cls(float(squared_distances(rows).max().sqrt()), widths, float(lengths(rows).max()))

    @property
    def diagonal(self) -> float:
        """The largest distance inside the box."""
        return float(torch.linalg.vector_norm(self.widths))

    def widened(self, by: float) -> "Spread":
        """At most the spread of rows of which each has moved by at most so much."""
        return Spread(self.diameter + 2 * by, self.widths + 2 * by, self.length + by)


class Aggregator(ABC):
    """Makes one update of many, some of which may be hostile. Override `combine`, `most_hostile` and `leeway`.

    The result does not depend on the order of the clients. Rows, whatever their dtype, are measured and summed in
    float64 on their own device; the result has their dtype and carries no gradient.
    """

    needs_trusted: ClassVar[bool] = False
    """Whether it needs the server's own update."""

    average: ClassVar[bool] = False
    """Whether it is declared not robust: one hostile row can take it out of the box of the honest ones."""

    weighted: ClassVar[bool] = False
    """Whether it uses the clients' weights; otherwise each client counts as one."""

    remembers_clients: ClassVar[bool] = False
    """Whether it keeps notes on single clients, so that its rows must be theirs and not mixtures."""

    unmet: ClassVar[Mapping[Property, str]] = {}
    """Properties that the rule does not have, each with the reason."""

    @abstractmethod
    def most_hostile(self, n: int) -> int:
        """The largest number of hostile rows among `n` that it stands with these settings, by its published bound."""

    @abstractmethod
    def leeway(self, honest: Spread, n: int, context: Context) -> float:
        """How far outside the smallest box around the honest rows the result can lie at worst, in l2.

        It holds for every choice of at most `most_hostile(n)` rows, however long; 0: the result is in the box.

        Args:
            honest: The spread of the honest rows (with worker momentum: after it).
            n: All rows, hostile ones included.
            context: Of the round, before it.
        """

    @abstractmethod
    def combine(self, rows: Tensor, context: Context) -> Tensor:
        """The update that the rule makes of checked rows (n, P); `aggregate` is what callers use."""

    def check(self, n: int) -> None:
        """Refuse a number of rows with which the rule does not hold.

        Raises:
            ConfigError: Names the bound.
        """
        if n < 1:
            raise ConfigError(
                f"{type(self).__name__}: {n} rows to aggregate; skip a round in which no client answered."
            )

    def aggregate(self, rows: Tensor, context: Context) -> Tensor:
        """One update of many.

        Args:
            rows: (n, P), floating point: the update of each client; never written to.
            context: Of this round; the rule may write to its `memory`.

        Returns:
            (P,), of the same dtype and device.

        Raises:
            ConfigError: Too few rows (see `check`).
            DataError: Rows, weights, ids or the trusted update are of the wrong shape or hold unusable numbers; names
                the clients.
            ThreatModelError: The rule needs a trusted update and there is none.
        """
        name = type(self).__name__
        check_rows(rows, context, where=name)
        self.check(len(rows))
        if self.needs_trusted and context.trusted is None:
            raise ThreatModelError(
                f"{name} needs the server's own update, and this round has none: give the server trusted samples."
            )
        with torch.no_grad():
            made = self.combine(rows.detach(), context)
        if (made.shape, made.dtype, made.device) != (rows.shape[1:], rows.dtype, rows.device):
            raise AssertionError(f"{name} made {made.dtype} {tuple(made.shape)} of {rows.dtype} {tuple(rows.shape)}")
        if not made.isfinite().all():
            raise AssertionError(f"{name} made NaN or infinity of finite rows")
        return made


@settings
class Bounded(Aggregator, ABC):
    """A rule that is told how many hostile rows to expect, and needs n >= `times` * f + `besides` rows for f of them.

    Args:
        hostile: Hostile rows to expect, f; unset: as many as the bound allows among the rows of the round.
    """

    times: ClassVar[int]
    besides: ClassVar[int]

    hostile: Hostile | None = None

    def most_hostile(self, n: int) -> int:
        """By the bound, and no more than it was told to expect."""
        allowed = max((n - self.besides) // self.times, 0)
        return allowed if self.hostile is None else min(self.hostile, allowed)

    def check(self, n: int) -> None:
        """Refuse too few rows for the hostile ones to expect."""
        super().check(n)
        f = self.hostile or 0
        fewest = self.times * f + self.besides
        if n < fewest:
            raise ConfigError(
                f"{type(self).__name__}: {n} rows are too few for {f} hostile ones: it needs n >= {self.times}f + "
                f"{self.besides} = {fewest}; ask more clients"
                + (" or expect fewer hostile ones." if f else ", or take another rule.")
            )


def unusable(rows: Tensor) -> Tensor:
    """Which rows no rule takes, since an entry is NaN, infinite or beyond `LARGEST`: (n, P) -> (n,) bool."""
    limit = min(LARGEST, torch.finfo(rows.dtype).max)
    return ~(rows.abs() <= limit).all(1)  # a comparison with NaN is false


def check_rows(rows: Tensor, context: Context, *, where: str) -> None:
    """Refuse a round that no rule can work on.

    Args:
        rows: (n, P), floating point.
        context: Of the round.
        where: Named in the message.

    Raises:
        DataError: Rows are no matrix of floats or hold unusable entries; ids are not one a row, int64 and distinct;
            weights are not one a row, finite, >= 0 and somewhere positive; the trusted update does not fit the rows.
    """
    if rows.ndim != 2 or rows.shape[1] == 0 or not rows.is_floating_point():
        raise DataError(
            f"{where}: rows are {rows.dtype} of shape {tuple(rows.shape)}; make them a matrix of floats (client, "
            "parameter), as `stack` does."
        )
    n, width = rows.shape
    clients, weights, trusted = context.clients, context.weights, context.trusted
    if clients.shape != (n,) or clients.dtype != torch.int64:
        raise DataError(
            f"{where}: {n} rows, but client ids are {clients.dtype} of shape {tuple(clients.shape)}; give one int64 a "
            "row."
        )
    twice = [client for client, count in Counter(clients.tolist()).items() if count > 1]
    if twice:
        raise DataError(f"{where}: {_named(twice)} sent more than one row; keep one row a client.")
    bad = clients[unusable(rows).to(clients.device)].tolist()
    if bad:
        raise DataError(
            f"{where}: {_named(bad)} sent NaN, infinite or larger entries than {LARGEST:g}; leave those rows out "
            "(`unusable` finds them)."
        )
    if weights is not None:
        if weights.shape != (n,):
            raise DataError(f"{where}: {n} rows, but weights of shape {tuple(weights.shape)}; give one weight a row.")
        odd = clients[~(weights.isfinite() & (weights >= 0)).to(clients.device)].tolist()
        if odd:
            raise DataError(
                f"{where}: {_named(odd)} have a negative or non-finite weight; weights are finite and >= 0."
            )
        if n and not bool((weights > 0).any()):
            raise DataError(f"{where}: all {n} weights are zero; leave them unset to count all clients alike.")
    if trusted is not None and (trusted.shape != (width,) or bool(unusable(trusted.unsqueeze(0)))):
        raise DataError(
            f"{where}: the trusted update has shape {tuple(trusted.shape)} or holds NaN, infinite or larger entries "
            f"than {LARGEST:g}; it must be one finite row of {width}, like the clients'."
        )


def stack(updates: Sequence[Tensor], clients: Sequence[int] | None = None) -> Tensor:
    """The matrix (client, parameter) of some flat updates.

    Args:
        updates: One (P,) a client, of one length, dtype and device.
        clients: Their ids, for messages; by default their positions.

    Raises:
        DataError: There are none, or some differ from what most of them are; names those.
    """
    if not updates:
        raise DataError("no updates to stack; skip a round in which no client answered.")
    ids = range(len(updates)) if clients is None else clients
    kinds = [(tuple(update.shape), update.dtype, update.device) for update in updates]
    (usual, _), *others = Counter(kinds).most_common()
    if others or len(usual[0]) != 1:
        shape = usual[0] if len(usual[0]) == 1 else ("P",)
        odd = [
            f"{client}: {kind[1]} of shape {kind[0]} on {kind[2]}"
            for client, kind in zip(ids, kinds, strict=True)
            if kind != usual or len(kind[0]) != 1
        ]
        raise DataError(
            f"updates differ: client {'; client '.join(odd)}; the others are {usual[1]} of shape {shape} on {usual[2]}."
            " Leave those out, or flatten and convert them."
        )
    return torch.stack(list(updates))


def _named(clients: Sequence[int]) -> str:
    return f"client{'s' if len(clients) > 1 else ''} {', '.join(map(str, clients))}"
