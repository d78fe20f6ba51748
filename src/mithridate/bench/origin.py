"""What a run is made from: its settings, and the samples and files that they lead to, each as a short hash."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mithridate.core.batch import Batch, tensors_of
from mithridate.data.stream import Stream

NOT_COMPARED = frozenset({"title", "plugins"})
"""What may differ between a run and the command that goes on with it; of plug-ins the environment keeps the code."""


@dataclass(frozen=True)
class Origin:
    """What a run is made from.

    Args:
        settings: 16 hex digits of its resolved settings; the title does not count.
        samples: 16 hex digits of every sample that the run can see.
        inputs: 16 hex digits of those samples, and of the files that its settings name.
    """

    settings: str
    samples: str
    inputs: str


def settings_key(config: Mapping[str, Any]) -> str:
    """16 hex digits of resolved settings."""
    text = json.dumps({k: v for k, v in config.items() if k not in NOT_COMPARED}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def inputs_key(samples: str, config: Mapping[str, Any]) -> str:
    """16 hex digits of samples and of the files that settings name, such as a checkpoint.

    Args:
        samples: From `samples_key`.
        config: Resolved settings; the data's path is left out, for its samples count.
    """
    digest = hashlib.sha256(samples.encode())
    for path in _files({k: v for k, v in config.items() if k not in {*NOT_COMPARED, "data"}}):
        state = path.stat()
        digest.update(_file_digest(path, state.st_size, state.st_mtime_ns))
    return digest.hexdigest()[:16]


def samples_key(stream: Stream, ood: Sequence[Batch]) -> str:
    """16 hex digits of all parts of a stream and of the other images beside it."""
    digest = hashlib.sha256()
    for part in (stream.burn_in, stream.victim, stream.validation, stream.trusted, stream.test):
        part.hash_into(digest)
    for batch in ood:
        for tensor in tensors_of(batch.x):
            digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _files(value: object) -> Iterator[Path]:
    """The files that settings name by an absolute path, in their order."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _files(item)
    elif isinstance(value, str) and len(value) < 4096 and Path(value).is_absolute() and Path(value).is_file():
        yield Path(value)


@cache
def _file_digest(path: Path, size: int, changed: int) -> bytes:
    """Of a file of that size and time of change; cells of one recipe share it."""
    del size, changed
    return hashlib.sha256(path.read_bytes()).digest()
