"""Runs that are killed at every operation on a file and at random moments, and go on with `--resume`."""

import shutil
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from mithridate.report import build_report
from tools.faults import runs
from tools.faults.case import Result, UnpreparedError, drawn
from tools.faults.operations import kill_at, watch
from tools.faults.processes import forked, import_what, killed_after

LIMIT = 200
"""Seconds of one run, on a busy machine, too."""

RANDOM_SHARE = 3
"""Of so many cases, one is killed at a random moment."""


class Scene(NamedTuple):
    """What is killed.

    Args:
        recipe: Its name in `runs.RECIPES`.
        warm: Whether the burn-in is in the cache already.
        report: Whether a report is written, too, as `mithridate run` does.
    """

    recipe: str
    warm: bool
    report: bool = False


class Undisturbed(NamedTuple):
    """A run that nobody kills.

    Args:
        operations: What it does to files, in order.
        seconds: How long it takes.
        contents: What its store holds.
        files: Names in its folder, but for those of the burn-in cache's locks.
    """

    operations: list[str]
    seconds: float
    contents: dict[str, Any]
    files: list[str]


SCENES = [*(Scene(recipe, warm) for recipe in runs.RECIPES for warm in (False, True)), Scene("detectors", True, True)]


@dataclass
class Kills:
    """Kills, by number: two in three at an operation, each once before any twice, and one at a random moment."""

    seed: int
    shared: Path
    full: int = 240
    undisturbed: dict[Scene, Undisturbed] = field(default_factory=dict)
    places: list[tuple[Scene, int]] = field(default_factory=list)

    def prepare(self) -> None:
        """Run every scene once, undisturbed, and list its operations."""
        for scene in SCENES:
            folder = self.shared / _name(scene)
            self._furnish(scene, folder)
            if not scene.warm or scene.report:
                import_what(partial(_carried_out, scene, folder / "imports", resume=False), limit=LIMIT)
                shutil.rmtree(folder / "imports")
            told, died = forked(partial(_recorded, scene, folder), limit=LIMIT)
            if died:
                raise UnpreparedError(f"an undisturbed run of {_name(scene)}: {died}")
            operations, seconds, contents = told
            self.undisturbed[scene] = Undisturbed(operations, seconds, contents, _files(folder))
        self.places = [(scene, i) for scene, run in self.undisturbed.items() for i in range(len(run.operations))]
        drawn("kill places", self.seed, 0).shuffle(self.places)
        self.full = max(self.full, len(self.places) * RANDOM_SHARE // (RANDOM_SHARE - 1) + RANDOM_SHARE)

    def case(self, number: int, folder: Path) -> Result:
        """Kill a run, look at what is left, go on."""
        rng = drawn("kills", self.seed, number)
        row, place = divmod(number, RANDOM_SHARE)
        if place == RANDOM_SHARE - 1:
            scene = rng.choice(SCENES)
            what = self._killed_some_time(scene, folder, rng)
        else:
            scene, operation = self.places[(row * (RANDOM_SHARE - 1) + place) % len(self.places)]
            self._furnish(scene, folder)
            what = self._killed_at(scene, folder, operation, resume=False)
        what = f"{_name(scene)}: {what}"
        if fault := self._fault_meanwhile(scene, folder):
            return Result("silent", what, fault)
        if rng.random() < 0.25:
            again = self._killed_at(scene, folder, rng.randrange(len(self.undisturbed[scene].operations)), resume=True)
            what = f"{what}; resumed: {again}"
        told, died = forked(lambda: _finished(scene, folder), limit=LIMIT)
        return self._judged(scene, folder, what, told, died)

    def _furnish(self, scene: Scene, folder: Path) -> None:
        """A folder to run in, with a burn-in where the scene has one."""
        (folder / "cache").mkdir(parents=True)
        if scene.warm:
            shutil.copytree(
                self.shared / _name(Scene(scene.recipe, warm=False)) / "cache", folder / "cache", dirs_exist_ok=True
            )

    def _killed_at(self, scene: Scene, folder: Path, operation: int, *, resume: bool) -> str:
        def work() -> None:
            kill_at(folder, operation)
            _carried_out(scene, folder, resume=resume)

        _, died = forked(work, limit=LIMIT)
        operations = self.undisturbed[scene].operations
        name = operations[operation] if not resume else "..."
        return f"{died or 'not killed'} at operation {operation} ({name})"

    def _killed_some_time(self, scene: Scene, folder: Path, rng: Random) -> str:
        self._furnish(scene, folder)
        share = rng.random()
        seconds = share * self.undisturbed[scene].seconds
        died = killed_after(lambda: _carried_out(scene, folder, resume=False), seconds, limit=LIMIT)
        return f"{died or 'not killed'} after {share:.0%} of the time"

    def _fault_meanwhile(self, scene: Scene, folder: Path) -> str:
        """What a report on the killed run says that is not so."""
        told, died = forked(lambda: runs.contents(folder / "runs"), limit=LIMIT)
        if died:
            return f"a report on the killed run: {died}"
        right = self.undisturbed[scene].contents["timeless"]
        wrong = [run for run, digest in told.get("timeless", {}).items() if right.get(run) != digest]
        return f"a report on the killed run would show other rows of {', '.join(wrong)}" if wrong else ""

    def _judged(self, scene: Scene, folder: Path, what: str, told: Any, died: str) -> Result:  # noqa: ANN401  (JSON)
        right = self.undisturbed[scene]
        if died:
            return Result("exception", what, f"resuming: {died}")
        if "refused" in told:
            return Result("exception", what, f"a dead end: {told['refused']}")
        for key in ("timeless", "reported"):
            if told[key] != right.contents[key]:
                return Result("silent", what, f"the resumed run has other rows ({key})")
        if left := sorted(set(_files(folder)) ^ set(right.files)):
            return Result("silent", what, f"files that are left over or missing: {', '.join(left[:4])}")
        return Result("redone", what)


def _name(scene: Scene) -> str:
    return f"{scene.recipe}, {'warm' if scene.warm else 'cold'} cache{', report' if scene.report else ''}"


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".lock"))


def _carried_out(scene: Scene, folder: Path, *, resume: bool) -> dict[str, Any]:
    """What `mithridate run` does: the grid, and the report where it is looked at."""
    told = runs.start(runs.RECIPES[scene.recipe], folder / "runs", folder / "cache", resume=resume)
    if scene.report and "refused" not in told:
        build_report(folder / "runs", folder / "report")
    return told


def _finished(scene: Scene, folder: Path) -> dict[str, Any]:
    told = _carried_out(scene, folder, resume=True)
    return told if "refused" in told else runs.contents(folder / "runs")


def _recorded(scene: Scene, folder: Path) -> tuple[list[str], float, dict[str, Any]]:
    operations: list[str] = []
    watch(folder, operations.append)
    began = time.monotonic()
    told = _carried_out(scene, folder, resume=False)
    seconds = time.monotonic() - began
    if "refused" in told:
        raise UnpreparedError(told["refused"])
    return operations[:], seconds, runs.contents(folder / "runs")


def make(seed: int, shared: Path) -> Kills:
    """The kind, for a seed, with what its cases share in a folder."""
    return Kills(seed, shared)
