"""What is shown while runs are made: bars with the time left, or lines where there is no terminal."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mithridate.bench.pace import Pace, about
from mithridate.bench.watcher import Watcher
from mithridate.cli.terminal import out

if TYPE_CHECKING:
    from mithridate.bench.failure import Failure
    from mithridate.bench.plan import Work
    from mithridate.bench.recipe import Cell

LONG = 600
"""Seconds; a command that takes longer says so as soon as that shows."""

ENOUGH = 5
"""Seconds of steps that an estimate of all runs rests on at least."""


class Bars(Watcher):
    """A bar for all runs and one for each that is under way; a line for every finished one.

    Without a terminal there is a line for every epoch of a burn-in, too, in place of the bars.
    """

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=out,
            transient=True,
            disable=not sys.stdout.isatty(),
        )
        self.pace: Pace | None = None
        self.processor, self.ended = "CPU", 0
        self.runs: TaskID | None = None
        self.bars: dict[str, tuple[str, TaskID]] = {}
        self.since: dict[str, float] = {}
        self.said: set[str] = set()

    def __enter__(self) -> "Bars":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def planned(self, works: Sequence["Work"], jobs: int, processor: str) -> None:
        """All checks are passed."""
        if self.runs is not None:  # those of another recipe
            self.progress.remove_task(self.runs)
        self.pace, self.processor, self.ended = Pace(works, jobs), processor, 0
        self.said.clear()
        self.runs = self.progress.add_task("runs", total=len(works), note="")

    def cell(self, cell: "Cell", number: int, of: int) -> None:
        """A run begins."""
        self._clock(cell)
        self._estimate()

    def burn_in(self, cell: "Cell", seed: int, done: int, epochs: int) -> None:
        """An epoch has ended."""
        took = self._clock(cell)
        if self.pace and seed == cell.burn_in_seed:  # else it is that of a surrogate
            self.pace.trained(cell.run_id, done, took)
            self._estimate_burn_ins()
        self._show(cell, f"burn-in, seed {seed}", done, epochs, "epochs")
        if self.progress.disable:
            left = f", {about(took * (epochs - done))} left" if took is not None and done < epochs else ""
            self._line(f"{cell.run_id}: burn-in, seed {seed}: epoch {done} of {epochs}{left}")

    def prepared(self, cell: "Cell") -> None:
        """The burn-in is there."""
        self._clock(cell)
        if self.pace:
            self.pace.stepped(cell.run_id, 0)

    def waiting(self, cell: "Cell") -> None:
        """Another command is at work on a run."""
        self._line(f"{cell.run_id}: another command is at work on it; waiting until that has ended")

    def step(self, cell: "Cell", done: int, steps: int, accuracy: float) -> None:
        """A step has ended."""
        took = self._clock(cell)
        if self.pace:
            self.pace.stepped(cell.run_id, done, took)
            if self.pace.seconds_measured >= ENOUGH:
                self._estimate()
        what = "crafting and learning" if cell.recipe.clients is None else "rounds"
        self._show(cell, what, done, steps, f"accuracy {accuracy:.1%}")

    def finished(self, cell: "Cell", summary: Mapping[str, Any], *, skipped: bool) -> None:
        """A run has ended."""
        self._gone(cell, summary if skipped else None)
        drop = summary["drop"]
        fell = "halted before the trigger" if drop is None else f"trigger step {-100 * drop:+z.1f} points"
        note = "  (kept)" if skipped else ""
        noun = "batches" if cell.recipe.clients is None else "rounds"
        self._line(
            f"{cell.run_id}: {summary['accuracy_start']:.1%} -> {summary['accuracy_before_trigger']:.1%} after "
            f"{summary['steps']} {noun}, {fell}, {summary['seconds']:.1f} s{note}{self._so_far()}"
        )
        if not skipped:
            self._estimate()

    def failed(self, cell: "Cell", failure: "Failure") -> None:
        """A run has failed."""
        self._gone(cell, None)
        self._line(f"{cell.run_id} failed: {failure.message}{self._so_far()}")

    def redone(self, cell: "Cell", reason: str) -> None:
        """A damaged run is made anew."""
        self._line(f"{cell.run_id} is made anew: {reason}")

    def _line(self, text: str) -> None:
        self.progress.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def _clock(self, cell: "Cell") -> float | None:
        """Seconds since something was last heard of a run."""
        now, before = time.monotonic(), self.since.get(cell.run_id)
        self.since[cell.run_id] = now
        return None if before is None else now - before

    def _show(self, cell: "Cell", what: str, done: int, of: int, note: str) -> None:
        if self.bars.get(cell.run_id, (what, None))[0] != what:  # the speed of one says nothing of the other
            self._remove_bar(cell)
        if cell.run_id not in self.bars:
            self.bars[cell.run_id] = what, self.progress.add_task(what, total=of, note=note)
        note = note if self.pace is None or self.pace.jobs == 1 else f"{note}  {cell.run_id}"
        self.progress.update(self.bars[cell.run_id][1], completed=done, total=of, note=note)

    def _remove_bar(self, cell: "Cell") -> None:
        if cell.run_id in self.bars:
            self.progress.remove_task(self.bars.pop(cell.run_id)[1])

    def _gone(self, cell: "Cell", summary: Mapping[str, Any] | None) -> None:
        self.ended += 1
        self.since.pop(cell.run_id, None)
        self._remove_bar(cell)
        if self.pace:
            self.pace.finished(cell.run_id, summary)
        if self.runs is not None:
            self.progress.update(self.runs, completed=self.ended)

    def _so_far(self) -> str:
        """How many runs have ended, and the time left, where no bar says so."""
        if not self.progress.disable or self.pace is None or len(self.pace.works) < 2:
            return ""
        left = self.pace.seconds_left()
        return f"  [{self.ended} of {len(self.pace.works)}{f', {about(left)} left' if left else ''}]"

    def _estimate(self) -> None:
        """Say once how long all runs will take, if that is long."""
        left = self.pace.seconds_left() if self.pace else None
        if self.pace and left and left > LONG:
            of = f"{self.pace.cells_left} of {len(self.pace.works)} runs left"
            self._say_once("runs", f"{about(left)} {self._here()}, {of}")

    def _estimate_burn_ins(self) -> None:
        left = self.pace.seconds_of_burn_ins() if self.pace else None
        if self.pace and left and left / self.pace.jobs > LONG and "runs" not in self.said:
            then = f"then {self.pace.cells_left} runs, whose time shows after their first steps"
            self._say_once("burn-ins", f"burn-in: {about(left / self.pace.jobs)} {self._here()}; {then}")

    def _here(self) -> str:
        jobs = self.pace.jobs if self.pace else 1
        return f"on this {self.processor}{f', {jobs} runs at a time' if jobs > 1 else ''}"

    def _say_once(self, what: str, text: str) -> None:
        if what not in self.said:
            self.said.add(what)
            self._line(text)
