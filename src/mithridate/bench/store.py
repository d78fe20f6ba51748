"""The run store: one directory a run, plain formats, every write atomic. Imports no torch, so a report needs none.

Layout of `DIR/<run id>/`:

- `config.toml`: the resolved settings, itself a recipe of this one run: its title, plug-ins and variant, and the tables
  `bench.changes.TABLES`, as far as the run has them.
- `trace.parquet`: one row a step, columns `TRACE_SCHEMA`; the first row is the state before the stream.
- `summary.json`: the outcome, and what it was made from: `settings_key`, `samples_key`, `inputs_key` (samples, and
  files that settings name) and `burn_in_key`.
- `environment.json`: versions, processor, threads, precision; what of it was another when the burn-in of the victim
  (`burn_in`) or of a surrogate (`surrogate`) was trained, or before the run was resumed (`resumed`).
- `scores.parquet`: what detectors said of each sample, columns `SCORES_SCHEMA`; only if the recipe has detectors.
- `images.safetensors`: a few images, float32 (n, channels, height, width) in [0, 1], as `<phase>.clean` and
  `<phase>.poisoned` for the phases `accumulative` and `trigger`.
- `SHA256SUMS`: a checksum a file, as `sha256sum -c` reads them; written last: a run without it is unfinished.
- `state.safetensors`, `journal.jsonl`: where a killed run goes on; removed when it has finished.
- `error.json`: why a run failed (see `bench.failure`), with a checksum of its own; removed when the run goes on.
- `.lock`: held by the process that writes here.

Beside the runs stands `DIR/grid.json`, which says which runs were planned (see `bench.plan`).
"""

import hashlib
import io
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
from mithridate.core.files import path_of, remove_parts, write_whole, writing
from mithridate.simulation.trace import COLUMNS, TraceRow

CONFIG, TRACE, SUMMARY, ENVIRONMENT, IMAGES, SCORES = (
    "config.toml",
    "trace.parquet",
    "summary.json",
    "environment.json",
    "images.safetensors",
    "scores.parquet",
)
SUMS = "SHA256SUMS"
STATE, JOURNAL, ERROR, LOCK = "state.safetensors", "journal.jsonl", "error.json", ".lock"

ALWAYS = (CONFIG, TRACE, SUMMARY, ENVIRONMENT)
"""The files that every finished run has."""

FILES = (*ALWAYS, IMAGES, SCORES)
"""The files that a finished run may have, `SHA256SUMS` aside."""

_SUM = re.compile(r"([0-9a-f]{64})  (\S+)")

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
        # clean: before poisoning; received: what the learner got; ood: another image set; moved_now, moved_then: no
        # score, but the distance that poisoning moved the answer of the current, and of the old model
        ("source", pa.string()),
        ("detector", pa.string()),  # its label
        ("sample", pa.int64()),  # position in its batch
        ("poisoned", pa.bool_()),  # whether a received sample had been changed
        ("score", pa.float64()),  # lower is more suspicious; -inf where the detector had no number
    ]
)


def run_id(attack: str, defence: str, seed: int, *, variant: str = "") -> str:
    """The name of a run's directory: another one for all labels that differ, on every file system.

    Plain labels name themselves. Labels that could be mistaken for others (capitals, where a file system knows none;
    the separator within a label) or that are long get a hash of them all.

    Args:
        attack: Label of the attack.
        defence: Label of the defence.
        seed: The run's seed.
        variant: Label of what else a grid sets; empty: nothing.

    >>> run_id("pgd", "none", 0)
    'pgd__none__seed0'
    >>> run_id("pgd", "none", 0, variant="lr-0.1")
    'pgd__none__lr-0.1__seed0'
    >>> run_id("PGD", "none", 0)
    'PGD__none__seed0-b0a656fe59'
    """
    labels = [attack, defence, *([variant] if variant else [])]
    name = "__".join([*labels, f"seed{seed}"])
    unmistakable = name == name.lower() and name.count("__") == len(labels) and "___" not in name
    if unmistakable and len(name) <= _LONGEST:
        return name
    digest = hashlib.sha256(json.dumps(labels).encode()).hexdigest()[:10]
    short = "__".join(label[:40] for label in labels)
    return f"{short}__seed{seed}-{digest}"


_LONGEST = 120


def write_json(path: Path, value: object) -> str:
    """Write JSON atomically; NaN is refused, since JSON has none (use None). Returns the SHA-256."""
    return _write(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_toml(path: Path, value: Mapping[str, Any]) -> str:
    """Write TOML atomically. Returns the SHA-256."""
    return _write(path, tomli_w.dumps(value).encode())


def write_trace(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write trace rows (keys: columns of `TRACE_SCHEMA`; a missing one is None) atomically. Returns the SHA-256.

    Raises:
        ValueError: A row has a key that is no column.
    """
    if strange := {key for row in rows for key in row} - set(TRACE_SCHEMA.names):
        raise ValueError(f"the trace has no column {', '.join(sorted(strange))}")
    return _write(path, _parquet(pa.Table.from_pylist([dict(row) for row in rows], schema=TRACE_SCHEMA)))


def write_scores(path: Path, columns: Mapping[str, NDArray[Any]]) -> str:
    """Write scores (columns of `SCORES_SCHEMA`) atomically. Returns the SHA-256."""
    return _write(
        path,
        _parquet(
            pa.table(
                {name: pa.array(columns[name], type=SCORES_SCHEMA.field(name).type) for name in SCORES_SCHEMA.names}
            )
        ),
    )


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> str:
    """Write named arrays as safetensors, atomically. Returns the SHA-256."""
    return _write(path, safetensors.numpy.save({name: np.asarray(a, order="C") for name, a in arrays.items()}))


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _write(path: Path, content: bytes) -> str:
    """The checksum is of what was meant to be written, so that it tells whatever the disk does to it."""
    write_whole(path, content)
    return hashlib.sha256(content).hexdigest()


def seal(directory: Path, sums: Mapping[str, str]) -> None:
    """Declare a run finished.

    Args:
        directory: Its directory.
        sums: What the writers of this module returned, by name of the file.
    """
    _write(directory / SUMS, _sums_text(sums).encode())


def _sums_text(sums: Mapping[str, str]) -> str:
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


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
        StoreError: A file is missing, is not as it was written, or is unreadable; the message names it.
    """
    path = path_of(path)
    content = read_files(path)
    name = CONFIG
    try:
        config = tomllib.loads(content[CONFIG].decode())
        name = SUMMARY
        summary = _json_object(content[SUMMARY])
        name = ENVIRONMENT
        environment = _json_object(content[ENVIRONMENT])
        name = TRACE
        trace = pq.read_table(io.BytesIO(content[TRACE])).to_pylist()
        _check_trace(trace)
        name = IMAGES
        images = safetensors.numpy.load(content[IMAGES]) if IMAGES in content else {}
        name = SCORES
        scores = _read_scores(content[SCORES]) if SCORES in content else {}
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException, safetensors.SafetensorError) as error:
        raise _damage(path / name, f"{type(error).__name__}: {error}") from error
    return Run(path, config, summary, trace, environment, images, scores)


def read_files(directory: Path) -> dict[str, bytes]:
    """The files of a finished run, each exactly as it was written.

    Raises:
        StoreError: One is missing or has changed, or stands there without a checksum.
    """
    sums = _read_sums(directory)
    content: dict[str, bytes] = {}
    for name in FILES:
        path = directory / name
        if name not in sums:
            if path.exists():
                raise _damage(path, f"it has no checksum in {SUMS}")
            continue
        try:
            content[name] = path.read_bytes()
        except OSError as error:
            raise _damage(path, error.strerror or str(error)) from error
        if hashlib.sha256(content[name]).hexdigest() != sums[name]:
            raise _damage(path, f"its checksum is not that of {SUMS}: one of the two has changed since the run")
    return content


def _read_sums(directory: Path) -> dict[str, str]:
    path = directory / SUMS
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError as error:
        raise StoreError(
            f"{directory} is no finished run, for it has no {SUMS}; finish it with --resume, or delete it."
        ) from error
    except (OSError, ValueError) as error:
        raise _damage(path, str(error)) from error
    found = {match[2]: match[1] for line in text.splitlines() if (match := _SUM.fullmatch(line))}
    if text != _sums_text(found) or not set(ALWAYS) <= set(found) <= set(FILES):
        raise _damage(path, "it is not as it was written")
    return found


def _damage(path: Path, reason: str) -> StoreError:
    return StoreError(
        f"{path} is damaged ({reason}); make the run anew by the command that made it with --resume, or delete "
        f"{path.parent}."
    )


def _json_object(content: bytes) -> dict[str, Any]:
    value = json.loads(content)
    if not isinstance(value, dict):
        raise TypeError("it must hold an object")
    return value


def _read_scores(content: bytes) -> dict[str, NDArray[Any]]:
    table = pq.read_table(io.BytesIO(content))
    if missing := set(SCORES_SCHEMA.names) - set(table.column_names):
        raise ValueError(f"{SCORES} lacks {', '.join(sorted(missing))}")
    table = table.select(SCORES_SCHEMA.names).cast(SCORES_SCHEMA)
    return {name: table.column(name).to_numpy() for name in SCORES_SCHEMA.names}


def _check_trace(trace: Sequence[Mapping[str, Any]]) -> None:
    if not trace:
        raise ValueError("it has no rows")
    if missing := set(TRACE_SCHEMA.names) - trace[0].keys():
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")


def finished(path: Path) -> bool:
    """Whether this directory holds a run that has ended."""
    return (path / SUMS).is_file()


def read_summary(path: Path) -> dict[str, Any]:
    """The outcome of a finished run as it stands there, without a look at its checksum."""
    return _json_object((path / SUMMARY).read_bytes())


def holds_run(path: Path) -> bool:
    """Whether this directory holds files of a run, finished or not."""
    return any((path / name).exists() for name in (*FILES, SUMS, STATE, JOURNAL))


def begun(path: Path) -> bool:
    """Whether this directory holds a run, or why one failed before it held anything else."""
    return holds_run(path) or (path / ERROR).exists()


def vacant(path: Path) -> bool:
    """Whether a run can be written there without touching anything: nothing is there, or a lock alone."""
    names = [p.name for p in path.iterdir() if p.suffix != ".part"] if path.exists() else [LOCK]
    return names == [LOCK]


def clear(directory: Path) -> None:
    """Remove every file of a run, so that another can be written there; what is not the store's stays.

    Raises:
        WriteError: The file system refuses.
    """
    with writing(directory):
        for name in (SUMS, *FILES, STATE, JOURNAL, ERROR):  # without the first, the others are of no finished run
            (directory / name).unlink(missing_ok=True)
    remove_parts(directory)


def tidy(directory: Path) -> None:
    """Remove what a finished run no longer needs, where that can be."""
    with suppress(OSError):
        for name in (STATE, JOURNAL, ERROR):
            (directory / name).unlink(missing_ok=True)
    remove_parts(directory)


def _ended(path: Path) -> bool:
    """Whether this directory holds what only the end of a run writes."""
    return any((path / name).exists() for name in (SUMS, SUMMARY, TRACE))


def unfinished(directories: str | Path | Sequence[str | Path]) -> list[Path]:
    """The runs in some directories (as in `read_runs`) that have begun and not ended, ordered by name.

    Those that failed are not among them; see `failed`.
    """
    begun = (path for path in _candidates(directories) if holds_run(path) and not _ended(path))
    return [path for path in begun if not (path / ERROR).exists()]


def failed(directories: str | Path | Sequence[str | Path]) -> list[Path]:
    """The runs in some directories (as in `read_runs`) that failed and have not been finished since, by name."""
    return [path for path in _candidates(directories) if (path / ERROR).exists() and not _ended(path)]


def _candidates(directories: str | Path | Sequence[str | Path]) -> list[Path]:
    paths = [path for folder in _folders(directories) for path in (folder, *sorted(folder.glob("*/")))]
    return list(dict.fromkeys(paths))


def _folders(directories: str | Path | Sequence[str | Path]) -> list[Path]:
    return [path_of(d) for d in ([directories] if isinstance(directories, str | Path) else directories)]


def read_runs(directories: str | Path | Sequence[str | Path]) -> list[Run]:
    """All finished runs in one or several directories (run directories, or directories of them), ordered by name.

    Runs that have not ended are left out; `unfinished` says which.

    Raises:
        StoreError: A directory does not exist, none holds a finished run, or a file of one is damaged.
    """
    folders = _folders(directories)
    paths: list[Path] = []
    for directory in folders:
        if not directory.is_dir():
            raise StoreError(f"{directory} is not a directory; give the --out directory of a run.")
        paths += [directory] if _ended(directory) else [p for p in sorted(directory.glob("*/")) if _ended(p)]
    if not paths:
        raise StoreError(f"no finished run in {', '.join(map(str, folders))}; `mithridate run RECIPE.toml` makes some.")
    return [read_run(path) for path in dict.fromkeys(paths)]
