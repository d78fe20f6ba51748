"""Where a guard keeps the batches that it refused, until somebody has looked at them. Imports no torch to read it."""

import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from mithridate.core.errors import BusyError, ConfigError, DataError, StoreError, WriteError, said, shown
from mithridate.core.files import locked, path_of, remove_parts, write_whole, writing
from mithridate.guard.json_lines import JsonLines, plain_json, read_json_lines
from mithridate.guard.record import StepRecord

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from mithridate.core.batch import AnyBatch

log = logging.getLogger("mithridate")

QUARANTINE = "quarantine"
"""What the folder is called inside a guard's own folder."""

MARKER, FORMAT = "quarantine.json", "mithridate-quarantine-1"
"""A file that says whose folder it is, and what it says."""

LEFT_OUT = "left_out.jsonl"
"""Tells of batches for which there was no room."""

LOCK = ".quarantine.lock"

COUNT = ".quarantine.bytes"
"""Holds how many bytes there are, or more, so that not every batch has all files counted again."""

HEADER, INPUTS, TARGETS = "mithridate", "inputs", "targets"
"""In a safetensors file of a batch: the key of what describes it, and what its tensors are called."""

UNKNOWN = -100
"""The target of a sample for which a guard saw none, as with hooks, which see what a model is called with."""

WAIT = 10.0
"""Seconds for which a step waits for another process that writes there."""

_ID = re.compile(r"a(\d{1,18})-r(\d{1,9})-[0-9a-f]{8}", re.ASCII)


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


class Quarantine:
    """A folder of refused batches: a safetensors file and a JSON file each. Several processes may write to one.

    Nothing is ever deleted but by `release` and `drop`.

    Args:
        folder: Where; made if missing.
        max_bytes: Of all its batches together; a batch that would exceed it is not stored, which is recorded in
            `left_out.jsonl` and said once.

    Raises:
        ConfigError: `max_bytes` is negative.
        StoreError: The folder holds other files, or is of another version.
        WriteError: It cannot be made.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int = 2**30) -> None:
        if max_bytes < 0:
            raise ConfigError(f"max_bytes = {max_bytes}: give 0 or more bytes for the quarantine.")
        self.folder = path_of(folder)
        self.max_bytes = max_bytes
        self._said = self._counted = False
        self._check_free()
        if not (self.folder / MARKER).exists():  # to look at one, nothing is written
            with locked(self.folder / LOCK):
                self._check_free()
                if not (self.folder / MARKER).exists():
                    self._mark()

    @classmethod
    def existing(cls, folder: str | Path) -> "Quarantine":
        """A quarantine that is there already, to look at: its own folder, or that of the guard around it.

        Raises:
            StoreError: It is not there.
        """
        path = path_of(folder)
        for place in (path, path / QUARANTINE):
            if (place / MARKER).is_file():
                return cls(place)
        raise StoreError(
            f"{path} is no quarantine of this library: it holds no {MARKER}; give the folder of a guard, or the folder "
            f"'{QUARANTINE}' inside it."
        )

    def put(
        self, batch: "AnyBatch", *, record: StepRecord, scores: "Sequence[float] | NDArray[Any] | Tensor | None" = None
    ) -> str:
        """Store a batch. What the file system objects to is said once, and stops nothing.

        Args:
            batch: As the loop gave it.
            record: The step that it is about.
            scores: What the defence said of each sample, (n,).

        Returns:
            Its id; empty if it was not stored. One that is there already, from before a training was resumed, stays.

        Raises:
            DataError: It is no batch, or there are not as many scores as samples.
        """
        from mithridate.guard.batch_file import packed

        content, tensors = packed(batch)
        digest = hashlib.sha256(content).hexdigest()
        entry = Quarantined(
            id=f"a{record.attempt}-r{record.rank}-{digest[:8]}",
            attempt=record.attempt,
            step=record.step,
            rank=record.rank,
            verdict=record.verdict,
            reason=record.reason,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            size=batch.size,
            shapes={name: _shape(t.dtype, t.shape) for name, t in tensors.items()},
            scores=None if scores is None else _floats(scores),
            sha256=digest,
            bytes=len(content),
        )
        if entry.scores is not None and len(entry.scores) != batch.size:
            raise DataError(f"{len(entry.scores)} scores for {batch.size} samples; give one a sample, or none.")
        described = json.dumps(plain_json(_written(entry)), indent=1).encode()
        try:
            with locked(self.folder / LOCK, timeout=WAIT):
                return self._store(entry, content, described)
        except (WriteError, BusyError, OSError) as error:
            return self._leave_out(entry, said(error))

    def list(self) -> tuple[Quarantined, ...]:
        """All batches in the order of their attempts, those with damaged files among them."""
        names = {path.stem for path in self.folder.iterdir() if path.suffix in {".json", ".safetensors"}}
        entries = (_read(self.folder, name) for name in names if _ID.fullmatch(name))
        return tuple(sorted(entries, key=lambda entry: (entry.attempt, entry.rank, entry.id)))

    def left_out(self) -> int:
        """How many batches were not stored; of very many only the last ones are known."""
        try:
            entries, _ = read_json_lines(self.folder / LEFT_OUT)
        except FileNotFoundError:
            return 0
        return sum("attempt" in entry for entry in entries)

    def show(self, id: str) -> Quarantined:
        """One batch; its `problem` also says if its tensors are not those that were stored.

        Raises:
            ConfigError: That is no id.
            DataError: There is no such batch.
        """
        entry = _read(self.folder, id)
        if not entry.problem:
            try:
                verified(self.folder, entry)
            except DataError as error:
                return Quarantined(**{**asdict(entry), "problem": str(error)})
        return entry

    def arrays(self, id: str) -> "dict[str, NDArray[Any]]":
        """The tensors of a batch by their names in the file, as arrays; types that numpy lacks are left out.

        Raises:
            ConfigError: That is no id.
            DataError: There is no such batch, or it is damaged.
        """
        verified(self.folder, read_entry(self.folder, id))
        path = tensors_file(self.folder, id)
        arrays = {}
        try:
            with safe_open(path, framework="numpy") as handle:
                for name in handle.keys():  # noqa: SIM118  (not a dict)
                    with suppress(TypeError, KeyError):  # bfloat16 and the like
                        arrays[name] = handle.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read ({said(error)}).") from error
        return arrays

    def release(self, id: str, *, to: str | Path) -> Path:
        """Move a batch out, to be learned again: `read_batch(path)` gives it as it was.

        Args:
            id: Its id.
            to: A folder; made if missing.

        Returns:
            Its safetensors file there; its JSON file lies beside it.

        Raises:
            ConfigError: That is no id, or the folder is the quarantine itself.
            DataError: There is no such batch, or it is damaged.
            StoreError: A file of that name is there already.
            WriteError: The folder cannot be written; the batch stays where it was.
        """
        target = path_of(to)
        if target.resolve().is_relative_to(self.folder.resolve()):
            raise ConfigError(f"{target} is inside the quarantine; choose another folder to release to.")
        entry = read_entry(self.folder, id)
        content = verified(self.folder, entry)
        described = _description_file(self.folder, id).read_bytes()
        files = {tensors_file(target, id): content, _description_file(target, id): described}
        for path in files:
            if path.exists():
                raise StoreError(f"{path} is there already; choose another folder to release to.")
        for path, data in files.items():
            write_whole(path, data)
        self.drop(id)
        return tensors_file(target, id)

    def drop(self, id: str) -> None:
        """Delete a batch for good.

        Raises:
            ConfigError: That is no id.
            DataError: There is no such batch.
            WriteError: It cannot be deleted.
        """
        files = (_description_file(self.folder, id), tensors_file(self.folder, id))
        paths = [path for path in files if os.path.lexists(path)]
        if not paths:
            raise _no_such(self.folder, id)
        for path in (self.folder / COUNT, *paths):
            with writing(path):
                path.unlink(missing_ok=True)

    def _check_free(self) -> None:
        """Refuse a folder that is not ours."""
        marker = self.folder / MARKER
        if marker.is_file():
            said_there = _json(marker)
            version = said_there.get("format") if isinstance(said_there, Mapping) else None
            if version != FORMAT:
                raise StoreError(
                    f"{marker} says {shown(version)}, and this version of the library writes '{FORMAT}'; choose "
                    "another folder for the quarantine."
                )
        elif self.folder.is_dir():
            others = sorted(path.name for path in self.folder.iterdir() if not _is_ours_in_the_making(path.name))
            if others:
                raise StoreError(
                    f"{self.folder} holds {shown(others[0])} and no {MARKER}, so it is no quarantine of this library; "
                    "choose a new or empty folder."
                )

    def _mark(self) -> None:
        content = json.dumps({"format": FORMAT}) + "\n"
        write_whole(self.folder / MARKER, content)

    def _store(self, entry: Quarantined, content: bytes, described: bytes) -> str:
        """Write a batch's files, the description last: it is stored once that is there."""
        description = _description_file(self.folder, entry.id)
        if description.exists():
            return entry.id
        if not (self.folder / MARKER).exists():  # somebody has cleared the folder
            self._mark()
        more = len(content) + len(described)
        used = self._bytes_used(more)
        if used + more > self.max_bytes:
            return self._leave_out(
                entry, f"it holds {used:,} bytes of at most {self.max_bytes:,}, and the batch has {len(content):,}"
            )
        (self.folder / COUNT).write_text(str(used + more), encoding="utf-8")
        write_whole(tensors_file(self.folder, entry.id), content)
        write_whole(description, described)
        return entry.id

    def _bytes_used(self, more: int) -> int:
        """Bytes of all batches: never fewer than there are, and counted anew where there seems to be no room for more.

        Whoever ends between counting and writing, or clears files away by hand, leaves a count that is too high.
        """
        try:
            used = int((self.folder / COUNT).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # nobody has counted, or was killed while writing it
            used = self.max_bytes
        if self._counted and used + more <= self.max_bytes:
            return used
        self._counted = True
        remove_parts(self.folder)
        with os.scandir(self.folder) as files:
            return sum(
                file.stat(follow_symlinks=False).st_size
                for file in files
                if file.name.endswith((".safetensors", ".json")) and file.name != MARKER
            )

    def _leave_out(self, entry: Quarantined, why: str) -> str:
        if not self._said:
            log.warning(
                "guard: the batch of attempt %s is not in the quarantine %s: %s. Look it through with `mithridate "
                "quarantine list`, release or drop what is there, or give it more room. Training goes on, and this is "
                "not said again; left_out.jsonl there counts such batches.",
                entry.attempt,
                self.folder,
                why,
            )
        self._said = True
        with suppress(OSError):
            lines = JsonLines(self.folder / LEFT_OUT, {"format": FORMAT}, log=log, largest=2**20)
            lines.write({"attempt": entry.attempt, "rank": entry.rank, "bytes": entry.bytes, "why": why})
        return ""


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
    entry = _read(folder, id)
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
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error
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


def _description_file(folder: Path, id: str) -> Path:
    return folder / f"{_checked(id)}.json"


def _checked(id: str) -> str:
    """An id: what else is asked for could be a path to anywhere."""
    if not isinstance(id, str) or _ID.fullmatch(id) is None:
        raise ConfigError(
            f"{shown(id)} is no id of a batch in quarantine; `mithridate quarantine list` shows them, such as "
            "a12-r0-01234567."
        )
    return id


def _no_such(folder: Path, id: str) -> DataError:
    return DataError(f"there is no batch {id} in {folder}; `mithridate quarantine list` shows those that are.")


@cache
def _reader() -> TypeAdapter[Quarantined]:
    return TypeAdapter(Quarantined)


def _read(folder: Path, id: str) -> Quarantined:
    """A batch's description, or what is wrong with its files."""
    description, tensors = _description_file(folder, id), tensors_file(folder, id)
    attempt, rank = (int(part[1:]) for part in id.split("-")[:2])
    size = _regular(tensors)
    if not description.exists():
        if not os.path.lexists(tensors):
            raise _no_such(folder, id)
        return Quarantined(
            id, attempt, rank=rank, bytes=size or 0, problem=f"{description} is missing: it can only be dropped."
        )
    try:
        entry = _reader().validate_python(_json(description), strict=False)
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


def _json(path: Path) -> object:
    """What a JSON file says; None if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _written(entry: Quarantined) -> dict[str, Any]:
    return {"format": FORMAT, **{key: value for key, value in asdict(entry).items() if key != "problem"}}


def _floats(scores: "Sequence[float] | NDArray[Any] | Tensor") -> tuple[float, ...]:
    """Numbers with six digits, which is what a description needs."""
    plain = scores if isinstance(scores, Sequence) else scores.tolist()
    return tuple(float(f"{score:.6g}") for score in plain)


def _shape(dtype: object, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} ({', '.join(map(str, shape))})"


def _is_ours_in_the_making(name: str) -> bool:
    """Whether a file is what another process has begun the folder with."""
    return name == LOCK or (name.startswith(f".{MARKER}.") and name.endswith(".part"))
