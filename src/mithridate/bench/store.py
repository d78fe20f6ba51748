"""The run store: one directory a run, plain formats, every write atomic. Imports no torch, so a report needs none.

Layout of `DIR/<run id>/`:

- `config.toml`: the resolved settings, tables `[data] [model] [burn_in] [attack] [defence] [monitor] [run]`.
- `trace.parquet`: one row a step, columns `TRACE_SCHEMA`; the first row is the state before the stream.
- `summary.json`: the outcome, written last: a run without it is unfinished.
- `environment.json`: versions, device, threads.
- `scores.parquet`: what detectors said of each sample, columns `SCORES_SCHEMA`; only if the recipe has detectors.
- `images.safetensors`: a few images, float32 (n, channels, height, width) in [0, 1], as `<phase>.clean` and
  `<phase>.poisoned` for the phases `accumulative` and `trigger`.
- `state.safetensors`: where a killed run goes on; removed when it has finished.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.numpy
import tomli_w
from numpy.typing import NDArray

from mithridate.core.errors import StoreError
from mithridate.core.files import path_of, write_atomically
from mithridate.simulation.trace import COLUMNS, TraceRow

CONFIG, TRACE, SUMMARY, ENVIRONMENT, IMAGES, SCORES = (
    "config.toml",
    "trace.parquet",
    "summary.json",
    "environment.json",
    "images.safetensors",
    "scores.parquet",
)
STATE = "state.safetensors"

_ARROW = {int: pa.int64(), float: pa.float64(), str: pa.string(), bool: pa.bool_()}


def _trace_schema() -> pa.Schema:
    """The columns of a trace row, and their types."""
    hints = get_type_hints(TraceRow)
    types = {name: next(t for t in (get_args(hint) or (hint,)) if t is not NoneType) for name, hint in hints.items()}
    return pa.schema([(name, _ARROW[types[name]]) for name in COLUMNS])


TRACE_SCHEMA = _trace_schema()
"""See `simulation.trace.TraceRow`."""


SCORES_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),  # as in the trace: 1 is the first batch
        ("source", pa.string()),  # clean: before poisoning; received: what the learner got; ood: another image set
        ("detector", pa.string()),  # its label
        ("sample", pa.int64()),  # position in its batch
        ("poisoned", pa.bool_()),  # whether a received sample had been changed
        ("score", pa.float64()),  # lower is more suspicious; -inf where the detector had no number
    ]
)


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically; NaN is refused, since JSON has none (use None)."""
    _write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_toml(path: Path, value: Mapping[str, Any]) -> None:
    """Write TOML atomically."""
    _write_text(path, tomli_w.dumps(value))


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_trace(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write trace rows (keys: columns of `TRACE_SCHEMA`; a missing one is None) atomically.

    Raises:
        ValueError: A row has a key that is no column.
    """
    if strange := {key for row in rows for key in row} - set(TRACE_SCHEMA.names):
        raise ValueError(f"the trace has no column {', '.join(sorted(strange))}")
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=TRACE_SCHEMA)
    write_atomically(path, lambda part: pq.write_table(table, part))


def write_scores(path: Path, columns: Mapping[str, NDArray[Any]]) -> None:
    """Write scores (columns of `SCORES_SCHEMA`) atomically."""
    table = pa.table(
        {name: pa.array(columns[name], type=SCORES_SCHEMA.field(name).type) for name in SCORES_SCHEMA.names}
    )
    write_atomically(path, lambda part: pq.write_table(table, part))


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write named arrays as safetensors, atomically."""
    ready = {name: np.asarray(a, order="C") for name, a in arrays.items()}
    write_atomically(path, lambda part: safetensors.numpy.save_file(ready, part))


@dataclass(frozen=True)
class Run:
    """A finished run as read from the store.

    Args:
        path: Its directory; the directory's name is the run id.
        config: The resolved settings, table by table.
        summary: The outcome; see `simulation.run.Outcome`.
        trace: One dict a step, keys as in `TRACE_SCHEMA`.
        environment: Versions, device, threads.
        images: Named arrays; empty if the run stored none.
        scores: Columns of `SCORES_SCHEMA`; empty if the run had no detectors.
    """

    path: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    trace: Sequence[Mapping[str, Any]]
    environment: Mapping[str, Any]
    images: Mapping[str, NDArray[np.float32]]
    scores: Mapping[str, NDArray[Any]] = field(default_factory=dict)


def read_run(path: str | Path) -> Run:
    """One finished run.

    Raises:
        StoreError: A file is missing or unreadable.
    """
    path = path_of(path)
    try:
        with (path / CONFIG).open("rb") as handle:
            config = tomllib.load(handle)
        summary = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
        environment = json.loads((path / ENVIRONMENT).read_text(encoding="utf-8"))
        trace = pq.read_table(path / TRACE).to_pylist()
        _check_shape(summary, environment, trace)
        images = safetensors.numpy.load_file(path / IMAGES) if (path / IMAGES).exists() else {}
        scores = _read_scores(path / SCORES) if (path / SCORES).exists() else {}
    except (OSError, ValueError, TypeError, pa.ArrowException, safetensors.SafetensorError) as error:
        raise StoreError(
            f"{path} is not a readable finished run ({type(error).__name__}: {error}); finish it with --resume, "
            "or delete it."
        ) from error
    return Run(path, config, summary, trace, environment, images, scores)


def _read_scores(path: Path) -> dict[str, NDArray[Any]]:
    table = pq.read_table(path)
    if missing := set(SCORES_SCHEMA.names) - set(table.column_names):
        raise ValueError(f"{SCORES} lacks {', '.join(sorted(missing))}")
    table = table.select(SCORES_SCHEMA.names).cast(SCORES_SCHEMA)
    return {name: table.column(name).to_numpy() for name in SCORES_SCHEMA.names}


def _check_shape(summary: object, environment: object, trace: Sequence[Mapping[str, Any]]) -> None:
    if not (isinstance(summary, dict) and isinstance(environment, dict)):
        raise TypeError(f"{SUMMARY} and {ENVIRONMENT} must each hold an object")
    if not trace:
        raise ValueError(f"{TRACE} has no rows")
    if missing := set(TRACE_SCHEMA.names) - trace[0].keys():
        raise ValueError(f"{TRACE} lacks {', '.join(sorted(missing))}")


def finished(path: Path) -> bool:
    """Whether this directory holds a run that has ended."""
    return (path / SUMMARY).is_file()


def read_runs(directories: str | Path | Sequence[str | Path]) -> list[Run]:
    """All finished runs in one or several directories (run directories, or directories of them), ordered by name.

    Raises:
        StoreError: A directory does not exist, or none holds a finished run.
    """
    folders = [directories] if isinstance(directories, str | Path) else directories
    paths: list[Path] = []
    for directory in map(path_of, folders):
        if not directory.is_dir():
            raise StoreError(f"{directory} is not a directory; give the --out directory of a run.")
        paths += [directory] if finished(directory) else sorted(p.parent for p in directory.glob(f"*/{SUMMARY}"))
    if not paths:
        raise StoreError(f"no finished run in {', '.join(map(str, folders))}; `mithridate run RECIPE.toml` makes some.")
    return [read_run(path) for path in dict.fromkeys(paths)]
