"""Tiny runs on the digits, which cost a second: how they are started, and what is in the store afterwards."""

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mithridate.bench.engine import run_recipe
from mithridate.bench.recipe import make_recipe
from mithridate.bench.store import Run, read_runs
from mithridate.bench.watcher import Watcher
from mithridate.core.errors import UserError
from mithridate.report.records import run_records, summary_records
from mithridate.report.rows import rows

TIMES = frozenset({"seconds", "craft_seconds", "update_seconds", "burn_in_seconds"})
"""What two runs of the same bits do not share."""

COMMON = """
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
[[defence]]
name = "none"
[[defence]]
name = "chain"
label = "guarded"
parts = [{name = "clip"}, {name = "ema"}]
"""

ONLINE = (
    COMMON
    + """
[[attack]]
name = "accumulative"
eps = 0.2
steps = 1
trigger_update = "after_step"
poison_ratio = 0.5
random_start = true
resample_validation = true
weight_momentum = 1.1
[run]
steps = 3
lr = 0.05
images = 2
"""
)

DETECTORS = (
    COMMON.partition("[[defence]]")[0]
    + """
[[attack]]
name = "noise"
eps = 0.1
[[detector]]
name = "loss"
[[detector]]
name = "discrepancy"
epoch = 1
[[detector]]
name = "lid"
[run]
steps = 3
lr = 0.05
images = 2
"""
)

FEDERATED = (
    COMMON
    + """
[[attack]]
name = "accumulative"
trigger = "reoptimised"
poison_ratio = 0.2
spread = 0.1
resample_validation = true
[clients]
clients = 6
partition = "dirichlet"
alpha = 1.0
smallest = 2
[federated]
rounds = 3
per_round = 5
local_batch = 2
lr = 0.05
rule = {name = "centered_clipping", worker_momentum = 0.5}
"""
)

RECIPES = {"online": ONLINE, "detectors": DETECTORS, "federated": FEDERATED}


def start(
    recipe: str,
    out: Path,
    cache: Path,
    *,
    resume: bool = False,
    seeds: Sequence[int] = (0,),
    watcher: Watcher | None = None,
    data_root: Path | None = None,
) -> dict[str, Any]:
    """Run a recipe: how many runs were made and found finished, or the user's mistake.

    Args:
        recipe: TOML.
        out: Directory of the store.
        cache: Directory of burn-ins.
        resume: As `mithridate run --resume`.
        seeds: Of the runs.
        watcher: Follows progress.
        data_root: Mirror of image sets.

    Returns:
        `ran` and `skipped`, or `refused`: the message.
    """
    tables = tomllib.loads(recipe)
    tables["federated" if "federated" in tables else "run"]["seeds"] = list(seeds)
    try:
        grid = run_recipe(
            make_recipe(tables), out, device="cpu", resume=resume, cache=cache, watcher=watcher, data_root=data_root
        )
    except UserError as error:
        return {"refused": str(error)}
    return {"ran": grid.ran, "skipped": grid.skipped}


def contents(out: Path) -> dict[str, Any]:
    """What a report reads from a store: digests of each run, with and without times, and of the tables.

    Returns:
        `whole` and `timeless`: by run; `reported`: of the tables without times. Or `refused`: the message.
    """
    try:
        runs = read_runs(out)
        table = rows(runs)
        records = [*summary_records(table), *run_records(table)]
    except UserError as error:
        return {"refused": str(error)}
    return {
        "whole": {run.path.name: _digest(run, frozenset()) for run in runs},
        "timeless": {run.path.name: _digest(run, TIMES) for run in runs},
        "reported": _hash([{k: v for k, v in r.items() if "seconds" not in k} for r in records]),
    }


def _digest(run: Run, without: frozenset[str]) -> str:
    def left(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key not in without}

    arrays = {**run.images, **run.scores}
    return _hash(
        [
            run.config,
            left(run.summary),
            [left(row) for row in run.trace],
            {} if without else run.environment,
            {
                name: [str(a.dtype), a.shape, hashlib.sha256(repr(a.tolist()).encode()).hexdigest()]
                for name, a in arrays.items()
            },
        ]
    )


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
