"""The run store: what is written comes back, a failure leaves the old file, and nothing foreign is believed."""

import hashlib
import io
import json
import math
import pickle
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mithridate.bench import store
from mithridate.bench.store import TRACE_SCHEMA, Run, read_run, read_runs
from mithridate.core.errors import StoreError, WriteError
from mithridate.core.files import write_atomically

CONFIG: dict[str, Any] = {
    "data": {"name": "digits"},
    "attack": {"name": "pgd", "eps": 0.1, "sizes": [1, 2], "loud": False},
    "run": {"name": "Käse → 漢字", "seed": 7},
}
SUMMARY: dict[str, Any] = {"accuracy": 0.75, "batches": 5, "stopped": None, "notes": ["a", "b"]}
ENVIRONMENT = {"torch": "2.13.0", "threads": 2}
FILES = (store.CONFIG, store.TRACE, store.SUMMARY, store.ENVIRONMENT, store.IMAGES)
WRITTEN = (*FILES, store.SUMS)


def row(step: int = 0, **values: Any) -> dict[str, Any]:
    by_type = {pa.int64(): step, pa.float64(): 0.5, pa.string(): "", pa.bool_(): True}
    return {f.name: by_type[f.type] for f in TRACE_SCHEMA} | values


ROWS = [
    row(0, phase="start", batch_loss=None, admitted=None),
    row(1, phase="accumulative", loss=math.nan, gradient_norm=math.inf, admitted=False, verdict='too "long", ü'),
    row(2, phase="trigger", accuracy=0.1 + 0.2, alarms="loss; accuracy"),
]


def images() -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    return {"trigger.clean": np.random.default_rng(0).random((2, 3, 4, 5), dtype=np.float32)}


def write_run(
    path: Path,
    *,
    summary: Mapping[str, Any] = SUMMARY,
    with_images: bool = True,
    trace: Sequence[Mapping[str, Any]] = ROWS,
    arrays: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> Path:
    sums = {
        store.CONFIG: store.write_toml(path / store.CONFIG, CONFIG),
        store.TRACE: store.write_trace(path / store.TRACE, trace),
        store.ENVIRONMENT: store.write_json(path / store.ENVIRONMENT, ENVIRONMENT),
        store.SUMMARY: store.write_json(path / store.SUMMARY, summary),
    }
    if with_images:
        sums[store.IMAGES] = store.write_arrays(path / store.IMAGES, images() if arrays is None else arrays)
    store.seal(path, sums)
    return path


def seal_as_it_is(path: Path) -> None:
    """Give whatever stands there checksums, as if it had been written so."""
    there = {name: path / name for name in store.FILES if (path / name).exists()}
    store.seal(path, {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in there.items()})


def same_row(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Equal, where NaN equals NaN and None does not."""
    return a.keys() == b.keys() and all(
        type(a[k]) is type(b[k]) and (a[k] == b[k] or (a[k] != a[k] and b[k] != b[k])) for k in a
    )


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name not in WRITTEN)


# There and back.


def test_a_run_comes_back_as_it_was(tmp_path: Path) -> None:
    found = read_run(write_run(tmp_path / "a"))
    assert found.path == tmp_path / "a"
    assert found.config == CONFIG
    assert found.summary == SUMMARY
    assert found.environment == ENVIRONMENT
    assert all(same_row(a, b) for a, b in zip(found.trace, ROWS, strict=True))
    assert found.images.keys() == images().keys()
    np.testing.assert_array_equal(found.images["trigger.clean"], images()["trigger.clean"])
    assert found.images["trigger.clean"].dtype == np.float32
    assert leftovers(tmp_path / "a") == []


def test_a_run_without_images(tmp_path: Path) -> None:
    assert read_run(write_run(tmp_path, with_images=False)).images == {}


def test_a_key_that_a_row_lacks_reads_as_none(tmp_path: Path) -> None:
    store.write_trace(tmp_path / "t.parquet", [{"step": 4}])
    assert pq.read_table(tmp_path / "t.parquet").to_pylist() == [dict.fromkeys(TRACE_SCHEMA.names) | {"step": 4}]


def test_a_key_that_is_no_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column acuracy"):
        store.write_trace(tmp_path / "t.parquet", [row(), row(1, acuracy=0.5)])
    assert leftovers(tmp_path) == []


floats = st.none() | st.floats()
rows = st.fixed_dictionaries(
    {
        f.name: {
            pa.int64(): st.integers(0, 2**62),
            pa.float64(): floats,
            pa.string(): st.none() | st.text(st.characters(codec="utf-8")),
            pa.bool_(): st.none() | st.booleans(),
        }[f.type]
        for f in TRACE_SCHEMA
    }
)


@settings(deadline=None, max_examples=40)
@given(st.lists(rows, min_size=1, max_size=3))
def test_any_trace_comes_back(tmp_path_factory: pytest.TempPathFactory, trace: list[dict[str, Any]]) -> None:
    path = write_run(tmp_path_factory.mktemp("run"), with_images=False, trace=trace)
    assert all(same_row(a, b) for a, b in zip(read_run(path).trace, trace, strict=True))


@pytest.mark.parametrize(
    "array",
    [
        np.array(3, dtype=np.int64),  # BatchNorm's counter has no axis
        np.zeros((0, 4), dtype=np.float32),
        np.arange(6, dtype=np.float64).reshape(2, 3).T,
        np.arange(12, dtype=np.uint8)[::2],
        np.array([True, False]),
        np.array([math.nan, -math.inf, -0.0], dtype=np.float32),
    ],
)
def test_arrays_keep_shape_type_and_bits(array: np.ndarray[Any, Any], tmp_path: Path) -> None:
    path = write_run(tmp_path, arrays={"a": array, "b": array})
    for name in ("a", "b"):
        found = read_run(path).images[name]
        assert (found.shape, found.dtype) == (array.shape, array.dtype)
        assert found.tobytes() == array.tobytes()


# Whole or not at all.


def refuse(part: Path) -> NoReturn:
    part.write_text("half a")
    raise OSError("disk full")


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "summary.json"
    store.write_json(path, {"old": 1})
    with pytest.raises(WriteError, match="disk full"):
        write_atomically(path, refuse)
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in path.parent.iterdir()] == ["summary.json"]


def test_a_writer_that_fails_at_first_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="disk full"):
        write_atomically(tmp_path / "a.json", refuse)
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_in_place_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    seen: list[str] = []

    def write(part: Path) -> None:
        assert part.parent == path.parent, "a move between file systems would not be atomic"
        part.write_text("new")
        seen.append(path.read_text())

    write_atomically(path, write)
    assert (seen, path.read_text()) == (["old"], "new")
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_refuses_what_json_has_not(value: float, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    store.write_json(path, {"accuracy": 0.5})
    with pytest.raises(ValueError, match="Out of range float"):
        store.write_json(path, {"deep": [{"accuracy": value}]})
    assert json.loads(path.read_text()) == {"accuracy": 0.5}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize(
    ("name", "write"),
    [
        (store.CONFIG, lambda path: store.write_toml(path, {"floor": None})),
        (store.TRACE, lambda path: store.write_trace(path, [row(step="three")])),  # type: ignore[arg-type]  # on purpose: what is refused
        (store.IMAGES, lambda path: store.write_arrays(path, {"a": np.array([{}], dtype=object)})),
        (store.SUMMARY, lambda path: store.write_json(path, {"a": object()})),
    ],
)
def test_what_cannot_be_written_leaves_the_old_run(name: str, write: Any, tmp_path: Path) -> None:
    path = write_run(tmp_path)
    with pytest.raises(Exception):  # noqa: B017, PT011  (each format has its own error)
        write(path / name)
    assert read_run(path).summary == SUMMARY
    assert leftovers(path) == []


# Finding runs.


def names(runs: list[Run]) -> list[str]:
    return [run.path.name for run in runs]


def test_runs_are_found_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a-10", "a-2", "seed=0"):
        write_run(tmp_path / name)
    write_run(tmp_path / "deeper" / "too deep")
    (tmp_path / "killed").mkdir()
    store.write_toml(tmp_path / "killed" / store.CONFIG, CONFIG)
    (tmp_path / "notes.txt").write_text("not a run")
    assert store.unfinished([tmp_path]) == [tmp_path / "killed"]
    assert names(read_runs([tmp_path])) == ["a-10", "a-2", "b", "seed=0"]
    assert names(read_runs([tmp_path / "b", tmp_path])) == ["b", "a-10", "a-2", "seed=0"]
    assert names(read_runs([tmp_path / "deeper", tmp_path / "b", tmp_path / "b"])) == ["too deep", "b"]
    assert set(read_run(tmp_path / "seed=0").trace[0]) == set(TRACE_SCHEMA.names), "a folder's name is no column"


def test_finished_means_that_the_checksums_are_there(tmp_path: Path) -> None:
    assert not store.finished(tmp_path / "nowhere")
    write_run(tmp_path)
    assert store.finished(tmp_path)
    (tmp_path / store.SUMS).unlink()
    assert not store.finished(tmp_path)
    with pytest.raises(StoreError, match="no SHA256SUMS; finish it with --resume"):
        read_runs(tmp_path)


def test_the_checksums_are_those_of_sha256sum(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    sums = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in FILES}
    lines = (path / store.SUMS).read_text(encoding="utf-8").splitlines()
    assert sorted(lines) == sorted(f"{digest}  {name}" for name, digest in sums.items())


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere is not a directory; give"):
        read_runs([tmp_path, tmp_path / "nowhere"])
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file is not a directory"):
        read_runs([tmp_path / "file"])


def test_no_finished_run(tmp_path: Path) -> None:
    store.write_toml(tmp_path / "killed" / store.CONFIG, CONFIG)
    for place in (tmp_path, tmp_path / "killed"):
        with pytest.raises(StoreError, match=r"no finished run in .*mithridate run"):
            read_runs([place])
    with pytest.raises(StoreError, match=r"killed is no finished run.*--resume"):
        read_run(tmp_path / "killed")


# Foreign and broken files.


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[(bit // 8) % len(content)] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


CHANGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "without its last line": lambda path: path.write_bytes(path.read_bytes().rpartition(b"\n")[0]),
    **{f"bit {bit}": lambda path, bit=bit: flip(path, bit) for bit in range(3, 40_000, 1999)},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_happens_to_a_file_is_noticed(name: str, change: str, tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    CHANGES[change](path / name)
    named = r"SHA256SUMS" if name == store.SUMS else rf"run/{name} is damaged \(.*--resume, or delete .*run\."
    with pytest.raises(StoreError, match=named):
        read_run(path)
    with pytest.raises(StoreError, match=named):
        read_runs([tmp_path])


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_of_another_run_is_noticed(name: str, tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    other = write_run(
        tmp_path / "other", summary={**SUMMARY, "accuracy": 0.5}, trace=ROWS[:2], arrays={"a": np.ones(3)}
    )
    store.write_toml(other / store.CONFIG, {**CONFIG, "title": "other"})
    store.write_json(other / store.ENVIRONMENT, {"torch": "other"})
    seal_as_it_is(other)
    assert read_run(other).summary["accuracy"] == 0.5
    (path / name).write_bytes((other / name).read_bytes())
    with pytest.raises(StoreError, match=r"run/.*is damaged"):
        read_run(path)


def test_a_file_without_a_checksum_is_noticed(tmp_path: Path) -> None:
    path = write_run(tmp_path, with_images=False)
    store.write_arrays(path / store.IMAGES, images())
    with pytest.raises(StoreError, match=r"images\.safetensors is damaged \(it has no checksum"):
        read_run(path)


class Trap:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def object_array(mark: Path) -> bytes:
    handle = io.BytesIO()
    np.save(handle, np.array([Trap(mark)], dtype=object), allow_pickle=True)
    return handle.getvalue()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["empty", "noise", "cut", "pickle", "object array"])
def test_a_file_of_another_kind_is_an_error_and_is_never_unpickled(name: str, kind: str, tmp_path: Path) -> None:
    path, mark = write_run(tmp_path / "run"), tmp_path / "unpickled"
    content = {
        "empty": b"",
        "noise": np.random.default_rng(0).bytes(400),
        "cut": (path / name).read_bytes()[:-7],
        "pickle": pickle.dumps(Trap(mark)),
        "object array": object_array(mark),
    }[kind]
    (path / name).write_bytes(content)
    seal_as_it_is(path)
    if name == store.CONFIG and kind == "empty":
        assert read_run(path).config == {}, "an empty TOML file is valid TOML"
        return
    with pytest.raises(StoreError, match=rf"run/{name} is damaged"):
        read_run(path)
    with pytest.raises(StoreError):
        read_runs([tmp_path])
    assert not mark.exists()


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "mark")))  # noqa: S301  (its own pickle, to show what would happen)
    assert (tmp_path / "mark").exists()


def bfloat16() -> bytes:
    header = json.dumps({"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0\0"


def parquet(table: pa.Table) -> bytes:
    handle = io.BytesIO()
    pq.write_table(table, handle)
    return handle.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (store.SUMMARY, b"[1, 2]", "must hold an object"),
        (store.ENVIRONMENT, b"null", "must hold an object"),
        (store.IMAGES, bfloat16(), "BF16"),
        (store.TRACE, parquet(pa.table({"step": [1], "phase": ["start"]})), "lacks accuracy, admitted"),
        (store.TRACE, parquet(TRACE_SCHEMA.empty_table()), "has no rows"),
    ],
)
def test_a_sound_file_of_another_shape(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (write_run(tmp_path) / name).write_bytes(content)
    seal_as_it_is(tmp_path)
    with pytest.raises(StoreError, match=reason):
        read_run(tmp_path)


# Names of directories.


LABELS = ("a", "A", "a_", "a__b", "b", "_b", "a-b", "a.b", "a" * 64, "a" * 63 + "b", "a+b", "b__seed1", "con")


def test_every_pair_of_labels_has_a_directory_of_its_own() -> None:
    pairs = [(a, b, seed) for a in LABELS for b in LABELS for seed in (0, 1, 11)]
    names = [store.run_id(*pair) for pair in pairs]
    assert len({name.lower() for name in names}) == len(pairs), "as a file system without capitals sees them"
    assert max(map(len, names)) <= 130
    assert len({store.run_id("a" * 64, "b" * 129 + end, 0) for end in "xyz"}) == 3
    assert store.run_id("pgd", "none", 3) == "pgd__none__seed3"
