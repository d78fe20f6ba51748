"""What a caller of the engine may follow. Imports no torch, so the command line starts fast."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mithridate.bench.failure import Failure
    from mithridate.bench.plan import Work
    from mithridate.bench.recipe import Cell


class Watcher:
    """Override what you want to see; every method does nothing here.

    Several cells may be under way at a time, each in a process of its own; all methods are called in the caller's.
    """

    def planned(self, works: Sequence["Work"], jobs: int, processor: str) -> None:
        """All checks are passed, and cells are about to be run, `jobs` at a time, on a `CPU` or `GPU` each."""

    def cell(self, cell: "Cell", number: int, of: int) -> None:
        """A cell begins: the `number`-th of the recipe, from 0."""

    def burn_in(self, cell: "Cell", seed: int, done: int, epochs: int) -> None:
        """An epoch of a burn-in has ended, of the cell's model or of its surrogate, which has another seed."""

    def prepared(self, cell: "Cell") -> None:
        """What the cell starts from is there: the burn-in is in the cache."""

    def waiting(self, cell: "Cell") -> None:
        """Another process is at work on the cell; this one waits until that has ended, and has nothing else to do."""

    def step(self, cell: "Cell", done: int, steps: int, accuracy: float) -> None:
        """A step of the accumulative phase has ended; `accuracy` is the newest that was measured."""

    def redone(self, cell: "Cell", reason: str) -> None:
        """A cell whose files are damaged is made anew."""

    def finished(self, cell: "Cell", summary: Mapping[str, Any], *, skipped: bool) -> None:
        """A cell has ended, or was found finished."""

    def failed(self, cell: "Cell", failure: "Failure") -> None:
        """A cell has failed; the others go on."""
