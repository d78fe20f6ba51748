"""Where a guard keeps the batches that it refused, until somebody has looked at them. Imports no torch to read it."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from mithridate.core.errors import BusyError, ConfigError, DataError, StoreError, WriteError, said, shown
from mithridate.core.files import locked, path_of, remove_parts, write_whole, writing
from mithridate.guard.entry import (
    ID,
    Quarantined,
    description_file,
    entry_of,
    json_of,
    no_such,
    read_entry,
    tensors_file,
    verified,
)
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

WAIT = 10.0
"""Seconds for which a step waits for another process that writes there."""


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
        entries = (entry_of(self.folder, name) for name in names if ID.fullmatch(name))
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
        entry = entry_of(self.folder, id)
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
            raise DataError(f"{path} cannot be read ({said(error)}); make it readable, or drop the batch.") from error
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
        described = description_file(self.folder, id).read_bytes()
        files = {tensors_file(target, id): content, description_file(target, id): described}
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
        files = (description_file(self.folder, id), tensors_file(self.folder, id))
        paths = [path for path in files if os.path.lexists(path)]
        if not paths:
            raise no_such(self.folder, id)
        for path in (self.folder / COUNT, *paths):
            with writing(path):
                path.unlink(missing_ok=True)

    def _check_free(self) -> None:
        """Refuse a folder that is not ours."""
        marker = self.folder / MARKER
        if marker.is_file():
            said_there = json_of(marker)
            version = said_there.get("format") if isinstance(said_there, Mapping) else None
            if version != FORMAT:
                raise StoreError(
                    f"{marker} says {shown(version)}, and this version of the library writes '{FORMAT}'; choose "
                    "another folder for the quarantine."
                )
        elif self.folder.is_dir():
            names = {path.name for path in self.folder.iterdir()}
            if MARKER in names:  # another process has made it since
                self._check_free()
                return
            others = sorted(name for name in names if not _is_ours_in_the_making(name))
            if others:
                raise StoreError(
                    f"{self.folder} holds {shown(others[0])} and no {MARKER}, so it is no quarantine of this library; "
                    "choose a new or empty folder."
                )

    def _mark(self) -> None:
        write_whole(self.folder / MARKER, json.dumps({"format": FORMAT}) + "\n")

    def _store(self, entry: Quarantined, content: bytes, described: bytes) -> str:
        """Write a batch's files, the description last: it is stored once that is there."""
        description = description_file(self.folder, entry.id)
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
