"""What an aggregator is: the updates of one round's clients in, one update out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from mithridate.core.errors import ConfigError, ThreatModelError
from mithridate.core.usable_rows import check_rows
from mithridate.core.view import Memory
from mithridate.maths.rows import lengths, squared_distances

Property = Literal["translation", "scale", "consensus"]
"""`translation`: all rows moved by v move the result by v. `scale`: all rows (and the trusted update) times c > 0 give
the result times c. `consensus`: identical rows give that row."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a rule may look at besides the rows of this round.

    Args:
        clients: Whose rows they are: (n,) int64, each id once.
        rng: On the CPU; drawn from by rules that draw.
        weights: (n,), finite, >= 0, not all zero: how much each row counts, for instance by its client's number of
            samples. The caller caps them, since a client can claim any number. None: all count alike.
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
        diameter: The largest distance between two rows.
        widths: Largest minus smallest entry of each column (P,): the sides of the smallest box that holds all rows.
        length: The length of the longest row.
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
        """An upper bound on the spread after each row has moved by at most `by`."""
        return Spread(self.diameter + 2 * by, self.widths + 2 * by, self.length + by)


class NotFiniteError(AssertionError):
    """A rule made NaN or infinity of finite rows: a defect in it, which a server need not stop for."""


class Aggregator(ABC):
    """Makes one update of many, some of which may be hostile. Override `combine`, `most_hostile` and `worst_deviation`.

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
        """How many of `n` rows may be hostile at most, with these settings, by the rule's published bound."""

    @abstractmethod
    def worst_deviation(self, honest: Spread, n: int, context: Context) -> float:
        """How far outside the smallest box around the honest rows the result can lie at worst, in l2.

        The bound holds for every choice of at most `most_hostile(n)` hostile rows, however long. 0: the result always
        lies in the box.

        Args:
            honest: The spread of the honest rows (with worker momentum: after it).
            n: All rows, hostile ones included.
            context: The round's context, before the rule has seen its rows.
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
            context: The round's context; the rule may write to its `memory`.

        Returns:
            (P,), of the same dtype and device.

        Raises:
            ConfigError: Too few rows (see `check`).
            DataError: Rows, weights, ids or the trusted update are of the wrong shape or hold unusable numbers; names
                the clients.
            ThreatModelError: The rule needs a trusted update and there is none.
            NotFiniteError: The rule made NaN or infinity of finite rows.
        """
        name = type(self).__name__
        check_rows(rows, clients=context.clients, weights=context.weights, trusted=context.trusted, where=name)
        self.check(len(rows))
        if self.needs_trusted and context.trusted is None:
            raise ThreatModelError(
                f"{name} needs the server's own update, and this round has none: give the server trusted samples."
            )
        with torch.no_grad():
            update = self.combine(rows.detach(), context)
        if (update.shape, update.dtype, update.device) != (rows.shape[1:], rows.dtype, rows.device):
            kinds = f"{update.dtype} {tuple(update.shape)} of {rows.dtype} {tuple(rows.shape)}"
            raise AssertionError(f"{name} made {kinds}")
        if not update.isfinite().all():
            raise NotFiniteError(f"{name} made NaN or infinity of finite rows")
        return update
