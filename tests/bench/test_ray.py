"""Cells as tasks of a Ray cluster: the same rows as in one process, and what is said where Ray is not there."""

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mithridate.bench import store
from mithridate.bench.engine import run_recipe
from mithridate.bench.ray import QUIET
from mithridate.bench.recipe import Recipe, read_recipe
from mithridate.bench.store import read_runs
from mithridate.core.errors import EngineError
from tests.command import invoke
from tests.recipes import ACCUMULATIVE, Log, same_runs, tiny_recipe, tiny_text

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra 'ray' is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray leaves files open

PLUGIN = """
import os, signal
from pathlib import Path
import mithridate as mi

@mi.register("defence", "frail")
@mi.settings
class Frail(mi.Defence):
    "Raises, or ends its process, before the third step, while there is a file that says so."

    def begin(self, view):
        how = Path(__file__).parent / "how"
        word = how.read_text() if view.step == 2 and how.exists() else ""
        if word == "raise":
            raise RuntimeError("broke")
        if word == "die once":
            how.unlink()
        if word:
            os.kill(os.getpid(), signal.SIGKILL)
"""
GRID = 'plugins = ["frail_of_ray.py"]\n' + tiny_text(
    '[[attack]]\nname = "noise"\n' + ACCUMULATIVE + '[[defence]]\nname = "none"\n[[defence]]\nname = "frail"\n',
    "run.seeds=[0, 1]",
)


def test_without_ray_a_sentence_says_how_to_get_it(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=r"needs Ray, .*`pip install 'mithridate\[ray\]'`"):
        run_recipe(tiny_recipe(), tmp_path / "runs", device="cpu", cache=cache, engine="ray", jobs=None)
    (tmp_path / "tiny.toml").write_text(tiny_text(), encoding="utf-8")
    call = ("run", tmp_path / "tiny.toml", "--engine", "ray", "--out", tmp_path / "out", "--cache", cache)
    done = invoke(*call)
    assert done.code == 2
    assert "pip install 'mithridate[ray]'" in done.err
    assert not (tmp_path / "out").exists()


def test_an_old_ray_is_told(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {name: ModuleType(name) for name in ("ray", "ray.util", "ray.util.queue")}
    modules["ray"].__dict__.update(__version__="2.54.3", util=modules["ray.util"])
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(EngineError, match=r"Ray 2\.54\.3 is installed, and --engine ray needs 2\.55 or newer"):
        run_recipe(tiny_recipe(), tmp_path / "runs", device="cpu", cache=cache, engine="ray", jobs=None)
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of one machine with two CPUs."""
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*QUIET)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield ray
        ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("ray")
    (folder / "frail_of_ray.py").write_text(PLUGIN, encoding="utf-8")
    (folder / "grid.toml").write_text(GRID, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    return read_recipe(folder / "grid.toml")


@pytest.fixture(scope="module")
def whole(folder: Path, recipe: Recipe) -> Path:
    """The store that one process made; read only."""
    assert run_recipe(recipe, folder / "whole", device="cpu", cache=folder / "cache").ran == 8
    return folder / "whole"


def assert_whole(out: Path, whole: Path) -> None:
    runs, right = read_runs(out), read_runs(whole)
    assert [run.path.name for run in runs] == [run.path.name for run in right]
    assert all(same_runs(a, b) for a, b in zip(runs, right, strict=True))
    assert all(a.environment == b.environment for a, b in zip(runs, right, strict=True))


@needs_ray
@pytest.mark.slow
def test_a_cluster_gives_the_rows_of_one_process(tmp_path: Path, cluster: Any, recipe: Recipe, whole: Path) -> None:
    log = Log()
    grid = run_recipe(
        recipe, tmp_path / "out", device="cpu", cache=tmp_path / "cache", engine="ray", jobs=None, watcher=log
    )
    assert (grid.ran, grid.skipped, dict(grid.failed)) == (8, 0, {})
    assert_whole(tmp_path / "out", whole)
    assert sorted(log.epochs) == [(0, 1), (0, 2), (1, 1), (1, 2)]  # each burn-in once
    assert sorted(log.steps) == sorted([1, 2, 3] * 8)


@needs_ray
@pytest.mark.slow
def test_a_cell_that_fails_on_a_cluster_is_named_and_one_whose_process_is_lost_is_tried_again(
    folder: Path, tmp_path: Path, cluster: Any, recipe: Recipe, whole: Path
) -> None:
    (folder / "how").write_text("raise", encoding="utf-8")
    grid = run_recipe(recipe, tmp_path, device="cpu", cache=folder / "cache", engine="ray", jobs=2)
    assert grid.ran == 4
    assert {failure.message for failure in grid.failed.values()} == {
        "Frail.begin (in the module frail_of_ray) raised RuntimeError: broke."
    }
    (folder / "how").write_text("die once", encoding="utf-8")
    grid = run_recipe(recipe, tmp_path, device="cpu", cache=folder / "cache", engine="ray", jobs=2, resume=True)
    assert (grid.ran, grid.skipped, dict(grid.failed)) == (4, 4, {})
    assert not (folder / "how").exists()  # a process has died
    assert_whole(tmp_path, whole)


@needs_ray
@pytest.mark.slow
def test_an_interrupt_leaves_no_task_on_a_cluster_and_cells_to_be_resumed(
    folder: Path, tmp_path: Path, cluster: Any, recipe: Recipe, whole: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path, device="cpu", cache=folder / "cache", engine="ray", jobs=1, watcher=Log(2))
    deadline = time.monotonic() + 60
    while cluster.available_resources().get("CPU") != 2:
        assert time.monotonic() < deadline, "a task is still at work"
        time.sleep(0.1)
    assert not store.failed(tmp_path)
    assert run_recipe(recipe, tmp_path, device="cpu", cache=folder / "cache", resume=True).failed == {}
    assert_whole(tmp_path, whole)


@needs_ray
@pytest.mark.slow
def test_a_process_that_is_lost_again_and_again_is_named(
    folder: Path, tmp_path: Path, cluster: Any, recipe: Recipe, whole: Path
) -> None:
    (folder / "how").write_text("always die", encoding="utf-8")
    try:
        grid = run_recipe(recipe, tmp_path, device="cpu", cache=folder / "cache", engine="ray", jobs=2)
    finally:
        (folder / "how").unlink()
    assert grid.ran == 4
    lost = [failure.message.startswith("its process on the cluster is lost (") for failure in grid.failed.values()]
    assert lost == [True] * 4
    assert run_recipe(recipe, tmp_path, device="cpu", cache=folder / "cache", resume=True).ran == 4
    assert_whole(tmp_path, whole)


@needs_ray
@pytest.mark.slow
def test_a_cluster_that_is_gone_in_the_middle_leaves_cells_to_be_resumed(
    folder: Path, tmp_path: Path, recipe: Recipe, whole: Path
) -> None:
    """The command makes a cluster, which is killed: all of it but the command."""
    from tests.bench.test_local import Started

    started = Started(folder, tmp_path / "out", "--engine", "ray", "--jobs", "1")
    started.until(lambda: len(list(started.out.glob("*/SHA256SUMS"))) >= 2)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = (
                os.getpgid(int(process.name)) == started.process.pid
                or int((process / "stat").read_text().rpartition(")")[2].split()[3]) == started.process.pid
            )
            if ours and int(process.name) != started.process.pid:
                os.kill(int(process.name), signal.SIGKILL)
        except (OSError, IndexError):
            continue
    assert started.process.wait(120) == 2
    assert "error: the Ray cluster cannot be used, or is gone (" in started.log.read_text(encoding="utf-8")
    grid = run_recipe(recipe, tmp_path / "out", device="cpu", cache=folder / "cache", resume=True)
    assert grid.skipped >= 2
    assert not grid.failed
    assert_whole(tmp_path / "out", whole)
