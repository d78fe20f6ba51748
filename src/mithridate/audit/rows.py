"""Finished runs of an audit on disk, each under the hash of all that decides it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mithridate.audit.result import AuditRun
from mithridate.core.files import remove_parts, write_whole

FOLDER = "runs"


def key_of(decides: Mapping[str, Any]) -> str:
    """24 hex digits that differ whenever anything does that decides a run.

    Args:
        decides: Whatever JSON can hold.
    """
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:24]


class FinishedRuns:
    """Runs by key; kept in a folder, or in memory alone.

    Args:
        out: The folder of the audit; None keeps them in memory.
    """

    def __init__(self, out: Path | None) -> None:
        self._folder = None if out is None else out / FOLDER
        self._memory: dict[str, AuditRun] = {}
        if self._folder is not None and self._folder.is_dir():
            remove_parts(self._folder)

    def get(self, key: str) -> AuditRun | None:
        """The finished run of that key; None if there is none, or its file is damaged, so that it is made again."""
        if self._folder is None:
            return self._memory.get(key)
        path = self._folder / f"{key}.json"
        try:
            run = AuditRun.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        return run if run.key == key else None

    def put(self, run: AuditRun) -> None:
        """Keep a finished run.

        Raises:
            WriteError: The file system refuses.
        """
        if self._folder is None:
            self._memory[run.key] = run
            return
        write_whole(self._folder / f"{run.key}.json", run.model_dump_json(indent=1))
