"""A log of JSON lines: whole lines whatever happens to disk and process, bounded, and never in the way."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mithridate.guard.json_lines import JsonLines, read_json_lines

LOG = logging.getLogger("mithridate")


def opened(path: Path, **more: Any) -> JsonLines:
    return JsonLines(path, {"event": "opened"}, log=LOG, **more)


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    opened(path).write({"number": 1})
    with path.open("ab") as file:
        file.write(b'{"number": 2, "rea')
    opened(path).write({"number": 3})
    entries, broken = read_json_lines(path)
    assert [entry.get("number") for entry in entries] == [None, 1, None, 3]
    assert broken == 1


def test_a_disk_that_fills_up_within_a_line_is_told_once_and_spoils_no_later_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log.jsonl"
    lines = opened(path)
    write = os.write
    room = [5, 0, 0]

    def short(handle: int, data: bytes) -> int:
        return write(handle, data[: room.pop(0)])

    monkeypatch.setattr(os, "write", short)
    with caplog.at_level(logging.WARNING, "mithridate"):
        for number in range(3):
            lines.write({"number": number})
    monkeypatch.undo()
    lines.write({"number": 3})
    lines.write({"number": 4})
    assert [entry.get("number") for entry in read_json_lines(path)[0]] == [None, 3, 4]
    assert ["No space left" in message and "training goes on" in message for message in caplog.messages] == [True]


def test_it_is_turned_over_and_each_file_says_whose_it_is(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = opened(path, largest=300)
    for number in range(100):
        lines.write({"number": number})
        assert path.stat().st_size <= 300
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", "log.jsonl.1"]
    for file in tmp_path.iterdir():
        assert json.loads(file.read_text().splitlines()[0]) == {"event": "opened"}
    numbers = [entry["number"] for entry in read_json_lines(path)[0] if "number" in entry]
    assert numbers == list(range(numbers[0], 100))


def test_what_json_lacks_becomes_a_number_or_text(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    numbers = {"numpy": np.float32(0.5), "torch": torch.tensor(float("inf")), "scores": [1.0, float("-inf")]}
    opened(path).write({"loss": float("nan"), "where": Path("a"), "type": torch.float32, **numbers})
    assert read_json_lines(path)[0][1] == {
        "loss": "nan",
        "where": "a",
        "type": "torch.float32",
        "numpy": 0.5,
        "torch": "inf",
        "scores": [1.0, "-inf"],
    }


def test_what_is_no_entry_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n[1]\n\n\xff\n' + b"[" * 100_000 + b'\n{"a": 2}\n')
    assert read_json_lines(path) == ([{"a": 1}, {"a": 2}], 3)
