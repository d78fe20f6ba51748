"""How far a store is: which of its runs have finished, failed, begun or wait, and how long the rest may take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mithridate.bench import store
from mithridate.bench.failure import read_failure
from mithridate.bench.pace import Pace
from mithridate.bench.plan import Plan, read_plan
from mithridate.core.errors import StoreError, said
from mithridate.core.files import path_of

State = Literal["finished", "failed", "unfinished", "waiting"]


@dataclass(frozen=True)
class CellStatus:
    """How far a run is.

    Args:
        run: Its id.
        state: `finished`; `failed`, and not tried again since; `unfinished`: begun, at work or killed; `waiting`.
        step: Whole steps that are kept of it.
        steps: Steps at most, the trigger included; None if the store does not say.
        seconds: How long a finished one took.
        reason: Why it failed.
    """

    run: str
    state: State
    step: int = 0
    steps: int | None = None
    seconds: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class GridStatus:
    """How far a store is.

    Args:
        cells: Those that are planned, in the order of the recipe, then others that it holds.
        jobs: Cells that the last command ran at a time.
        seconds_left: How long the rest takes if it is run like that; None if no run has finished.
    """

    cells: Sequence[CellStatus]
    jobs: int
    seconds_left: float | None

    def count(self, state: State) -> int:
        """How many runs are in a state."""
        return sum(cell.state == state for cell in self.cells)


def status(directory: str | Path) -> GridStatus:
    """How far a store is; files of runs are not checked, and nothing is locked, whoever is at work there.

    Args:
        directory: The `--out` of a run.

    Raises:
        StoreError: It is no store, or its `grid.json` or the summary of a run is damaged.
    """
    out = path_of(directory)
    plan = read_plan(out) if out.is_dir() else None
    begun = [path.name for path in sorted(out.glob("*/")) if store.begun(path)] if out.is_dir() else []
    if plan is None and not begun:
        raise StoreError(f"{out} is no store; give the --out directory of `mithridate run`.")
    plan = plan or Plan([])
    pace = Pace(plan.works, plan.jobs)
    cells = [_status(out / work.run, work.steps, pace) for work in plan.works]
    cells += [_status(out / name, None, None) for name in begun if name not in {work.run for work in plan.works}]
    return GridStatus(cells, plan.jobs, pace.seconds_left())


def _status(path: Path, steps: int | None, pace: Pace | None) -> CellStatus:
    if store.finished(path):
        summary = _summary(path)
        if pace:
            pace.finished(path.name, summary)
        return CellStatus(path.name, "finished", summary["steps"] + 1, steps, summary["seconds"])
    done = _steps_kept(path)
    if pace and store.holds_run(path):  # its burn-in is there
        pace.stepped(path.name, done)
    try:
        failure = read_failure(path)
    except StoreError as error:
        return CellStatus(path.name, "failed", done, steps, reason=str(error))
    if failure is not None:
        return CellStatus(path.name, "failed", done, steps, reason=failure.message)
    return CellStatus(path.name, "unfinished" if store.holds_run(path) else "waiting", done, steps)


def _summary(path: Path) -> Mapping[str, Any]:
    try:
        summary = store.read_summary(path)
        return {key: float(summary[key]) for key in ("seconds", "burn_in_seconds")} | {"steps": int(summary["steps"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StoreError(
            f"{path / store.SUMMARY} is damaged ({type(error).__name__}: {said(error)}); make the run anew by the "
            "command that made it with --resume."
        ) from error


def _steps_kept(path: Path) -> int:
    """By the journal, whose first line says of which run it is, and whose second one is the state before any step."""
    try:
        return max(0, (path / store.JOURNAL).read_bytes().count(b"\n") - 2)
    except OSError:
        return 0
