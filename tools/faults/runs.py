"""Tiny runs on the digits, which cost a second: how they are started, and what is in the store afterwards."""

import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mithridate.bench.engine import Grid, run_recipe
from mithridate.bench.recipe import make_recipe
from mithridate.bench.store import Run, read_runs
from mithridate.bench.watcher import Watcher
from mithridate.core.errors import UserError
from mithridate.report.records import run_records, summary_records
from mithridate.report.rows import rows
from tests.recipes import ACCUMULATIVE, FEDERATION, timeless, tiny_text

DEFENCES = """
[[defence]]
name = "none"
[[defence]]
name = "chain"
label = "guarded"
parts = [{name = "clip"}, {name = "ema"}]
"""

DETECTORS = """
[[detector]]
name = "loss"
[[detector]]
name = "discrepancy"
epoch = 1
[[detector]]
name = "lid"
"""

RECIPES = {
    "online": tiny_text(ACCUMULATIVE + DEFENCES),
    "detectors": tiny_text(DETECTORS),
    "federated": tiny_text(FEDERATION + DEFENCES),
}


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
        raise_failure(grid)
    except UserError as error:
        return {"refused": str(error)}
    return {"ran": grid.ran, "skipped": grid.skipped}


def raise_failure(grid: Grid) -> None:
    """Raise what the first failed run of a grid met.

    Args:
        grid: How it ended.

    Raises:
        UserError: It was told in words.
        RuntimeError: It was not.
    """
    for failure in grid.failed.values():
        if failure.told:
            raise UserError(failure.message)
        raise RuntimeError(f"{failure.message} {failure.traceback[-400:]}")


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
        "whole": {run.path.name: _digest(run, dict, run.environment) for run in runs},
        "timeless": {run.path.name: _digest(run, timeless, {}) for run in runs},
        "reported": _hash([{k: v for k, v in r.items() if "seconds" not in k} for r in records]),
    }


def _digest(run: Run, shown: Callable[[Mapping[str, Any]], Any], environment: Mapping[str, Any]) -> str:
    arrays = {**run.images, **run.scores}
    content = {name: [str(a.dtype), a.shape, _hash(a.tolist())] for name, a in arrays.items()}
    return _hash([run.config, shown(run.summary), [shown(row) for row in run.trace], environment, content])


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
