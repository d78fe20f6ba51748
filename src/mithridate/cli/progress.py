"""What is shown while runs are made: bars, and a line for every run that has ended."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mithridate.bench.watcher import Watcher
from mithridate.cli.terminal import out

if TYPE_CHECKING:
    from mithridate.bench.failure import Failure
    from mithridate.bench.recipe import Cell


class Bars(Watcher):
    """Progress bars for a grid; a line for every finished run, which also serves where there is no terminal."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=out,
            transient=True,
            disable=not sys.stdout.isatty(),
        )
        self.runs: TaskID | None = None
        self.now: TaskID | None = None

    def __enter__(self) -> "Bars":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def cell(self, cell: "Cell", number: int, of: int) -> None:
        """A new run begins."""
        if self.runs is None:
            self.runs = self.progress.add_task("runs", total=of, note="")
        self.progress.update(self.runs, completed=number, note=cell.run_id)

    def burn_in(self, cell: "Cell", seed: int, done: int, epochs: int) -> None:
        """An epoch has ended."""
        self._show(f"burn-in, seed {seed}", done, epochs, "epochs")

    def step(self, cell: "Cell", done: int, steps: int, accuracy: float) -> None:
        """A step has ended."""
        self._show("stream", done, steps, f"accuracy {accuracy:.1%}")

    def finished(self, cell: "Cell", summary: Mapping[str, Any], *, skipped: bool) -> None:
        """A run has ended."""
        drop = summary["drop"]
        fell = "halted before the trigger" if drop is None else f"trigger step {-100 * drop:+z.1f} points"
        note = "  (kept)" if skipped else ""
        noun = "batches" if cell.recipe.clients is None else "rounds"
        self.progress.console.print(
            f"{cell.run_id}: {summary['accuracy_start']:.1%} -> {summary['accuracy_before_trigger']:.1%} after "
            f"{summary['steps']} {noun}, {fell}, {summary['seconds']:.1f} s{note}",
            soft_wrap=True,
            highlight=False,
        )
        self._gone()

    def _gone(self) -> None:
        if self.now is not None:
            self.progress.remove_task(self.now)
            self.now = None

    def failed(self, cell: "Cell", failure: "Failure") -> None:
        """A run has failed."""
        self.progress.console.print(f"{cell.run_id} failed: {failure.message}", soft_wrap=True, markup=False)
        self._gone()

    def redone(self, cell: "Cell", reason: str) -> None:
        """A damaged run is made anew."""
        self.progress.console.print(f"{cell.run_id} is made anew: {reason}", soft_wrap=True, markup=False)

    def _show(self, what: str, done: int, of: int, note: str) -> None:
        if self.now is None:
            self.now = self.progress.add_task(what, total=of, note=note)
        self.progress.update(self.now, description=what, completed=done, total=of, note=note)
