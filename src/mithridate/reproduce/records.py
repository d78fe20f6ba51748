"""Results that are kept in a repository: one small JSON file a run, with its settings, seed and environment."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mithridate.bench.store import Run
from mithridate.core.errors import StoreError
from mithridate.core.files import path_of, write_whole
from mithridate.reproduce.quantities import QUALITIES, qualities

FORMAT = 1
"""Of the files; another one is refused."""

DIGITS = 6
"""Significant digits of the numbers along the steps."""

COLUMNS = (
    "step",
    "phase",
    "accuracy",
    "loss",
    "test_samples",
    "batch_loss",
    "gradient_norm",
    "update_norm",
    "poison_linf",
    "poisoned",
    "flagged_clean",
    "flagged_poisoned",
    "admitted",
    "alarms",
    "craft_seconds",
    "update_seconds",
)
"""Of the trace, those that results are computed from."""

MACHINE = ("hostname", "path", "executable")
"""What an environment says of a place, and not of what decides numbers."""


def record_of(run: Run) -> dict[str, Any]:
    """A finished run as one object: everything that tables and checks read, without images and single scores."""
    steps = run.trace
    return {
        "format": FORMAT,
        "run": run.path.name,
        "config": _in_json(run.config),
        "summary": {**run.summary, **({QUALITIES: of} if (of := qualities(run)) else {})},
        "environment": {key: value for key, value in run.environment.items() if key not in MACHINE},
        "trace": {name: [_short(step.get(name)) for step in steps] for name in COLUMNS},
    }


def _in_json(value: object) -> object:
    """Settings as JSON can hold them: infinity, which it has not, as TOML writes it."""
    if isinstance(value, Mapping):
        return {key: _in_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: object) -> object:
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def write_records(runs: Iterable[Run], folder: str | Path) -> list[Path]:
    """Write one file a run; what lies there of the same name is replaced.

    Args:
        runs: Finished ones.
        folder: Made if missing.

    Raises:
        WriteError: A file cannot be written.
    """
    folder, paths = path_of(folder), []
    for run in runs:
        text = json.dumps(record_of(run), indent=1, ensure_ascii=False, allow_nan=False, default=str)
        paths.append(folder / f"{run.path.name}.json")
        write_whole(paths[-1], text + "\n")
    return paths


def read_records(folder: str | Path) -> list[Run]:
    """Every record below a folder, as runs without images and single scores, in the order of their paths.

    Raises:
        StoreError: The folder is missing, or a file is no record.
    """
    folder = path_of(folder)
    if not folder.is_dir():
        raise StoreError(f"there is no folder {folder}; give one with records of runs.")
    return [_read(path) for path in sorted(folder.rglob("*.json"))]


def _read(path: Path) -> Run:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise StoreError(
                f"{path} is of format {record['format']!r}, and this version reads {FORMAT}; make it anew."
            )
        trace: Mapping[str, Sequence[Any]] = record["trace"]
        names = list(trace)
        steps = [dict(zip(names, values, strict=True)) for values in zip(*trace.values(), strict=True)]
        return Run(
            path=path.with_suffix(""),
            config=record["config"],
            summary=record["summary"],
            trace=steps,
            environment=record["environment"],
            images={},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is no record of a run ({type(error).__name__}: {error}); delete it.") from None
