"""The cells that a store is to hold, in a file that is written before the first of them is run. Imports no torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mithridate.bench import store
from mithridate.core.errors import StoreError, said

GRID = "grid.json"
"""What the file is called. `mithridate status` reads it; what a run is made from stands in its own directory."""

FORMAT = 1
"""Counts up when older versions of this library could not read what is written."""


@dataclass(frozen=True)
class Work:
    """What a cell costs, as far as it is known beforehand.

    Args:
        run: Its id, the name of its directory.
        attack: Label.
        defence: Label.
        steps: Of the loop at most: the accumulative phase and the trigger.
        epochs: Of its burn-in.
        burn_in: The same for cells that surely share a burn-in.
    """

    run: str
    attack: str
    defence: str
    steps: int
    epochs: int
    burn_in: str


@dataclass(frozen=True)
class Plan:
    """The cells of a store.

    Args:
        works: One a cell.
        jobs: Cells that were run at a time, by the last command.
    """

    works: Sequence[Work]
    jobs: int = 1


def write_plan(out: Path, plan: Plan) -> None:
    """Note the cells of a recipe, beside those of other recipes and seeds that the store holds already.

    Args:
        out: Directory of the store; made if missing.
        plan: Of one recipe.

    Raises:
        StoreError: A newer version of this library has made the store.
        WriteError: The file system refuses.
    """
    try:
        before = _read(out / GRID)
    except _DAMAGES:  # no run depends on it
        before = None
    works = {work.run: work for work in [*(before.works if before else ()), *plan.works]}
    both = Plan(list(works.values()), plan.jobs)
    if both != before:
        cells = [asdict(work) for work in both.works]
        store.write_json(out / GRID, {"format": FORMAT, "jobs": both.jobs, "cells": cells})


def read_plan(out: Path) -> Plan | None:
    """The cells that a store is to hold; None if it does not say.

    Raises:
        StoreError: The file is damaged, or of a newer version.
    """
    try:
        return _read(out / GRID)
    except _DAMAGES as error:
        raise StoreError(
            f"{out / GRID} is damaged ({type(error).__name__}: {said(error)}); delete it: it only says which runs were "
            "planned, and `run --resume` writes it again."
        ) from error


_DAMAGES = (OSError, ValueError, TypeError, KeyError, RecursionError)


def _read(path: Path) -> Plan | None:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    if content["format"] > FORMAT:
        raise StoreError(
            f"{path.parent} was made by a newer version of this library; install that, or choose another --out."
        )
    return Plan([Work(**cell) for cell in content["cells"]], int(content["jobs"]))
