"""A recipe for a run on the digits that costs a second. What a test changes in it is said in the test.

The fault harness (`tools/faults`) runs it, too.
"""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from mithridate.bench.failure import Failure
from mithridate.bench.recipe import Cell, Recipe, apply_change, make_recipe
from mithridate.bench.store import Run
from mithridate.bench.watcher import Watcher

TINY = """
title = "tiny"
[data]
name = "digits"
burn_in = 60
victim = 60
validation = 20
trusted = 10
test = 40
batch_size = 10
augment = false
[model]
name = "small_cnn"
width = 2
[burn_in]
epochs = 2
batch_size = 20
lr = 0.05
checkpoints = [1]
[attack]
name = "noise"
eps = 0.1
[run]
steps = 3
lr = 0.05
images = 2
"""

ACCUMULATIVE = """
[[attack]]
name = "accumulative"
label = "accu"
eps = 0.2
steps = 1
trigger_update = "after_step"
poison_ratio = 0.5
random_start = true
resample_validation = true
weight_momentum = 1.1
"""
"""The attack `accu`, with all that it draws and keeps."""

FEDERATION = """
[[attack]]
name = "accumulative"
label = "accu"
trigger = "reoptimised"
poison_ratio = 0.1
spread = 0.1
resample_validation = true
[clients]
clients = 10
partition = "dirichlet"
alpha = 1.0
smallest = 2
[federated]
rounds = 3
per_round = 6
local_batch = 2
lr = 0.05
rule = {name = "centered_clipping", worker_momentum = 0.5}
"""
"""Rounds in place of a stream, with that attack on them."""

TIMES = frozenset({"seconds", "craft_seconds", "update_seconds", "burn_in_seconds"})
"""What two runs of the same bits do not share."""


def tiny_tables(more: str = "", *changes: str, attacks: str = "", defences: str = "") -> dict[str, Any]:
    """The tables of the tiny recipe, with others in their place or beside them, and with changes.

    Args:
        more: TOML. A table takes the place of the one of its name; `[federated]` that of `[run]`.
        changes: As `--set` takes them.
        attacks: Labels, with commas, of those that stay; all if empty.
        defences: The same of defences.
    """
    tables = tomllib.loads(TINY) | tomllib.loads(more)
    if "federated" in tables:
        del tables["run"]
    for kind, labels in (("attack", attacks), ("defence", defences)):
        if labels:
            tables[kind] = [t for t in tables[kind] if t.get("label", t["name"]) in labels.split(",")]
    for change in changes:
        apply_change(tables, change)
    return tables


def tiny_text(more: str = "", *changes: str) -> str:
    """The tiny recipe as a file has it; see `tiny_tables`."""
    return tomli_w.dumps(tiny_tables(more, *changes))


def tiny_recipe(more: str = "", *changes: str, attacks: str = "", defences: str = "") -> Recipe:
    """The tiny recipe as the engine takes it; see `tiny_tables`."""
    return make_recipe(tiny_tables(more, *changes, attacks=attacks, defences=defences))


class Log(Watcher):
    """Notes what a run does; may stop it, or do something else, at a step or an epoch.

    Args:
        at: Step of the phase, from 1.
        at_epoch: Of the burn-in, from 1.
        cell: Only in runs whose id begins so.
        then: What is done there.
    """

    def __init__(
        self,
        at: int | None = None,
        *,
        at_epoch: int | None = None,
        cell: str = "",
        then: Callable[[], object] | None = None,
    ) -> None:
        self.at, self.at_epoch, self.of, self.then = at, at_epoch, cell, then
        self.epochs: list[tuple[int, int]] = []
        self.cells: list[tuple[int, int]] = []
        self.steps: list[int] = []
        self.reasons: list[str] = []
        self.ended: list[tuple[str, bool]] = []
        self.failed_runs: list[str] = []

    def _there(self) -> None:
        if self.then is None:
            raise KeyboardInterrupt
        self.then()

    def burn_in(self, cell: Cell, seed: int, done: int, epochs: int) -> None:
        self.epochs.append((seed, done))
        if done == self.at_epoch:
            self._there()

    def cell(self, cell: Cell, number: int, of: int) -> None:
        self.cells.append((number, of))

    def step(self, cell: Cell, done: int, steps: int, accuracy: float) -> None:
        self.steps.append(done)
        if done == self.at and cell.run_id.startswith(self.of):
            self._there()

    def redone(self, cell: Cell, reason: str) -> None:
        self.reasons.append(reason)

    def failed(self, cell: Cell, failure: Failure) -> None:
        self.failed_runs.append(cell.run_id)

    def finished(self, cell: Cell, summary: Mapping[str, Any], *, skipped: bool) -> None:
        self.ended.append((cell.run_id, skipped))


def timeless(values: Mapping[str, Any]) -> dict[str, Any]:
    """A summary, or a row of a trace, without times."""
    return {k: v for k, v in values.items() if k not in TIMES}


def timeless_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a trace without times."""
    return [timeless(row) for row in rows]


def same_arrays(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether both hold the same arrays by the same names."""
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def same_runs(a: Run, b: Run) -> bool:
    """Whether two runs are the same in all but times, places and environments."""
    return (
        timeless_rows(a.trace) == timeless_rows(b.trace)
        and timeless(a.summary) == timeless(b.summary)
        and a.config == b.config
        and same_arrays(a.images, b.images)
        and same_arrays(a.scores, b.scores)
    )


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder, with its time of change and its content."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}
