"""What a guard did in a loop, step by step, in a file that every guard writes. Imports no torch."""

import json
import logging
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mithridate.core.errors import StoreError, WriteError, shown
from mithridate.core.files import path_of
from mithridate.guard.json_lines import JsonLines, read_json_lines
from mithridate.guard.record import StepRecord

log = logging.getLogger("mithridate")

FORMAT = "mithridate-steps-1"

STEPS = "steps.jsonl"
"""The file of rank 0; that of rank 3 is called `steps-rank3.jsonl`."""

IN_FULL = 10_000
"""Admitted steps that are written one by one; then every second for as many lines, then every fourth, and so on."""

_NAME = re.compile(r"steps(-rank\d{1,9})?\.jsonl", re.ASCII)

_DEFAULTS = {field.name: field.default for field in fields(StepRecord)}


class StepLog:
    """A tracker that writes JSON lines: the first one describes the run, each further one is a step.

    Every step is written that was not admitted as it was, or had samples taken out. Of the others there is a line each
    at first and ever fewer later on (see `IN_FULL`). A file of 64 MiB becomes PATH.1, in place of an older one.

    Args:
        folder: The guard's; made if missing. A log that is there is gone on with.
        defence: The settings of the defence.
        environment: Versions and machine (`core.environment`).
        rank: Of the process; each writes its own file.

    Raises:
        StoreError: There is a file of that name that is not a log of steps.
        WriteError: It cannot be written. Later on that is said once, and training goes on.
    """

    def __init__(
        self, folder: str | Path, *, defence: Mapping[str, Any], environment: Mapping[str, Any], rank: int = 0
    ) -> None:
        path = path_of(folder) / (STEPS if rank == 0 else f"steps-rank{rank}.jsonl")
        if path.exists():
            _check_ours(path)
        opening = {
            "format": FORMAT,
            "mithridate": version("mithridate"),
            "attached": uuid.uuid4().hex,
            "time": round(time.time(), 3),
            "rank": rank,
            "defence": dict(defence),
            "environment": dict(environment),
        }
        try:
            self._lines = JsonLines(path, opening, log=log)
        except OSError as error:
            raise WriteError(
                f"{path} cannot be written ({error.strerror}); give the guard another folder, or make room."
            ) from error
        self._every = 1
        self._written = self._met = 0
        self._last: dict[str, Any] | None = None

    def note(self, record: StepRecord) -> None:
        """Write a step, if it is one that is written."""
        entry = {key: value for key, value in asdict(record).items() if value != _DEFAULTS[key]}
        entry |= {"seconds": round(record.seconds, 6), "time": round(time.time(), 3)}
        if record.verdict == "admitted" and not record.quarantined:
            turn = self._met % self._every == 0
            self._met += 1
            if not turn:
                self._last = entry
                return
            self._written += 1
            if self._written == IN_FULL:
                self._every, self._written, self._met = 2 * self._every, 0, 0
        self._last = None
        self._lines.write(entry)

    def close(self) -> None:
        """Write the last step, if it was not its turn: it tells how many there were."""
        if self._last is not None:
            self._lines.write(self._last)
        self._last = None


@dataclass(frozen=True)
class Logged:
    """A step as it stands in a log.

    Args:
        record: What the guard told of it.
        time: When, in seconds since 1970.
    """

    record: StepRecord
    time: float


@dataclass(frozen=True)
class Steps:
    """What the logs of a guard's folder say.

    Args:
        about: Defence, environment and version of the last time that the guard was attached.
        attached: How often it was, by the log of the first rank.
        by_rank: The steps of each rank in order, those aside that a resumed training took again.
        taken_again: How many of those there were.
        broken: Lines that cannot be read, as a killed process may leave them.
    """

    about: Mapping[str, Any]
    attached: int
    by_rank: Mapping[int, tuple[Logged, ...]]
    taken_again: int
    broken: int


def is_guard_folder(directory: str | Path) -> bool:
    """Whether a guard has written its log there."""
    return (path_of(directory) / STEPS).is_file()


def read_steps(folder: str | Path) -> Steps:
    """Read the logs of a guard's folder.

    Args:
        folder: The guard's.

    Raises:
        StoreError: There is none, or it cannot be read.
    """
    path = path_of(folder)
    files = sorted(file for file in path.glob("steps*.jsonl") if _NAME.fullmatch(file.name))
    if not files:
        raise StoreError(f"{path} is no folder of a guard: it holds no {STEPS}; give the folder that the guard writes.")
    about: Mapping[str, Any] = {}
    attached = taken_again = broken = 0
    by_rank: dict[int, tuple[Logged, ...]] = {}
    for file in files:
        try:
            _check_ours(file)
            entries, unreadable = read_json_lines(file)
        except OSError as error:
            raise StoreError(f"{file} cannot be read ({error.strerror}); make it readable, or take it away.") from error
        steps, openings, undone, odd = _in_order(entries)
        rank = steps[0].record.rank if steps else int("".join(filter(str.isdigit, file.stem)) or 0)
        by_rank[rank] = tuple(steps)
        if rank == min(by_rank):
            about, attached = (
                openings[-1] if openings else {},
                len({str(opening.get("attached")) for opening in openings}),
            )
        taken_again += undone
        broken += unreadable + odd
    return Steps(about, attached, dict(sorted(by_rank.items())), taken_again, broken)


def _in_order(entries: list[dict[str, Any]]) -> tuple[list[Logged], list[dict[str, Any]], int, int]:
    """Steps, opening lines, how many steps were taken again, and how many lines are neither."""
    steps: list[Logged] = []
    openings: list[dict[str, Any]] = []
    undone = odd = 0
    resumed = False
    for entry in entries:
        if entry.get("format") == FORMAT:
            openings.append(entry)
            resumed = True
            continue
        try:
            step = Logged(_reader().validate_python(entry), float(entry.get("time", 0)))
        except (ValidationError, TypeError, ValueError):
            odd += 1
            continue
        if resumed:
            before = len(steps)
            steps = [earlier for earlier in steps if earlier.record.attempt < step.record.attempt]
            undone += before - len(steps)
        resumed = False
        steps.append(step)
    return steps, openings, undone, odd


@cache
def _reader() -> TypeAdapter[StepRecord]:
    return TypeAdapter(StepRecord)


def _check_ours(path: Path) -> None:
    try:
        with path.open("rb") as file:
            first = json.loads(file.readline(2**20) or b"{}")
    except ValueError:
        first = None
    told = first.get("format") if isinstance(first, Mapping) else None
    if told != FORMAT and path.stat().st_size:
        raise StoreError(
            f"{path} says it is {shown(told)}, not '{FORMAT}': it is no log of this version's guard; give the guard a "
            "new or empty folder."
        )
