"""The log of a loop's steps: nothing notable is left out, the rest is bounded, and a resumed run reads as one."""

import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from mithridate.core.errors import StoreError, WriteError
from mithridate.guard import StepRecord, step_log
from mithridate.guard.record import Word
from mithridate.guard.step_log import StepLog, read_steps

STEP = StepRecord(attempt=1, step=0, verdict="admitted", seconds=0.0123456789)


def attached(folder: Path, rank: int = 0) -> StepLog:
    return StepLog(folder, defence={"name": "gate", "tolerance": 0.1}, environment={"torch": "2.13.0"}, rank=rank)


def attempts(folder: Path, rank: int = 0) -> list[int]:
    return [step.record.attempt for step in read_steps(folder).by_rank[rank]]


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    records = [
        STEP,
        StepRecord(
            attempt=2,
            step=1,
            verdict="refused",
            reason="worst class fell",
            seconds=0.5,
            quarantined=1,
            flagged=2,
            refusals_in_a_row=3,
            trusted_loss=0.25,
            trusted_worst=0.0,
            warm_up=True,
            batch="a2-r0-01234567",
        ),
        StepRecord(attempt=3, step=1, verdict="shortened", seconds=0.0, trusted_loss=float("inf")),
    ]
    log = attached(tmp_path)
    for record in records:
        log.note(record)
    steps = read_steps(tmp_path)
    assert [step.record for step in steps.by_rank[0]] == [replace(r, seconds=round(r.seconds, 6)) for r in records]
    assert (steps.attached, steps.taken_again, steps.broken) == (1, 0, 0)
    assert steps.about["defence"] == {"name": "gate", "tolerance": 0.1}
    assert steps.about["environment"] == {"torch": "2.13.0"}
    lines = (tmp_path / "steps.jsonl").read_text().splitlines()
    assert all(json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert json.loads(lines[1]).keys() == {"attempt", "step", "verdict", "seconds", "time"}


def test_admitted_steps_grow_rarer_and_no_other_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_log, "IN_FULL", 8)
    log = attached(tmp_path)
    odd: dict[int, Word] = {100: "refused", 333: "shortened"}
    for attempt in range(1, 1000):
        log.note(replace(STEP, attempt=attempt, verdict=odd.get(attempt, "admitted"), quarantined=int(attempt == 500)))
    log.close()
    log.close()
    seen = attempts(tmp_path)
    assert seen == sorted(set(seen))
    assert seen[:8] == list(range(1, 9))
    assert seen[8:16] == list(range(9, 25, 2))
    assert {100, 333, 500, 999} <= set(seen)
    assert len(seen) < 8 * 8 + 4  # 8 lines each time that the distance doubles, and those above
    assert max(b - a for a, b in pairwise(seen)) <= 128


def test_a_resumed_training_reads_as_one(tmp_path: Path) -> None:
    first = attached(tmp_path)
    for attempt in range(1, 8):
        first.note(replace(STEP, attempt=attempt, verdict="refused" if attempt in {3, 6} else "admitted"))
    with (tmp_path / "steps.jsonl").open("ab") as file:
        file.write(b'{"attempt": 8, "st')  # killed
    second = attached(tmp_path)
    for attempt in range(5, 10):
        second.note(replace(STEP, attempt=attempt))
    steps = read_steps(tmp_path)
    assert attempts(tmp_path) == list(range(1, 10))
    assert [s.record.attempt for s in steps.by_rank[0] if s.record.verdict == "refused"] == [3]
    assert (steps.attached, steps.taken_again, steps.broken) == (2, 3, 1)


def test_a_turned_over_log_is_read_as_one_and_every_file_says_whose_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = attached(tmp_path)
    monkeypatch.setattr(log._lines, "_largest", 2000)
    for attempt in range(1, 100):
        log.note(replace(STEP, attempt=attempt, verdict="refused"))
    assert {p.name for p in tmp_path.iterdir()} == {"steps.jsonl", "steps.jsonl.1"}
    assert all(p.stat().st_size <= 2000 for p in tmp_path.iterdir())
    seen = attempts(tmp_path)
    assert seen == list(range(seen[0], 100))
    steps = read_steps(tmp_path)
    assert (steps.attached, steps.taken_again) == (1, 0)
    assert steps.about["defence"]["name"] == "gate"


def test_each_rank_writes_its_own(tmp_path: Path) -> None:
    for rank in (11, 0, 2):
        attached(tmp_path, rank).note(replace(STEP, rank=rank, attempt=rank + 1))
    assert {rank: steps[0].record.attempt for rank, steps in read_steps(tmp_path).by_rank.items()} == {
        0: 1,
        2: 3,
        11: 12,
    }


def test_a_full_disk_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = attached(tmp_path)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    log.note(STEP)
    monkeypatch.undo()
    log.note(replace(STEP, attempt=2))
    assert attempts(tmp_path) == [2]


def test_a_folder_that_is_not_a_guards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is no folder of a guard"):
        read_steps(tmp_path)
    (tmp_path / "steps.jsonl").write_text('{"mine": 1}\n')
    for act in (attached, read_steps):
        with pytest.raises(StoreError, match=r"says it is None, not 'mithridate-steps-1'"):
            act(tmp_path)
    assert (tmp_path / "steps.jsonl").read_text() == '{"mine": 1}\n'
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="cannot be written"):
        attached(tmp_path / "file")


def test_lines_of_others_are_counted_and_left_out(tmp_path: Path) -> None:
    attached(tmp_path).note(STEP)
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"attempt": "x"}\n{"attempt": 2, "step": 0, "verdict": "praised", "seconds": 0}\n[]\n')
    steps = read_steps(tmp_path)
    assert (attempts(tmp_path), steps.broken) == ([1], 3)
