"""Runs that fail: what is kept of them, what goes on, and how they are tried again."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mithridate.bench import store
from mithridate.bench.engine import Grid, run_recipe
from mithridate.bench.failure import Failure, read_failure, read_failures
from mithridate.bench.place import Place
from mithridate.bench.recipe import Cell, Recipe
from mithridate.bench.status import status
from mithridate.bench.store import read_run
from mithridate.core import registry
from mithridate.core.defence import Defence
from mithridate.core.errors import ConfigError, StoreError, WriteError
from mithridate.core.registry import Entry, settings
from mithridate.core.view import View
from mithridate.report.page import page
from mithridate.report.rows import rows
from tests.recipes import Log, files, same_runs, tiny_recipe

RECIPE = """
[[defence]]
name = "none"
[[defence]]
name = "frail"
[[defence]]
name = "clip"
"""
FRAIL = "noise__frail__seed0"

broken: list[int] = []
"""The step at which `frail` raises, while it is one."""


@settings
class Frail(Defence):
    """Does nothing, or raises."""

    def begin(self, view: View) -> None:
        if [view.step] == broken:
            raise RuntimeError("out of\norder \x1b[31m")


@pytest.fixture(autouse=True)
def _frail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._entries["defence"], "frail", Entry("defence", "frail", Frail, {}))
    broken[:] = []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The store in which nothing failed; read only."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._entries["defence"], "frail", Entry("defence", "frail", Frail, {}))
        assert run_recipe(recipe_of(), out, device="cpu", cache=cache).ran == 3
    return out


def recipe_of(*changes: str, defences: str = "") -> Recipe:
    return tiny_recipe(RECIPE, *changes, defences=defences)


def run(out: Path, cache: Path, *, resume: bool = False, log: Log | None = None) -> Grid:
    return run_recipe(recipe_of(), out, device="cpu", cache=cache, resume=resume, watcher=log)


def test_a_failed_run_is_recorded_and_the_others_go_on(tmp_path: Path, cache: Path, whole: Path) -> None:
    broken[:] = [2]
    log = Log()
    grid = run(tmp_path, cache, log=log)
    assert (grid.ran, grid.skipped, list(grid.failed)) == (2, 0, [FRAIL])
    assert [run for run, _ in log.ended] == ["noise__none__seed0", "noise__clip__seed0"]
    assert log.failed_runs == [FRAIL]
    for name in ("noise__none__seed0", "noise__clip__seed0"):
        assert same_runs(read_run(tmp_path / name), read_run(whole / name))

    failure = read_failure(tmp_path / FRAIL)
    assert failure == grid.failed[FRAIL]
    assert failure is not None
    assert (failure.kind, failure.told, failure.recorded, failure.busy) == ("RuntimeError", False, True, False)
    assert failure.message.startswith("Frail.begin (in the module ")
    assert failure.message.endswith("raised RuntimeError: out of order ?[31m.")
    assert 'raise RuntimeError("out of' in failure.traceback
    assert "test_failures.py" in failure.traceback

    assert (store.failed(tmp_path), store.unfinished(tmp_path)) == ([tmp_path / FRAIL], [])
    assert [run.path.name for run in store.read_runs(tmp_path)] == ["noise__clip__seed0", "noise__none__seed0"]
    html = page(rows(store.read_runs(tmp_path)), [], failed=read_failures(tmp_path))
    assert "Left out, for they failed" in html
    assert "raised RuntimeError: out of order" in html
    states = {cell.run: (cell.state, cell.step, cell.reason) for cell in status(tmp_path).cells}
    assert states[FRAIL] == ("failed", 2, failure.message)


def test_a_failed_run_goes_on_with_resume_and_only_with_it(tmp_path: Path, cache: Path, whole: Path) -> None:
    broken[:] = [2]
    run(tmp_path, cache)
    before = files(tmp_path)
    with pytest.raises(StoreError, match="go on with --resume"):
        run(tmp_path, cache)
    assert files(tmp_path) == before
    again = run(tmp_path, cache, resume=True)  # it fails again
    assert (again.ran, again.skipped, list(again.failed)) == (0, 2, [FRAIL])
    broken[:] = []
    log = Log()
    grid = run(tmp_path, cache, resume=True, log=log)
    assert (grid.ran, grid.skipped, dict(grid.failed)) == (1, 2, {})
    assert log.steps == [3]  # from its last whole step
    assert same_runs(read_run(tmp_path / FRAIL), read_run(whole / FRAIL))
    assert {p.name for p in (tmp_path / FRAIL).iterdir()} == {p.name for p in (whole / FRAIL).iterdir()}
    assert read_failures(tmp_path) == {}


def test_a_run_that_is_under_way_again_is_no_failed_one(tmp_path: Path, cache: Path) -> None:
    broken[:] = [2]
    run(tmp_path, cache)
    broken[:] = []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, cache, resume=True, log=Log(3))
    assert (store.failed(tmp_path), store.unfinished(tmp_path)) == ([], [tmp_path / FRAIL])


def test_what_cannot_be_prepared_is_tried_once_for_all_runs_of_a_seed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def fails(cell: Cell, context: Any) -> None:
        seeds.append(cell.seed)
        raise ConfigError("a detector lacks something.")

    monkeypatch.setattr("mithridate.bench.workplace.prepare", fails)
    recipe = recipe_of("run.seeds=[0, 1]", defences="none,clip")
    grid = run_recipe(recipe, tmp_path, device="cpu", cache=cache)
    assert seeds == [0, 1]
    assert {failure.message for failure in grid.failed.values()} == {"a detector lacks something."}
    assert [p.name for p in sorted((tmp_path / "noise__clip__seed1").iterdir())] == [".lock", "error.json"]
    assert [cell.state for cell in status(tmp_path).cells] == ["failed"] * 4
    monkeypatch.undo()
    monkeypatch.setitem(registry._entries["defence"], "frail", Entry("defence", "frail", Frail, {}))
    other = recipe_of("run.seeds=[0, 1]", "attack.eps=0.2", defences="none,clip")  # nothing was made with the old one
    assert run_recipe(other, tmp_path, device="cpu", cache=cache, resume=True).ran == 4


def test_a_full_disk_ends_the_grid(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(place: Place, *_: object) -> None:
        raise WriteError(f"{place.directory} cannot be written (No space left on device); make room.")

    monkeypatch.setattr("mithridate.bench.workplace.run_cell", full)
    log = Log()
    with pytest.raises(WriteError, match="noise__none__seed0 cannot be written"):
        run(tmp_path, cache, log=log)
    assert log.failed_runs == []


def test_a_grid_without_a_run_is_refused(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"grid has no cell"):
        run_recipe(dataclasses.replace(recipe_of(), seeds=()), tmp_path / "runs", device="cpu", cache=cache)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: text.replace("ValueError", "TypeError"),
        lambda text: "[]",
        lambda text: "{}",
        lambda text: "[" * 100_000,
        lambda text: text.replace('"kind"', '"kin"'),
        lambda text: "",
    ],
)
def test_a_damaged_record_is_told(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "run" / store.ERROR
    written = Failure.of(ValueError("why")).write(path.parent)
    assert read_failure(path.parent) == written
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(StoreError, match=r"error\.json is damaged .*; go on with --resume"):
        read_failure(path.parent)
    assert "error.json is damaged" in read_failures(tmp_path)["run"]
    (cell,) = status(tmp_path).cells
    assert cell.state == "failed"
    assert "error.json is damaged" in cell.reason


def test_a_finished_run_keeps_no_record(tmp_path: Path) -> None:
    (tmp_path / store.SUMS).write_text("", encoding="utf-8")
    assert not Failure.of(ValueError("late")).write(tmp_path).recorded
    assert [p.name for p in tmp_path.iterdir()] == [store.SUMS]
    (tmp_path / store.ERROR).write_text(json.dumps({}), encoding="utf-8")
    assert read_failure(tmp_path) is None


@pytest.mark.parametrize("out", ["s3://bucket/runs", "gs://x", "memory:/x", "https://host/x"])
def test_a_store_is_no_url(out: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given in (out, Path(out)):
        with pytest.raises(StoreError, match=r"is a URL, and a store is a directory"):
            run_recipe(recipe_of(), given, device="cpu", cache=cache)
    assert list(tmp_path.iterdir()) == []
