"""Files that are either whole or not there: a killed process leaves no half-written one behind. Imports no torch."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import platformdirs
from filelock import FileLock, Timeout
from pydantic import PlainValidator
from safetensors import SafetensorError

from mithridate.core.errors import BusyError, ConfigError, WriteError, shown

CACHE = "MITHRIDATE_CACHE"
"""Environment variable: where decoded images and burn-ins go; without it, the user's cache directory."""


def path_of(given: str | Path) -> Path:
    """A path as a user gives it, in which `~` is the home directory, wherever it comes from.

    Raises:
        ConfigError: It cannot be a path, or begins with the home directory of nobody.
    """
    if "\0" in str(given):
        raise ConfigError(f"{shown(str(given))} holds a NUL character and can be no path; take it out.")
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{shown(str(given))}: {error}; write the path without ~.") from None


def _absolute(value: object) -> str:
    if not isinstance(value, str | Path) or not str(value) or not _is_text(str(value)):
        raise ValueError("give the path of a file or folder")
    return str(path_of(value).absolute())


def _is_text(path: str) -> bool:
    """Whether a recipe can hold it; a path of other bytes has no place in one."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


AbsolutePath = Annotated[str | Path, PlainValidator(_absolute)]
"""The type of a setting: given as text or `Path`, kept as the text of an absolute path, which TOML can hold."""


def cache_directory(directory: str | Path | None = None) -> Path:
    """Where decoded images and burn-ins go: `directory`, else `MITHRIDATE_CACHE`, else the user's cache directory."""
    named = os.environ.get(CACHE)
    return path_of(directory or named or platformdirs.user_cache_dir("mithridate"))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a file system objects to inside the block into one sentence.

    Args:
        path: What is written, named in the message.

    Raises:
        WriteError: The disk is full, a folder is read-only, a file stands where a folder belongs, or the like.
    """
    try:
        yield
    except (OSError, SafetensorError, NotImplementedError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        raise WriteError(
            f"{path} cannot be written ({reason}); make room or choose another place. What was finished before is "
            "still there."
        ) from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one move.

    Args:
        path: Where the file shall be; parents are made.
        write: Fills the file whose path it is given; what it returns is not used.

    Raises:
        WriteError: The file system refuses; an older file at `path` is as it was, and nothing half-written is left.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        part = Path(name)
        try:
            write(part)
            part.chmod(0o644)
            part.replace(path)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file in one move, text as UTF-8.

    Args:
        path: Where the file shall be; parents are made.
        content: All of it.

    Raises:
        WriteError: As for `write_atomically`.
    """
    data = content.encode() if isinstance(content, str) else content
    write_atomically(path, lambda part: part.write_bytes(data))


def remove_parts(folder: Path, *, of: str = "*") -> None:
    """Remove what killed processes left of files in a folder; only who holds the lock on them may do that.

    Args:
        folder: Where `write_atomically` wrote.
        of: Name of the file; by default all.
    """
    for part in folder.glob(f".{of}.*.part"):
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, *, timeout: float = -1) -> Iterator[None]:
    """Be the only process inside the block; the lock ends with the process, however that ends.

    Where a file system has no such locks, a marker file takes their place as far as `filelock` knows how.

    Args:
        path: The lock's file; made with its parents, and left there.
        timeout: Seconds to wait for another holder; below 0 as long as it takes.

    Raises:
        BusyError: Another process held it all the time.
        WriteError: The file cannot be made.
    """
    lock = FileLock(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=timeout)
        except Timeout:
            raise BusyError(
                f"another process is at work in {path.parent}; wait until it has ended, or choose another place."
            ) from None
    try:
        yield
    finally:
        lock.release()
