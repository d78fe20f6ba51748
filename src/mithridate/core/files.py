"""Files that are either whole or not there: a killed process leaves no half-written one behind."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import platformdirs
from pydantic import PlainValidator

CACHE = "MITHRIDATE_CACHE"
"""Environment variable: where decoded images and burn-ins go; without it, the user's cache directory."""


def _absolute(value: object) -> str:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("give the path of a file or folder")
    return str(Path(value).expanduser().absolute())


AbsolutePath = Annotated[str | Path, PlainValidator(_absolute)]
"""The type of a setting: given as text or `Path`, kept as the text of an absolute path, which TOML can hold."""


def cache_directory(directory: str | Path | None = None) -> Path:
    """Where decoded images and burn-ins go: `directory`, else `MITHRIDATE_CACHE`, else the user's cache directory."""
    named = os.environ.get(CACHE)
    return Path(directory or named or platformdirs.user_cache_dir("mithridate")).expanduser()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one move.

    Args:
        path: Where the file shall be; parents are made.
        write: Fills the file whose path it is given; what it returns is not used.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
