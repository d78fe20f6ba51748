"""What a caller of the engine may follow. Imports no torch, so the command line starts fast."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mithridate.bench.recipe import Cell


class Watcher:
    """Override what you want to see; every method does nothing here."""

    def burn_in(self, seed: int, done: int, epochs: int) -> None:
        """An epoch of a burn-in has ended."""

    def cell(self, cell: "Cell", number: int, of: int) -> None:
        """A cell begins: the `number`-th, from 0."""

    def step(self, cell: "Cell", done: int, steps: int, accuracy: float) -> None:
        """A step of the accumulative phase has ended; `accuracy` is the newest that was measured."""

    def redone(self, cell: "Cell", reason: str) -> None:
        """A cell whose files are damaged is made anew."""

    def finished(self, cell: "Cell", summary: Mapping[str, Any], *, skipped: bool) -> None:
        """A cell has ended, or was found finished."""
