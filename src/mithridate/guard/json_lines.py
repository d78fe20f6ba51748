"""A log of JSON lines that cannot fill a disk or stop what it tells of. Imports no torch."""

import errno
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LARGEST_FILE = 2**26
"""Bytes of a log; with the one before it, it takes up twice as many at most."""


class JsonLines:
    """A file that gains one line an entry, in one write, so that a killed process leaves whole lines.

    Once it is as large as allowed it becomes PATH.1, in place of an older one, and a new file begins.

    Args:
        path: The file; its folder is made. One that is there is gone on with.
        opening: The first line of every file.
        log: Hears once if later on the file cannot be written.
        largest: Bytes of a file at most, where its first line leaves room.
        what: What goes on all the same, for that message.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        opening: Mapping[str, Any],
        *,
        log: logging.Logger,
        largest: int = LARGEST_FILE,
        what: str = "training",
    ) -> None:
        self.path = path
        self._opening = _line(opening)
        self._log, self._largest, self._what = log, largest, what
        self._failed = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._torn = _ends_within_a_line(path)
        if not self._turned(self._opening):
            self._append(self._opening)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append an entry; what the file system objects to is said once."""
        line = _line(entry)
        try:
            self._turned(line)
            self._append(line)
        except OSError as error:
            if not self._failed:
                self._log.warning(
                    "guard: %s cannot be written (%s); the %s goes on.", self.path, error.strerror, self._what
                )
            self._failed = True

    def _turned(self, line: bytes) -> bool:
        """Whether a new file was begun, with its first line, for the old one had no room for one line more."""
        if not self.path.exists() or self.path.stat().st_size + len(line) <= self._largest:
            return False
        self.path.replace(self.path.with_name(f"{self.path.name}.1"))
        self._torn = False
        self._append(self._opening)
        return True

    def _append(self, line: bytes) -> None:
        whole = b"\n" + line if self._torn else line
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = os.write(handle, whole)
        finally:
            os.close(handle)
        self._torn = written < len(whole) and (self._torn or written > 0)
        if written < len(whole):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The entries of a file, and of the one before it where it was turned over; and how many lines are no entries.

    Args:
        path: The newer file.

    Raises:
        OSError: A file cannot be read.
    """
    older = path.with_name(f"{path.name}.1")
    entries, broken = [], 0
    for file in (older, path) if older.exists() else (path,):
        for line in file.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            if isinstance(entry, dict):
                entries.append(entry)
            else:
                broken += bool(line)
    return entries, broken


def plain_json(value: object) -> object:
    """A value as JSON can hold it: infinity, NaN and what is of no type that it knows become text.

    >>> plain_json({"loss": float("nan"), "where": Path("a"), "shape": (1, 2)})
    {'loss': 'nan', 'where': 'a', 'shape': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain_json(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    if getattr(value, "ndim", None) == 0:  # a number of numpy or torch
        return plain_json(value.item())  # type: ignore[attr-defined]  # both have it
    return str(value)


def _line(entry: Mapping[str, Any]) -> bytes:
    return (json.dumps(plain_json(entry), allow_nan=False) + "\n").encode()


def _ends_within_a_line(path: Path) -> bool:
    """Whether the last write to a file was cut short."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
