"""Grids of 12 runs, in one process or two, that are killed at random moments and go on until they are whole."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from mithridate.bench import store
from mithridate.bench.status import status
from mithridate.core.errors import UserError
from tests.recipes import ACCUMULATIVE, tiny_text
from tools.faults import runs
from tools.faults.case import Result, UnpreparedError, drawn
from tools.faults.processes import forked, import_what

LIMIT = 250
"""Seconds of a start, on a busy machine, too."""

KILLS = 3
"""At most, of one grid."""

RECIPE = tiny_text(
    f'[[attack]]\nname = "noise"\n{ACCUMULATIVE}[[defence]]\nname = "none"\n[[defence]]\nname = "clip"\n',
    "run.seeds=[0, 1, 2]",
)
RUNS = 12

START = """
import sys, tomllib
from pathlib import Path
from mithridate.bench.engine import run_recipe
from mithridate.bench.recipe import make_recipe
if __name__ == "__main__":
    import torch
    torch.set_num_threads(1)
    recipe, out, cache, jobs = sys.argv[1:]
    grid = run_recipe(make_recipe(tomllib.loads(recipe)), out, device="cpu", cache=cache, resume=True, jobs=int(jobs))
    sys.exit(bool(grid.failed))
"""


@dataclass
class Grids:
    """Grids, by number; every other one has two processes."""

    seed: int
    shared: Path
    full: int = 20
    seconds: dict[int, float] = field(default_factory=dict)
    right: dict[str, Any] = field(default_factory=dict)

    def prepare(self) -> None:
        """Make the grid once with each number of processes, and compare."""
        for jobs in (1, 2):
            folder = self.shared / str(jobs)
            folder.mkdir()
            began = time.monotonic()
            code = self._start(folder, jobs).wait(LIMIT)
            self.seconds[jobs] = time.monotonic() - began
            if code:
                raise UnpreparedError(f"an undisturbed grid with --jobs {jobs}: exit code {code}")
            told = import_what(partial(runs.contents, folder / "runs"), limit=LIMIT)
            if self.right and told["timeless"] != self.right["timeless"]:
                raise UnpreparedError("an undisturbed grid with --jobs 2 has other rows than with --jobs 1")
            self.right = {key: told[key] for key in ("timeless", "reported")}

    def case(self, number: int, folder: Path) -> Result:
        """Kill a grid, look at what is left, go on, perhaps kill it again."""
        rng, jobs = drawn("grids", self.seed, number), 1 + number % 2
        moments: list[str] = []
        for _ in range(rng.randint(1, KILLS)):
            share = rng.random()
            what = self._killed(folder, jobs, share * self.seconds[jobs], rng)
            moments.append(f"{what} after {share:.0%} of the time")
            if fault := self._fault_meanwhile(folder):
                return Result("silent", f"{jobs} processes: {'; '.join(moments)}", fault)
        code = self._start(folder, jobs).wait(LIMIT)
        return self._judged(folder, f"{jobs} processes: {'; '.join(moments)}", code)

    def _judged(self, folder: Path, what: str, code: int) -> Result:
        """What came of going on, which ended with an exit code."""
        if code:
            return Result("exception", what, f"going on: exit code {code}")
        told, died = forked(lambda: runs.contents(folder / "runs"), limit=LIMIT)
        if died or "refused" in told:
            return Result("exception", what, died or told["refused"])
        faults = [f"the resumed grid has other rows ({key})" for key in self.right if told[key] != self.right[key]]
        left = status(folder / "runs")
        if left.count("finished") != RUNS or store.failed(folder / "runs") or store.unfinished(folder / "runs"):
            faults.append("`mithridate status` does not call all runs finished")
        faults += [f"a file is left over: {part.name}" for part in folder.rglob("*.part")]
        return Result("silent", what, "; ".join(faults)) if faults else Result("redone", what)

    def _start(self, folder: Path, jobs: int) -> "subprocess.Popen[bytes]":
        script = folder / "start.py"
        script.write_text(START, encoding="utf-8")
        arguments: Sequence[str] = (RECIPE, str(folder / "runs"), str(folder / "cache"), str(jobs))
        return subprocess.Popen(  # noqa: S603  (a fixed command)
            [sys.executable, str(script), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def _killed(self, folder: Path, jobs: int, seconds: float, rng: Random) -> str:
        """Kill the command, or one of the processes that it has started; wait until all of them are gone."""
        process = self._start(folder, jobs)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            children = _children(process.pid)
            if children and rng.random() < 0.4:
                os.kill(rng.choice(children), signal.SIGKILL)  # nobody has waited for it: the number is still its own
                code = process.wait(LIMIT)
                return f"a process killed (exit code {code})"
            process.kill()
            process.wait(LIMIT)
            deadline = time.monotonic() + LIMIT
            while any(map(_alive, children)) and time.monotonic() < deadline:
                time.sleep(0.05)
            return "all processes outlived the command" if any(map(_alive, children)) else "killed"
        return "not killed"

    def _fault_meanwhile(self, folder: Path) -> str:
        """What is not so in what is left."""
        told, died = forked(lambda: runs.contents(folder / "runs"), limit=LIMIT)
        if died:
            return f"a report on the killed grid: {died}"
        wrong = [run for run, digest in told.get("timeless", {}).items() if self.right["timeless"].get(run) != digest]
        if wrong:
            return f"a report on the killed grid would show other rows of {', '.join(wrong)}"
        try:
            known = {cell.run for cell in status(folder / "runs").cells}
        except UserError:
            known = set(self.right["timeless"])  # it was killed before it had written anything
        return "" if known == set(self.right["timeless"]) else "`mithridate status` does not know all runs"


def _children(pid: int) -> list[int]:
    """Processes that a process has started and not waited for; on Linux."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text(encoding="ascii").split()] if listed.exists() else []


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def make(seed: int, shared: Path) -> Grids:
    """The kind, for a seed, with what its cases share in a folder."""
    return Grids(seed, shared)
