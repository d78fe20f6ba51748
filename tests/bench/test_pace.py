"""The time left of a grid, by hand; and what a store says of itself."""

import json
from pathlib import Path

import pytest

from mithridate.bench import store
from mithridate.bench.engine import run_recipe
from mithridate.bench.pace import Pace, about
from mithridate.bench.plan import GRID, Plan, Work, read_plan, write_plan
from mithridate.bench.status import status
from mithridate.core.errors import StoreError
from tests.recipes import Log, tiny_recipe

WORKS = [
    Work("noise-a", "noise", "none", steps=11, epochs=4, burn_in="a"),
    Work("accu-a", "accu", "none", steps=11, epochs=4, burn_in="a"),
    Work("noise-b", "noise", "none", steps=11, epochs=4, burn_in="b"),
    Work("accu-b", "accu", "clip", steps=11, epochs=4, burn_in="b"),
]


def test_what_is_left_is_taken_to_go_like_what_was_like_it() -> None:
    pace = Pace(WORKS)
    assert (pace.seconds_left(), pace.seconds_of_burn_ins(), pace.cells_left) == (None, None, 4)
    for epoch in (1, 2, 3, 4):
        pace.trained("noise-a", epoch, 10.0)
    assert (pace.seconds_left(), pace.seconds_of_burn_ins()) == (None, 40.0)  # that of b
    pace.stepped("noise-a", 1, 2.0)
    assert pace.seconds_left() == 40 + 2 * (10 + 11 + 11 + 11)  # nothing is known of accu
    pace.finished("noise-a")
    pace.stepped("accu-a", 1, 5.0)
    pace.stepped("accu-a", 2, 7.0)
    assert pace.seconds_left() == 40 + 6 * (9 + 11) + 2 * 11  # accu against clip goes like accu against none
    pace.stepped("accu-b", 3, 20.0)  # and its burn-in is there
    assert pace.seconds_left() == 6 * 9 + 2 * 11 + 20 * 8
    assert pace.seconds_of_burn_ins() == 0
    for run in ("accu-a", "noise-b", "accu-b"):
        pace.finished(run)
    assert (pace.seconds_left(), pace.cells_left) == (0, 0)


def test_several_runs_at_a_time_are_as_long_as_the_longest() -> None:
    pace = Pace(WORKS, jobs=2)
    for run in ("noise-a", "noise-b"):
        pace.finished(run, {"seconds": 11.0, "steps": 10, "burn_in_seconds": 40.0})
    assert pace.seconds_left() == 11
    pace.stepped("accu-b", 5, 100.0)
    assert pace.seconds_left() == 11 * 100  # more than half of all


def test_the_summary_of_a_finished_run_is_counted_step_by_step() -> None:
    pace = Pace(WORKS)
    pace.finished("noise-a", {"seconds": 55.0, "steps": 10, "burn_in_seconds": 40.0})
    assert pace.seconds_left() == 40 + 5 * 33
    assert pace.seconds_measured == 55


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (59, "under a minute"),
        (600, "about 10 min"),
        (5340, "about 89 min"),
        (10800, "about 3.0 h"),
        (36000, "about 10 h"),
    ],
)
def test_times_are_told_for_people(seconds: float, words: str) -> None:
    assert about(seconds) == words


def test_a_plan_is_added_to_what_the_store_was_to_hold_before(tmp_path: Path) -> None:
    assert read_plan(tmp_path) is None
    write_plan(tmp_path, Plan(WORKS[:2], jobs=2))
    assert read_plan(tmp_path) == Plan(WORKS[:2], jobs=2)
    before = (tmp_path / GRID).stat().st_mtime_ns
    write_plan(tmp_path, Plan(WORKS[:2], jobs=2))
    assert (tmp_path / GRID).stat().st_mtime_ns == before
    write_plan(tmp_path, Plan(WORKS[1:3]))
    assert read_plan(tmp_path) == Plan(WORKS[:3], jobs=1)
    (tmp_path / GRID).write_text("{", encoding="utf-8")
    write_plan(tmp_path, Plan(WORKS[3:]))
    assert read_plan(tmp_path) == Plan(WORKS[3:])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"grid\.json is damaged \(JSONDecodeError"),
        ("[]", r"grid\.json is damaged"),
        ('{"format": 1, "jobs": 1, "cells": [{"run": "a"}]}', r"grid\.json is damaged"),
        ('{"format": 99, "jobs": 1, "cells": []}', "was made by a newer version"),
    ],
)
def test_a_plan_that_cannot_be_read_is_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / GRID).write_text(text, encoding="utf-8")
    with pytest.raises(StoreError, match=message):
        status(tmp_path)
    if "newer" in message:
        with pytest.raises(StoreError, match=message):
            run_recipe(tiny_recipe(), tmp_path, device="cpu", cache=tmp_path / "cache", resume=True)
        assert [p.name for p in tmp_path.iterdir()] == [GRID]
        assert (tmp_path / GRID).read_text(encoding="utf-8") == text


def test_the_status_of_a_grid_from_its_start_to_its_end(tmp_path: Path, cache: Path) -> None:
    recipe = tiny_recipe('[[defence]]\nname = "none"\n[[defence]]\nname = "clip"\n', "run.seeds=[0, 1]")
    runs = [cell.run_id for cell in recipe.cells()]

    def states() -> list[tuple[str, str, int, int | None]]:
        return [(cell.run, cell.state, cell.step, cell.steps) for cell in status(tmp_path).cells]

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path, device="cpu", cache=cache, watcher=Log(at_epoch=1))
    assert states() == [(run, "waiting", 0, 4) for run in runs]
    assert status(tmp_path).seconds_left is None
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path, device="cpu", cache=cache, resume=True, watcher=Log(2, cell=runs[1]))
    assert states() == [
        (runs[0], "finished", 4, 4),
        (runs[1], "unfinished", 2, 4),
        (runs[2], "waiting", 0, 4),
        (runs[3], "waiting", 0, 4),
    ]
    left = status(tmp_path).seconds_left
    summary = store.read_summary(tmp_path / runs[0])
    burn_in = summary["burn_in_seconds"]  # of the other seed
    assert left == pytest.approx(summary["seconds"] / 4 * (2 + 4 + 4) + burn_in)
    run_recipe(tiny_recipe("", "attack.name=clean"), tmp_path, device="cpu", cache=cache, resume=True)
    assert states()[4:] == [("clean__none__seed0", "finished", 4, 4)]
    run_recipe(recipe, tmp_path, device="cpu", cache=cache, resume=True)
    assert [state for _, state, _, _ in states()] == ["finished"] * 5
    assert status(tmp_path).seconds_left == 0

    (tmp_path / GRID).unlink()  # a store of an older version
    assert [(cell.run, cell.state, cell.steps) for cell in status(tmp_path).cells] == [
        (run, "finished", None) for run in sorted([*runs, "clean__none__seed0"])
    ]
    (tmp_path / runs[0] / store.SUMMARY).write_text(json.dumps({"steps": None}), encoding="utf-8")
    with pytest.raises(StoreError, match=r"summary\.json is damaged"):
        status(tmp_path)


def test_what_is_no_store_has_no_status(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("", encoding="utf-8")
    for path in (tmp_path, tmp_path / "empty", tmp_path / "file", tmp_path / "nowhere"):
        with pytest.raises(StoreError, match=r"is no store; give the --out directory of `mithridate run`"):
            status(path)
