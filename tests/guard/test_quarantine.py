"""The quarantine: batches go in and come out bit for bit, nothing else is trusted, and nothing is lost unasked."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mithridate.core.batch import AnyBatch, Batch, tensors_of
from mithridate.core.errors import ConfigError, DataError, StoreError, UserError, WriteError
from mithridate.core.files import write_whole
from mithridate.core.targets import IGNORED
from mithridate.guard import Quarantine, StepRecord, read_batch
from mithridate.guard.entry import UNKNOWN, known_targets
from mithridate.guard.quarantine import COUNT, LEFT_OUT, LOCK, MARKER
from mithridate.guard.step_log import read_steps

REFUSED = StepRecord(attempt=7, step=5, verdict="refused", reason="worst class fell to 0.1", seconds=0.02, rank=1)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


IMAGES = Batch(draw(4, 3, 8, 8), torch.arange(4))

BATCHES: dict[str, AnyBatch] = {
    "images": IMAGES,
    "mapping": Batch({"input_ids": torch.arange(12).view(3, 4), "a/..b": torch.ones(3, 1, dtype=torch.bool)}, draw(3)),
    "sequence": Batch([draw(2, 5), draw(2, dtype=torch.bfloat16)], torch.tensor([[1, 0], [0, 1]])),
    "one in a sequence": Batch((draw(2, 5),), draw(2)),
    "views and broadcast": Batch(draw(6, 4).t()[:2], torch.zeros(1).expand(2)),
    "not finite": Batch(torch.tensor([[float("nan")], [float("inf")]]), torch.tensor([0, 1])),
    "needs gradients": Batch(draw(2, 2).requires_grad_(), draw(2)),
}


@pytest.fixture
def quarantine(tmp_path: Path) -> Quarantine:
    return Quarantine(tmp_path / "quarantine")


def bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(-1).view(torch.uint8)


# In and out.


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_comes_out_as_it_went_in(name: str, quarantine: Quarantine, tmp_path: Path) -> None:
    batch = BATCHES[name]
    path = quarantine.release(quarantine.put(batch, record=REFUSED), to=tmp_path / "again")
    out = read_batch(path)
    assert type(out.x) is (list if isinstance(batch.x, tuple) else type(batch.x))
    if isinstance(batch.x, dict):
        assert list(out.x) == list(batch.x)
    for before, after in zip([*tensors_of(batch.x), batch.y], [*tensors_of(out.x), out.y], strict=True):
        assert (before.dtype, before.shape) == (after.dtype, after.shape)
        assert bits(before).equal(bits(after))
    assert bits(read_batch(path.with_suffix(".json")).y).equal(bits(out.y))


def test_it_is_described_in_full(quarantine: Quarantine) -> None:
    scores = torch.tensor([0.25, float("nan"), 1e9, float("-inf")])
    name = quarantine.put(IMAGES, record=REFUSED, scores=scores)
    (entry,) = quarantine.list()
    content = (quarantine.folder / f"{name}.safetensors").read_bytes()
    assert str(quarantine.show(name)) == str(entry)  # as text, for NaN is not NaN
    assert (entry.id, entry.attempt, entry.step, entry.rank) == (name, 7, 5, 1)
    assert (entry.verdict, entry.reason, entry.size, entry.problem) == ("refused", "worst class fell to 0.1", 4, "")
    assert (entry.sha256, entry.bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    assert entry.shapes == {"inputs": "float32 (4, 3, 8, 8)", "targets": "int64 (4)"}
    assert entry.scores is not None
    np.testing.assert_array_equal(entry.scores, scores.numpy())
    assert entry.time.endswith("+00:00")
    json.loads((quarantine.folder / f"{name}.json").read_text(), parse_constant=pytest.fail)  # JSON knows no NaN


def test_arrays_are_those_that_numpy_knows(quarantine: Quarantine) -> None:
    arrays = quarantine.arrays(quarantine.put(BATCHES["sequence"], record=REFUSED))
    assert set(arrays) == {"inputs.0", "targets"}
    np.testing.assert_array_equal(arrays["targets"], [[1, 0], [0, 1]])


def test_targets_that_a_guard_did_not_see_are_not_shown_as_targets() -> None:
    assert UNKNOWN == IGNORED
    assert known_targets({"targets": np.array([3, IGNORED, 0])}) == [3, None, 0]
    assert known_targets({"targets": np.full(3, IGNORED)}) is None
    assert known_targets({"targets": np.zeros((3, 2))}) is None
    assert known_targets({"inputs": np.zeros(3)}) is None


def test_the_order_is_that_of_the_attempts_and_the_same_batch_again_is_no_second_one(quarantine: Quarantine) -> None:
    names = [quarantine.put(IMAGES, record=replace(REFUSED, attempt=n, rank=r)) for n, r in [(10, 0), (9, 1), (9, 0)]]
    assert [entry.id for entry in quarantine.list()] == names[::-1]
    assert quarantine.put(IMAGES, record=replace(REFUSED, attempt=10, rank=0)) == names[0]
    assert len(quarantine.list()) == 3


def test_dropping_and_releasing_leave_nothing_behind(quarantine: Quarantine, tmp_path: Path) -> None:
    first, second = (quarantine.put(IMAGES, record=replace(REFUSED, attempt=n)) for n in (1, 2))
    quarantine.drop(first)
    quarantine.release(second, to=tmp_path / "again")
    assert quarantine.list() == ()
    assert {p.name for p in quarantine.folder.iterdir()} <= {MARKER, LOCK}
    assert {p.suffix for p in (tmp_path / "again").iterdir()} == {".safetensors", ".json"}


# No room.


def test_a_full_one_takes_no_more_loses_nothing_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quarantine = Quarantine(tmp_path / "q", max_bytes=10_000)
    with caplog.at_level(logging.WARNING, "mithridate"):
        names = [quarantine.put(IMAGES, record=replace(REFUSED, attempt=n)) for n in range(1, 8)]
    stored = [name for name in names if name]
    assert 1 <= len(stored) < 7
    assert names == stored + [""] * (7 - len(stored))
    assert [entry.id for entry in quarantine.list()] == stored
    assert sum(p.stat().st_size for p in quarantine.folder.iterdir() if p.stem in stored) <= 10_000
    (message,) = caplog.messages
    assert "at most 10,000" in message
    assert "mithridate quarantine list" in message
    assert quarantine.left_out() == 7 - len(stored)
    quarantine.drop(stored[0])
    assert quarantine.put(IMAGES, record=REFUSED)  # there is room again
    for path in quarantine.folder.glob(f"{stored[1]}.*"):  # by hand
        path.unlink()
    assert quarantine.put(IMAGES, record=replace(REFUSED, attempt=9))
    for count in ("", "-", "0"):
        (quarantine.folder / COUNT).write_text(count)
        assert Quarantine(tmp_path / "q", max_bytes=10_000).put(IMAGES, record=replace(REFUSED, attempt=10)) == ""
    with pytest.raises(ConfigError, match="max_bytes = -1"):
        Quarantine(tmp_path / "q", max_bytes=-1)


def test_a_full_disk_stops_nothing_and_leaves_nothing_half_written(
    quarantine: Quarantine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    before = {p.name for p in quarantine.folder.iterdir()}
    monkeypatch.setattr(Path, "write_bytes", full)
    with caplog.at_level(logging.WARNING, "mithridate"):
        assert quarantine.put(IMAGES, record=REFUSED) == ""
        assert quarantine.put(IMAGES, record=REFUSED) == ""
    monkeypatch.undo()
    assert ["No space left on device" in message for message in caplog.messages] == [True]
    assert {p.name for p in quarantine.folder.iterdir()} - before <= {LEFT_OUT, LOCK, COUNT}
    assert quarantine.left_out() == 2
    assert quarantine.put(IMAGES, record=REFUSED)


def test_several_write_to_one_folder_and_keep_to_its_size(tmp_path: Path) -> None:
    names: dict[int, list[str]] = {}

    def work(rank: int) -> None:
        own = Quarantine(tmp_path / "q", max_bytes=20_000)
        names[rank] = [own.put(IMAGES, record=replace(REFUSED, attempt=n, rank=rank)) for n in range(1, 6)]

    workers = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    stored = {name for several in names.values() for name in several if name}
    assert sorted(names) == [0, 1, 2]
    assert 1 < len(stored) < 15
    quarantine = Quarantine.existing(tmp_path / "q")
    assert {entry.id for entry in quarantine.list()} == stored
    assert quarantine.left_out() == 15 - len(stored)
    assert sum(p.stat().st_size for p in quarantine.folder.iterdir() if p.stem in stored) <= 20_000


def test_a_folder_that_another_process_makes_at_the_same_moment_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, is_file = tmp_path / "q", Path.is_file

    def made_after_the_look(path: Path) -> bool:
        there = is_file(path)
        if path == folder / MARKER and not there:
            monkeypatch.undo()
            Quarantine(folder)  # the other process
        return there

    monkeypatch.setattr(Path, "is_file", made_after_the_look)
    assert Quarantine(folder).list() == ()


def test_a_process_that_was_killed_while_it_wrote_leaves_no_batch_that_can_be_taken(
    quarantine: Quarantine, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_whole

    def killed_before_the_description(path: Path, content: bytes | str) -> None:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        written(path, content)

    monkeypatch.setattr("mithridate.guard.quarantine.write_whole", killed_before_the_description)
    with pytest.raises(KeyboardInterrupt):
        quarantine.put(IMAGES, record=REFUSED)
    monkeypatch.undo()
    (entry,) = quarantine.list()
    assert entry.problem.endswith("is missing: it can only be dropped.")
    with pytest.raises(DataError, match="can only be dropped"):
        read_batch(quarantine.folder / f"{entry.id}.safetensors")
    assert quarantine.put(IMAGES, record=REFUSED) == entry.id  # the resumed training meets the same batch
    assert quarantine.show(entry.id).problem == ""


# Not ours.


def test_a_folder_that_is_not_ours_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(StoreError, match=r"holds 'cat\.png' and no quarantine\.json"):
        Quarantine(tmp_path / "photos")
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.png"]
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / MARKER).write_text('{"format": "mithridate-quarantine-9"}')
    with pytest.raises(StoreError, match=r"says 'mithridate-quarantine-9'"):
        Quarantine(tmp_path / "newer")
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="cannot be written"):
        Quarantine(tmp_path / "file")
    with pytest.raises(StoreError, match="is no quarantine of this library"):
        Quarantine.existing(tmp_path)
    Quarantine(tmp_path / "guard" / "quarantine")
    assert Quarantine.existing(tmp_path / "guard").folder == tmp_path / "guard" / "quarantine"


@pytest.mark.parametrize("name", ["", ".", "../secret", "/etc/passwd", "a1-r0-01234567/..", "a1-r0", "quarantine"])
def test_an_id_is_never_a_path(name: str, quarantine: Quarantine, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "secret.safetensors").write_text("")
    for act in (quarantine.show, quarantine.drop, quarantine.arrays):
        with pytest.raises(ConfigError, match="is no id of a batch"):
            act(name)
    with pytest.raises(ConfigError, match="is no id of a batch"):
        quarantine.release(name, to=tmp_path / "out")
    assert (tmp_path / "secret.json").exists()
    with pytest.raises(UserError):
        read_batch(tmp_path / name)
    with pytest.raises(DataError, match="there is no batch a1-r0-01234567"):
        quarantine.drop("a1-r0-01234567")


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def relabelled(path: Path) -> None:
    """Another hash in the description, to fit a file that was changed: the id does not fit then."""
    changed(path)
    description = path.with_suffix(".json")
    entry = json.loads(description.read_text())
    entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    description.write_text(json.dumps(entry))


def linked(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.replace(target)
    path.symlink_to(target)


def described_as(text: str) -> Callable[[Path], object]:
    return lambda path: path.with_suffix(".json").write_text(text)


SPOILT: dict[str, Callable[[Path], object]] = {
    "a bit": changed,
    "a bit and its hash": relabelled,
    "cut short": lambda path: os.truncate(path, 100),
    "no tensors": Path.unlink,
    "a link": linked,
    "no description": lambda path: path.with_suffix(".json").unlink(),
    "another's description": described_as('{"id": "a9-r9-01234567", "attempt": 9, "rank": 9}'),
    "no JSON": described_as("{"),
    "deep JSON": described_as("[" * 100_000),
    "JSON of other types": described_as('{"id": 3, "attempt": "x", "shapes": []}'),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_not_as_it_was_stored_is_told_and_only_dropped(
    what: str, quarantine: Quarantine, tmp_path: Path
) -> None:
    name = quarantine.put(IMAGES, record=REFUSED)
    SPOILT[what](quarantine.folder / f"{name}.safetensors")
    assert "can only be dropped" in quarantine.show(name).problem
    assert [entry.id for entry in quarantine.list()] == [name]
    with pytest.raises(DataError, match="can only be dropped"):
        quarantine.release(name, to=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="can only be dropped"):
        read_batch(quarantine.folder / f"{name}.safetensors")
    quarantine.drop(name)
    assert quarantine.list() == ()


def test_releasing_overwrites_nothing(quarantine: Quarantine, tmp_path: Path) -> None:
    name = quarantine.put(IMAGES, record=REFUSED)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{name}.json").write_text("mine")
    with pytest.raises(StoreError, match="is there already"):
        quarantine.release(name, to=tmp_path / "out")
    with pytest.raises(ConfigError, match="inside the quarantine"):
        quarantine.release(name, to=quarantine.folder / "sub")
    assert (tmp_path / "out" / f"{name}.json").read_text() == "mine"
    assert quarantine.show(name).problem == ""


def test_what_is_no_batch_is_the_callers_mistake(quarantine: Quarantine) -> None:
    with pytest.raises(DataError, match="give a Batch"):
        quarantine.put([1, 2], record=REFUSED)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(DataError, match="2 scores for 4 samples"):
        quarantine.put(IMAGES, record=REFUSED, scores=[0.1, 0.2])


def test_a_safetensors_file_of_somebody_else_is_no_batch(quarantine: Quarantine) -> None:
    import safetensors.torch

    content: Any = safetensors.torch.save({"weight": torch.ones(2)})
    digest = hashlib.sha256(content).hexdigest()
    name = f"a1-r0-{digest[:8]}"
    (quarantine.folder / f"{name}.safetensors").write_bytes(content)
    entry = {"id": name, "attempt": 1, "bytes": len(content), "sha256": digest}
    (quarantine.folder / f"{name}.json").write_text(json.dumps(entry))
    with pytest.raises(DataError, match="no batch of this library"):
        read_batch(quarantine.folder / f"{name}.safetensors")


FILLS = """
import sys, torch
from mithridate.core.batch import Batch
from mithridate.core.targets import IGNORED
from mithridate.guard import Quarantine, StepLog, StepRecord
folder, rank, life = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
quarantine, log = Quarantine(folder + "/quarantine"), StepLog(folder, defence={}, environment={}, rank=rank)
print("begun", flush=True)
for number in range(1, 100_000):
    record = StepRecord(attempt=1_000_000 * life + number, step=0, verdict="refused", seconds=0.1, rank=rank)
    quarantine.put(Batch(torch.rand(50, 3, 16, 16), torch.arange(50)), record=record)
    log.note(record)
"""


@pytest.mark.slow
def test_processes_that_are_killed_while_they_write_spoil_nothing(tmp_path: Path) -> None:
    for life in range(2):
        several = [
            subprocess.Popen([sys.executable, "-c", FILLS, tmp_path, str(rank), str(life)], stdout=subprocess.PIPE)  # noqa: S603  (our own code)
            for rank in (0, 1)
        ]
        for process in several:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"
        for process in several:
            time.sleep(0.2)
            process.kill()
            process.communicate()
    quarantine = Quarantine.existing(tmp_path)
    entries = quarantine.list()
    cut_short = [entry for entry in entries if entry.problem]
    assert len(entries) > 20
    assert len(cut_short) <= 4  # one a kill at most
    assert all("is missing" in entry.problem for entry in cut_short)
    for entry in entries:
        if not entry.problem:
            assert read_batch(quarantine.folder / f"{entry.id}.safetensors").size == 50
    assert quarantine.put(IMAGES, record=REFUSED)
    assert not list(quarantine.folder.glob(".*.part"))
    steps = read_steps(tmp_path)
    assert steps.attached == 2
    assert sum(map(len, steps.by_rank.values())) > 20
    assert steps.broken <= 4
