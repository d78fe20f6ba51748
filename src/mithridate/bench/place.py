"""Where a run is written, and whether what stands there already is the same run."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from mithridate.bench import store
from mithridate.bench.journal import RunJournal
from mithridate.bench.origin import NOT_COMPARED, Origin, settings_key
from mithridate.bench.recipe import Cell
from mithridate.core.errors import StoreError
from mithridate.core.settings import by_path


class Standing(Enum):
    """What a run's directory holds."""

    ABSENT = "nothing"
    UNFINISHED = "this run, unfinished"
    DAMAGED = "this run, of which a file has changed since it finished"
    FINISHED = "this run, finished and as it was written"


@dataclass(frozen=True)
class Place:
    """Where a cell's run is written.

    Args:
        cell: Which run.
        directory: Its directory.
        origin: What it is to be made from.
        resume: Whether what stands there may be gone on with.
    """

    cell: Cell
    directory: Path
    origin: Origin
    resume: bool

    def standing(self) -> Standing:
        """What stands there now.

        Raises:
            StoreError: Something is in the way: another run, or this one, which is not to be resumed.
        """
        if self.directory.exists() and not self.directory.is_dir():
            raise StoreError(f"{self.directory} is not a directory; choose another --out.")
        if not self.resume and not store.vacant(self.directory):
            raise StoreError(f"{self.directory} exists; go on with --resume, choose another --out, or delete it.")
        if not store.holds_run(self.directory):
            return Standing.ABSENT
        self._compare()
        if not store.finished(self.directory):
            return Standing.UNFINISHED
        return Standing.FINISHED if self.damage() is None else Standing.DAMAGED

    def damage(self) -> str | None:
        """What has happened to a file of the finished run; None if nothing has."""
        try:
            store.read_files(self.directory)
        except StoreError as error:
            return str(error)
        return None

    def summary(self) -> dict[str, Any]:
        """The outcome of the finished run."""
        return store.read_summary(self.directory)

    def _compare(self) -> None:
        """Refuse a run of other settings or samples; a file that cannot be read says nothing either way."""
        config = self._config()
        journal = RunJournal(self.directory / store.JOURNAL)
        written = [origin for origin in (self._of_summary(), journal.origin()) if origin is not None]
        settings = {origin.settings for origin in written} | ({settings_key(config)} if config else set())
        if settings and self.origin.settings not in settings:
            names = _differences(config, self.cell.config()) if config else []
            raise StoreError(
                f"{self.directory} was made with other settings ({', '.join(names[:5])}); resume with the same ones, "
                "or choose another --out."
            )
        inputs = {origin.inputs for origin in written}
        if inputs and self.origin.inputs not in inputs:
            raise StoreError(
                f"{self.directory} was made from other samples or files than its settings lead to now: they have "
                "changed since. Bring the old ones back, or choose another --out."
            )

    def _config(self) -> dict[str, Any] | None:
        try:
            return tomllib.loads((self.directory / store.CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _of_summary(self) -> Origin | None:
        try:
            summary = self.summary()
            return Origin(summary["settings_key"], summary["samples_key"], summary["inputs_key"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    a, b = by_path(stored), by_path(wanted)
    return [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key) and key not in NOT_COMPARED]
