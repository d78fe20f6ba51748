"""What a run has measured so far, in a file that only grows, so that a resume point costs the same at every step."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mithridate.bench.origin import Origin
from mithridate.core.errors import CheckpointError
from mithridate.core.files import writing
from mithridate.simulation.run import Progress

Mark = Mapping[str, Any]
"""A place in a journal: its length in bytes and the SHA-256 of everything before. Whoever keeps it, beside the state of
the model, knows what belongs to that state; a line that a killed process did not finish comes after it."""


class RunJournal:
    """Appends the rows of a trace, and the scores of their steps, as JSON lines; the first line says of which run.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest, self._length, self._rows = hashlib.sha256(), 0, 0

    def begin(self, origin: Origin) -> None:
        """Start anew.

        Args:
            origin: What the run is made from.

        Raises:
            WriteError: The file system refuses.
        """
        with writing(self.path):
            self.path.unlink(missing_ok=True)
        self._append(f"{json.dumps(asdict(origin))}\n".encode())

    def origin(self) -> Origin | None:
        """What the run is made from, by the first line; None if that cannot be read."""
        try:
            with self.path.open("rb") as file:
                return Origin(**json.loads(file.readline(1000)))
        except (OSError, ValueError, TypeError):
            return None

    def _append(self, content: bytes) -> None:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(self._length)  # what a killed process wrote behind the last mark
                file.write(content)
        self._digest.update(content)
        self._length += len(content)

    def keep(self, progress: Progress) -> Mark:
        """Append what has come since the last call.

        Args:
            progress: Where the run is; only rows and scores are kept here.

        Raises:
            WriteError: The file system refuses.
        """
        lines = [json.dumps(entry) for entry in _entries(progress, self._rows)]
        self._append("".join(f"{line}\n" for line in lines).encode())
        self._rows = len(progress.rows)
        return {"bytes": self._length, "rows": self._rows, "sha256": self._digest.hexdigest()}

    def take_back(self, progress: Progress, mark: Mark) -> None:
        """Fill in what was kept up to a mark, and go on from there.

        Args:
            progress: Without rows and scores; filled in place.
            mark: What `keep` returned.

        Raises:
            CheckpointError: The file is missing, or is not what was written.
        """
        try:
            with self.path.open("rb") as file:
                content = file.read(int(mark["bytes"]))
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read ({error.strerror}).") from error
        self._digest = hashlib.sha256(content)
        if self._digest.hexdigest() != mark["sha256"]:
            raise CheckpointError(f"{self.path} is not as it was written.")
        for line in content.splitlines()[1:]:
            entry = json.loads(line)
            progress.rows.append(entry["row"])
            progress.scores |= {k: torch.tensor(v, dtype=torch.float64) for k, v in entry["scores"].items()}
            progress.changed |= {k: torch.tensor(v, dtype=torch.bool) for k, v in entry["changed"].items()}
        self._length, self._rows = len(content), len(progress.rows)


def _entries(progress: Progress, first: int) -> Iterator[dict[str, Any]]:
    """The rows from number `first` on, each with the scores of its step."""
    scores, changed = _newest(progress.scores, first), _newest(progress.changed, first)
    for row in progress.rows[first:]:
        yield {"row": row, "scores": scores.get(row["step"], {}), "changed": changed.get(row["step"], {})}


def _newest(by_key: dict[str, torch.Tensor], first: int) -> dict[int, dict[str, list[float]]]:
    """The entries of steps from `first` on, step by step, looked for from the end, where they are."""
    found: dict[int, dict[str, list[float]]] = {}
    for key in reversed(by_key):  # the newest steps come last
        step = int(key.partition("/")[0])
        if step < first:
            break
        found.setdefault(step, {})[key] = by_key[key].tolist()
    return {step: dict(reversed(values.items())) for step, values in found.items()}
