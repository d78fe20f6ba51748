"""One batch in quarantine: its two files, what they say, and what is wrong with them. Imports no torch to read it."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open

from mithridate.core.errors import ConfigError, DataError, shown

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

HEADER, INPUTS, TARGETS = "mithridate", "inputs", "targets"
"""In a safetensors file of a batch: the key of what describes it, and what its tensors are called."""

UNKNOWN = -100
"""The target of a sample for which a guard saw none, as with hooks, which see what a model is called with."""

ID = re.compile(r"a(\d{1,18})-r(\d{1,9})-[0-9a-f]{8}", re.ASCII)


@dataclass(frozen=True)
class Quarantined:
    """A batch in quarantine, as its JSON file describes it.

    Args:
        id: Attempt, rank and the start of the hash; also the name of its two files.
        attempt: Of the step at which it was put there, as in `StepRecord`; so are the next ones.
        step: Steps that stayed before it.
        rank: Of the process.
        verdict: What became of the step.
        reason: Why.
        time: When, in UTC, as ISO 8601 has it.
        size: How many samples.
        shapes: Of every tensor, by its name in the file: its type and its dimensions.
        scores: What the defence said of each sample; None if it said nothing.
        sha256: Of the safetensors file, in hex.
        bytes: Its size.
        problem: What is wrong with its files; empty if nothing is known to be. The hash is compared by whoever reads
            the tensors.
    """

    id: str
    attempt: int
    step: int = 0
    rank: int = 0
    verdict: str = ""
    reason: str = ""
    time: str = ""
    size: int = 0
    shapes: Mapping[str, str] = field(default_factory=dict)
    scores: tuple[float, ...] | None = None
    sha256: str = ""
    bytes: int = 0
    problem: str = ""


def known_targets(arrays: "Mapping[str, NDArray[Any]]") -> Sequence[object] | None:
    """One target a sample, None for one that is not known; None if no target is a single number that is known.

    Args:
        arrays: The tensors of a batch.
    """
    targets = arrays.get(TARGETS)
    if targets is None or targets.ndim != 1 or (targets == UNKNOWN).all():
        return None
    return [None if target == UNKNOWN else target for target in targets.tolist()]


def read_entry(folder: Path, id: str) -> Quarantined:
    """A batch's description.

    Args:
        folder: Where its files lie, in a quarantine or released.
        id: Its id.

    Raises:
        ConfigError: That is no id.
        DataError: There is no such batch, or its files are not in order.
    """
    entry = entry_of(folder, id)
    if entry.problem:
        raise DataError(entry.problem)
    return entry


def verified(folder: Path, entry: Quarantined) -> bytes:
    """The content of a batch's safetensors file.

    Args:
        folder: Where its files lie.
        entry: Its description.

    Raises:
        DataError: It cannot be read, or is not what was stored.
    """
    path = tensors_file(folder, entry.id)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); make it readable, or drop the batch.") from error
    if hashlib.sha256(content).hexdigest() != entry.sha256 or not entry.id.endswith(entry.sha256[:8]):
        raise DataError(f"{path} is not what was put into quarantine: its SHA-256 differs; it can only be dropped.")
    return content


def tensors_file(folder: Path, id: str) -> Path:
    """Where the tensors of a batch lie.

    Raises:
        ConfigError: That is no id.
    """
    return folder / f"{_checked(id)}.safetensors"


def header_of(path: Path) -> Mapping[str, str]:
    """What a safetensors file says of itself."""
    with safe_open(path, framework="numpy") as handle:
        return handle.metadata() or {}


def description_file(folder: Path, id: str) -> Path:
    """Where the description of a batch lies.

    Raises:
        ConfigError: That is no id.
    """
    return folder / f"{_checked(id)}.json"


def _checked(id: str) -> str:
    """An id: what else is asked for could be a path to anywhere."""
    if not isinstance(id, str) or ID.fullmatch(id) is None:
        raise ConfigError(
            f"{shown(id)} is no id of a batch in quarantine; `mithridate quarantine list` shows them, such as "
            "a12-r0-01234567."
        )
    return id


def no_such(folder: Path, id: str) -> DataError:
    """What to say of a batch that is not there."""
    return DataError(f"there is no batch {id} in {folder}; `mithridate quarantine list` shows those that are.")


@cache
def _reader() -> TypeAdapter[Quarantined]:
    return TypeAdapter(Quarantined)


def entry_of(folder: Path, id: str) -> Quarantined:
    """A batch's description, or what is wrong with its files.

    Raises:
        ConfigError: That is no id.
        DataError: There is no such batch.
    """
    description, tensors = description_file(folder, id), tensors_file(folder, id)
    attempt, rank = (int(part[1:]) for part in id.split("-")[:2])
    size = _regular(tensors)
    if not description.exists():
        if not os.path.lexists(tensors):
            raise no_such(folder, id)
        return Quarantined(
            id, attempt, rank=rank, bytes=size or 0, problem=f"{description} is missing: it can only be dropped."
        )
    try:
        entry = _reader().validate_python(json_of(description), strict=False)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        return Quarantined(
            id,
            attempt,
            rank=rank,
            problem=f"{description} is no description of a batch ({where}: {first['msg']}): it can only be dropped.",
        )
    problem = ""
    if (entry.id, entry.attempt, entry.rank) != (id, attempt, rank):
        problem = f"{description} describes another batch, {shown(entry.id)}: it can only be dropped."
    elif size is None:
        problem = f"{tensors} is missing: it can only be dropped."
    elif size != entry.bytes:
        problem = f"{tensors} has {size} bytes and had {entry.bytes}: it can only be dropped."
    return Quarantined(**{**asdict(entry), "id": id, "attempt": attempt, "rank": rank, "problem": problem})


def _regular(path: Path) -> int | None:
    """The size of a file; None if there is none of its own, for a link may lead anywhere."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def json_of(path: Path) -> object:
    """What a JSON file says; None if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
