"""Run a recipe's grid: check all of it, run every cell, in this process or in others, and say what failed."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict

from mithridate.bench import store
from mithridate.bench.failure import Failure
from mithridate.bench.place import Place, Standing
from mithridate.bench.plan import Plan, Work, write_plan
from mithridate.bench.prepare import choose_device
from mithridate.bench.recipe import Cell, Recipe
from mithridate.bench.running import deterministic
from mithridate.bench.tasks import Task
from mithridate.bench.watcher import Watcher
from mithridate.bench.workplace import Ended, Terms, Workplace, burn_in_shared, prepared_key
from mithridate.core.errors import ConfigError, StoreError
from mithridate.core.files import cache_directory, path_of

Engine = Literal["local", "ray"]
"""Where cells are run: on this machine, or on a Ray cluster."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


@dataclass(frozen=True)
class Grid:
    """The result of running a recipe.

    Args:
        directories: One a cell, in the order of the recipe.
        ran: Cells that were run now to their end, wholly or from where they had been killed.
        skipped: Cells that were finished already.
        failed: Why other cells were not finished, by run id; empty if all were.
    """

    directories: Sequence[Path]
    ran: int
    skipped: int
    failed: Mapping[str, Failure] = field(default_factory=dict)

    @property
    def failures(self) -> dict[Path, Failure]:
        """Why cells were not finished, by directory."""
        return {path: self.failed[path.name] for path in self.directories if path.name in self.failed}


class RunOptions(TypedDict, total=False):
    """What callers of `run_recipe` hand on to it; it says what each is."""

    device: str
    data_root: str | Path | None
    cache: str | Path | None
    jobs: int | None
    engine: Engine


def run_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    data_root: str | Path | None = None,
    cache: str | Path | None = None,
    watcher: Watcher | None = None,
    jobs: int | None = 1,
    engine: Engine = "local",
    only: Callable[[Cell], bool] | None = None,
) -> Grid:
    """Run every cell of a recipe and write each to `out/<run id>/`. A cell that fails is told of in `Grid.failed`.

    The same cells have the same bits with every engine and number of jobs, if each process has the same number of
    threads: they get that of `torch.get_num_threads()` here.

    Args:
        recipe: What to run.
        out: Directory of the store; made if missing. With `ray`, every machine sees it by this path.
        device: `auto`, `cpu` or `cuda`.
        resume: Skip finished cells, continue killed ones and try failed ones again. Without it a cell's directory
            must not exist.
        data_root: A local mirror of the hub's image sets; see `data.load_images`.
        cache: Directory for decoded images and burn-ins; the user's cache by default.
        watcher: Follows progress.
        jobs: Cells that are run at a time, >= 1. With more than one each has a process of its own, and a script that
            calls this needs the guard `if __name__ == "__main__"`. None, with `ray`: as many as the cluster takes.
        engine: Where.
        only: Which cells are run; None: all. A variant that has none of them is not even checked.

    Raises:
        UserError: Anything in the recipe, the data, the device or the store that cannot work; found before anything is
            written, wherever it can be found then. Later: the file system refuses, or the engine itself fails.
    """
    watcher, place = watcher or Watcher(), _place_of(out)
    if engine == "ray":
        from mithridate.bench.ray import installed_ray, run_on_ray

        installed_ray()
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs = {jobs}: give at least 1.")
    where = choose_device(device).type
    terms = Terms(place, where, cache_directory(cache).absolute(), data_root, resume)
    workplace = Workplace(terms, watcher)
    places: list[tuple[Place, bool]] = []
    for variant in recipe.each():  # all are checked before the first is run
        wanted = {cell.run_id for cell in variant.cells() if only is None or only(cell)}
        placed = workplace.places(variant) if wanted else []
        places += [(p, p.standing() is Standing.FINISHED) for p in placed if p.cell.run_id in wanted]
    if not places and only is not None:
        raise ConfigError("none of the recipe's runs is among those that are chosen.")
    if not places:
        raise ConfigError("the recipe's grid has no cell: it names no attack, no defence or no seed.")
    works = [_work(place.cell) for place, _ in places]
    write_plan(place, Plan(works, jobs or 1))
    watcher.planned(works, jobs or 1, "GPU" if where == "cuda" else "CPU")
    heard = _Heard(watcher, places)
    tasks = [_task(place) for place, finished in places if not heard.skips(place, finished=finished)]
    if engine == "ray":
        del workplace  # and with it the samples in memory
        run_on_ray(tasks, terms, jobs, heard)
    elif jobs is None or jobs > 1:
        from mithridate.bench.local import run_in_processes

        del workplace
        run_in_processes(tasks, terms, jobs or 1, heard)
    else:
        _run_here(tasks, {place.cell.run_id: place.cell for place, _ in places}, workplace, heard)
    return heard.grid(path_of(out))


def _run_here(tasks: Sequence[Task], cells: Mapping[str, Cell], workplace: Workplace, heard: "_Heard") -> None:
    """One after the other, in this process and in the order of the recipe."""
    busy: list[Task] = []
    with deterministic():
        for left, patient in ((tasks, False), (busy, True)):
            for task in left:
                heard.begun(task)
                cell = partial(cells.__getitem__, task.run)
                ended = workplace.run(task.run, cell, task.origin, patient=patient)
                if ended.busy and not patient:
                    busy.append(task)  # perhaps the other process has finished it when the others are done
                else:
                    heard.ended(task, ended)


class _Heard:
    """Tells the watcher what is heard of cells, and keeps how they ended.

    Args:
        watcher: Whom to tell.
        places: Those of all cells, in order, each with whether it was finished.
    """

    def __init__(self, watcher: Watcher, places: Sequence[tuple[Place, bool]]) -> None:
        self.watcher = watcher
        self.places = {place.cell.run_id: place for place, _ in places}
        self.numbers = {run: number for number, run in enumerate(self.places)}
        self.ran, self.skipped = 0, 0
        self.failed: dict[str, Failure] = {}

    def skips(self, place: Place, *, finished: bool) -> bool:
        """Whether a cell needs not be run; it is then told of."""
        if finished:
            store.tidy(place.directory)
            self._ended(place.cell, Ended(place.summary(), skipped=True))
        return finished

    def begun(self, task: Task) -> None:
        """A process has got it."""
        self.watcher.cell(self._cell(task), self.numbers[task.run], len(self.places))

    def event(self, task: Task, name: str, values: Sequence[Any]) -> None:
        """A method of `Watcher`, with what comes after the cell."""
        getattr(self.watcher, name)(self._cell(task), *values)

    def ended(self, task: Task, ended: Ended) -> None:
        """It has ended."""
        self._ended(self._cell(task), ended)

    def grid(self, out: Path) -> Grid:
        """How all ended in a store."""
        failed = {run: self.failed[run] for run in self.places if run in self.failed}
        return Grid([out / run for run in self.places], self.ran, self.skipped, failed)

    def _cell(self, task: Task) -> Cell:
        return self.places[task.run].cell

    def _ended(self, cell: Cell, ended: Ended) -> None:
        if ended.failure is not None:
            self.failed[cell.run_id] = ended.failure
            self.watcher.failed(cell, ended.failure)
        elif ended.summary is not None:
            self.skipped += ended.skipped
            self.ran += not ended.skipped
            self.watcher.finished(cell, ended.summary, skipped=ended.skipped)


def _task(place: Place) -> Task:
    cell = place.cell
    return Task(cell.run_id, cell.config(), place.origin, prepared_key(cell), burn_in_shared(cell))


def _work(cell: Cell) -> Work:
    burn_in = cell.recipe.burn_in
    return Work(
        cell.run_id,
        cell.attack.label,
        cell.defence.label,
        cell.recipe.run.steps + 1,
        0 if burn_in.checkpoint else burn_in.epochs,
        burn_in_shared(cell),
    )


def _place_of(given: str | Path) -> Path:
    """Where the store is, absolute."""
    if _URL.match(str(given)):
        raise StoreError(
            f"{given} is a URL, and a store is a directory: runs are locked and written in one move, which object "
            "stores do not offer. Give a path, on a file system that all machines share if there are several."
        )
    out = path_of(given).absolute()
    nearest = next(path for path in (out, *out.parents) if path.exists())
    if not nearest.is_dir():
        raise StoreError(f"{nearest} is not a directory; choose another --out.")
    return out
