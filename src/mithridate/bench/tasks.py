"""The cells of a grid as they are handed to processes: which one next, and what is heard of it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from mithridate.bench.origin import Origin, settings_key
from mithridate.bench.recipe import Cell, Table, make_recipe
from mithridate.bench.watcher import Watcher
from mithridate.bench.workplace import Ended, Workplace
from mithridate.core.errors import ConfigError


@dataclass(frozen=True)
class Task:
    """A cell in plain values, which any process can make it from.

    Args:
        run: Its id.
        config: Its resolved settings.
        origin: What it is to be made from.
        prepared: The same for cells that a process prepares once.
        burn_in: The same for cells that surely share a burn-in.
        patient: Whether to wait where another process is at work on it.
    """

    run: str
    config: Table
    origin: Origin
    prepared: str
    burn_in: str
    patient: bool = False

    def carried_out(self, workplace: Workplace) -> Ended:
        """Run the cell."""
        return workplace.run(self.run, self._cell, self.origin, patient=self.patient)

    def _cell(self) -> Cell:
        (cell,) = make_recipe(self.config).cells()
        if settings_key(cell.config()) != self.origin.settings or cell.run_id != self.run:
            raise ConfigError(
                f"{self.run}: its settings, written down and read again, are others; run it with --jobs 1, and report "
                "this."
            )
        return cell


class Hears(Protocol):
    """What whoever hands out tasks is told of them."""

    def begun(self, task: Task) -> None:
        """A process has got it."""

    def event(self, task: Task, name: str, values: Sequence[Any]) -> None:
        """A method of `Watcher`, with what comes after the cell."""

    def ended(self, task: Task, ended: Ended) -> None:
        """It has ended."""


class Sender(Watcher):
    """Passes on what it sees to another process.

    Args:
        send: Takes the name of a method of `Watcher`, and the values that come after the cell.
    """

    def __init__(self, send: Callable[[str, tuple[Any, ...]], None]) -> None:
        self._send = send

    def burn_in(self, cell: Cell, seed: int, done: int, epochs: int) -> None:
        """An epoch of a burn-in has ended."""
        self._send("burn_in", (seed, done, epochs))

    def prepared(self, cell: Cell) -> None:
        """What the cell starts from is there."""
        self._send("prepared", ())

    def waiting(self, cell: Cell) -> None:
        """Another process is at work on the cell."""
        self._send("waiting", ())

    def step(self, cell: Cell, done: int, steps: int, accuracy: float) -> None:
        """A step has ended."""
        self._send("step", (done, steps, accuracy))

    def redone(self, cell: Cell, reason: str) -> None:
        """A damaged cell is made anew."""
        self._send("redone", (reason,))


@dataclass
class Queue:
    """Tasks that nobody has yet. No two processes are given cells of one burn-in before that is trained.

    Args:
        tasks: In the order of the recipe.
    """

    tasks: Iterable[Task]
    _waiting: list[Task] = field(init=False)
    _training: dict[str, str] = field(init=False, default_factory=dict)
    _trained: set[str] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self._waiting = list(self.tasks)

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, last: Task | None = None) -> Task | None:
        """The next task; None if there is none, or if all wait for a burn-in that another process trains.

        Args:
            last: What the process had before, and still has in memory.
        """
        best = min(self._waiting, key=lambda task: self._rank(task, last), default=None)  # the first of equals
        if best is None or best.burn_in in self._training:
            return None
        self._waiting.remove(best)
        if best.burn_in not in self._trained:
            self._training[best.burn_in] = best.run
        return best

    def _rank(self, task: Task, last: Task | None) -> tuple[bool, bool, bool, bool]:
        return (
            task.burn_in in self._training,
            task.patient,
            last is None or task.prepared != last.prepared,
            task.burn_in in self._trained,  # burn-ins first, so that no process has to wait for them at the end
        )

    def trained(self, task: Task) -> None:
        """The burn-in of a task is there."""
        self._training.pop(task.burn_in, None)
        self._trained.add(task.burn_in)

    def over(self, task: Task) -> None:
        """A task has ended, perhaps before its burn-in was there: another one may train that."""
        if self._training.get(task.burn_in) == task.run:
            del self._training[task.burn_in]

    def put_back(self, task: Task) -> None:
        """Try a task again after all others, and then wait for whoever is at work on it."""
        self._waiting.append(replace(task, patient=True))
