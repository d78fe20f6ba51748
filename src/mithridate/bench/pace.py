"""How long the rest of a grid takes, by what its cells have taken so far. Imports no torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mithridate.bench.plan import Work


@dataclass
class _Mean:
    seconds: float = 0.0
    count: int = 0

    def add(self, seconds: float, count: int = 1) -> None:
        self.seconds += seconds
        self.count += count

    @property
    def value(self) -> float:
        return self.seconds / self.count


@dataclass
class Pace:
    """Keeps what has been done of a grid and how long it took; what is left is taken to go at the same pace.

    A step of a cell is taken to last as long as one of the same attack and defence did; else of the same attack, else
    of any. Burn-ins that no cell has begun with are counted, though the cache may hold them.

    Args:
        works: The cells.
        jobs: Cells at a time, >= 1.
    """

    works: Sequence[Work]
    jobs: int = 1
    _steps: dict[str, int] = field(init=False)
    _epochs: dict[str, int] = field(init=False)
    _by_kind: dict[tuple[str, ...], _Mean] = field(init=False, default_factory=dict)
    _epoch: _Mean = field(init=False, default_factory=_Mean)

    def __post_init__(self) -> None:
        self._of = {work.run: work for work in self.works}
        self._steps = {work.run: work.steps for work in self.works}
        self._epochs = {work.burn_in: work.epochs for work in self.works}

    def trained(self, run: str, done: int, seconds: float | None = None) -> None:
        """Epochs of the burn-in of a cell are done.

        Args:
            run: The cell's id.
            done: How many.
            seconds: How long the last one took, if that is known.
        """
        work = self._of[run]
        self._epochs[work.burn_in] = min(self._epochs[work.burn_in], max(0, work.epochs - done))
        if seconds is not None:
            self._epoch.add(seconds)

    def stepped(self, run: str, done: int, seconds: float | None = None) -> None:
        """Steps of a cell are done, and so its burn-in is.

        Args:
            run: The cell's id.
            done: How many.
            seconds: How long the last one took, if that is known.
        """
        work = self._of[run]
        self._epochs[work.burn_in] = 0
        self._steps[run] = max(0, work.steps - done)
        if seconds is not None:
            self._measured(work, seconds, 1)

    def finished(self, run: str, summary: Mapping[str, Any] | None = None) -> None:
        """A cell needs no more time.

        Args:
            run: Its id.
            summary: Its outcome, if its times are to be counted.
        """
        work = self._of[run]
        self._steps[run] = 0
        if summary is None:
            return
        self._epochs[work.burn_in] = 0
        self._measured(work, summary["seconds"], summary["steps"] + 1)
        if work.epochs and summary["burn_in_seconds"]:
            self._epoch.add(summary["burn_in_seconds"], work.epochs)

    def _measured(self, work: Work, seconds: float, steps: int) -> None:
        for kind in _kinds(work):
            self._by_kind.setdefault(kind, _Mean()).add(seconds, steps)

    @property
    def cells_left(self) -> int:
        """Cells that need time yet."""
        return sum(left > 0 for left in self._steps.values())

    @property
    def seconds_measured(self) -> float:
        """How long all steps took that the estimate rests on."""
        return self._by_kind[()].seconds if () in self._by_kind else 0.0

    def seconds_of_burn_ins(self) -> float | None:
        """How long the burn-ins take that are left, one after the other; None if that is not known."""
        left = sum(self._epochs[burn_in] for burn_in in {w.burn_in for w in self.works if self._steps[w.run]})
        return left * self._epoch.value if self._epoch.count else 0.0 if not left else None

    def seconds_left(self) -> float | None:
        """How long the rest takes, in seconds; None if no step has been measured yet."""
        if not self.cells_left:
            return 0.0
        if () not in self._by_kind:
            return None
        cells = [left * self._a_step(self._of[run]) for run, left in self._steps.items() if left]
        burn_ins = self.seconds_of_burn_ins() or 0.0  # those that are not known are not counted
        return max((sum(cells) + burn_ins) / min(self.jobs, len(cells)), *cells)

    def _a_step(self, work: Work) -> float:
        return next(self._by_kind[kind].value for kind in _kinds(work) if kind in self._by_kind)


def _kinds(work: Work) -> Iterable[tuple[str, ...]]:
    """Of which cells' steps it is like the steps of a cell, the nearest first."""
    return (work.attack, work.defence), (work.attack,), ()


def about(seconds: float) -> str:
    """A time for people.

    >>> [about(s) for s in (20, 95, 3000, 9000, 3e5)]
    ['under a minute', 'about 2 min', 'about 50 min', 'about 2.5 h', 'about 3.5 days']
    """
    minutes = seconds / 60
    if minutes < 1:
        return "under a minute"
    if minutes < 90:
        return f"about {minutes:.0f} min"
    hours = minutes / 60
    if hours < 48:
        return f"about {hours:.1f} h" if hours < 10 else f"about {hours:.0f} h"
    return f"about {hours / 24:.1f} days"
