"""An item some of whose runs fail: what is there is shown, and what is not is named."""

from pathlib import Path
from typing import Any

import pytest

from mithridate.bench.place import Place
from mithridate.bench.running import run_cell
from mithridate.core.errors import StoreError
from mithridate.reproduce.item import read_item
from mithridate.reproduce.run import reproduce

NAME = "some2020-table1"


@pytest.mark.slow
def test_runs_that_fail_are_named_and_the_others_shown(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frail(place: Place, *values: Any) -> dict[str, Any]:
        if place.cell.defence.label == "clip":
            raise MemoryError("too large")
        return run_cell(place, *values)

    monkeypatch.setattr("mithridate.bench.workplace.run_cell", frail)
    monkeypatch.setattr("mithridate.report.figure_sections", lambda *_: [])
    options: dict[str, Any] = {"seeds": [0], "device": "cpu", "cache": tmp_path / "cache"}
    done = reproduce(read_item(NAME, folder), "smoke", tmp_path / "out", **options)
    assert [run.path.name for run in done.runs] == ["clean-stream__none__seed0", "vanilla__none__seed0"]
    assert [path.name for path in done.failures] == ["clean-stream__clip__seed0", "vanilla__clip__seed0"]
    assert {failure.message for failure in done.failures.values()} == {"MemoryError: too large."}
    page = done.report.html.read_text(encoding="utf-8")
    assert "Left out, for they failed" in page
    monkeypatch.setattr("mithridate.bench.workplace.run_cell", run_cell)
    again = reproduce(read_item(NAME, folder), "smoke", tmp_path / "out", **options)
    assert (len(again.runs), dict(again.failures)) == (4, {})


def test_an_item_without_a_finished_run_says_why(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mithridate.bench.workplace.prepare", lambda *_: 1 / 0)
    with pytest.raises(StoreError, match=f"every run of {NAME} failed: ZeroDivisionError: division by zero"):
        reproduce(read_item(NAME, folder), "smoke", tmp_path / "out", device="cpu", cache=tmp_path / "cache")
