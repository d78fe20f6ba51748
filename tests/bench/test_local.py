"""Cells in several processes: the same rows, burn-ins trained once, and what becomes of processes that die."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mithridate.bench import store
from mithridate.bench.engine import Grid, run_recipe
from mithridate.bench.failure import read_failure
from mithridate.bench.recipe import Recipe, read_recipe
from mithridate.bench.store import read_run, read_runs
from tests.recipes import ACCUMULATIVE, Log, same_runs, tiny_text

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="processes are killed")]

PLUGIN = """
import os, signal
from pathlib import Path
import mithridate as mi

@mi.register("defence", "frail")
@mi.settings
class Frail(mi.Defence):
    "Raises, or ends its process, before the third step, while there is a file that says so."

    def begin(self, view):
        word = (Path(__file__).parent / "how").read_text() if view.step == 2 else ""
        if word == "raise":
            raise RuntimeError("broke")
        if word == "leave":
            os._exit(3)
        if word:
            os.kill(os.getpid(), int(word))
"""

GRID = (
    '[[attack]]\nname = "noise"\neps = 0.1\n'
    + ACCUMULATIVE
    + '[[defence]]\nname = "none"\n[[defence]]\nname = "clip"\nclip_norm = 0.5\n'
    + '[[detector]]\nname = "loss"\n[[defence]]\nname = "frail"\n'
)
FRAIL = ["noise__frail__seed0", "accu__frail__seed0", "noise__frail__seed1", "accu__frail__seed1"]

SRC = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of 12 cells with its plug-in; its burn-ins are cached beside it."""
    folder: Path = tmp_path_factory.mktemp("local")
    (folder / "frail_of_local.py").write_text(PLUGIN, encoding="utf-8")
    (folder / "how").write_text("", encoding="utf-8")
    text = 'plugins = ["frail_of_local.py"]\n' + tiny_text(GRID, "run.seeds=[0, 1]")
    (folder / "grid.toml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    return read_recipe(folder / "grid.toml")


@pytest.fixture(scope="module")
def whole(folder: Path, recipe: Recipe) -> Path:
    """The store that one process made; read only."""
    assert run_recipe(recipe, folder / "whole", device="cpu", cache=folder / "cache").ran == 12
    return folder / "whole"


def assert_whole(out: Path, whole: Path) -> None:
    runs, right = read_runs(out), read_runs(whole)
    assert [run.path.name for run in runs] == [run.path.name for run in right]
    assert all(same_runs(a, b) for a, b in zip(runs, right, strict=True))


def test_two_processes_give_the_rows_of_one(tmp_path: Path, recipe: Recipe, whole: Path) -> None:
    log = Log()
    grid = run_recipe(recipe, tmp_path / "out", device="cpu", cache=tmp_path / "cache", jobs=2, watcher=log)
    assert (grid.ran, grid.skipped, dict(grid.failed)) == (12, 0, {})
    assert [d.name for d in grid.directories] == [cell.run_id for cell in recipe.cells()]
    assert_whole(tmp_path / "out", whole)
    for name in (cell.run_id for cell in recipe.cells()):
        a, b = read_run(tmp_path / "out" / name), read_run(whole / name)
        assert a.environment == b.environment
        assert {p.name for p in a.path.iterdir()} == {p.name for p in b.path.iterdir()}
    assert sorted(log.epochs) == [(0, 1), (0, 2), (1, 1), (1, 2)]  # each burn-in once
    assert sorted(log.steps) == sorted([1, 2, 3] * 12)
    assert sorted(log.cells) == [(number, 12) for number in range(12)]
    again = run_recipe(recipe, tmp_path / "out", device="cpu", cache=tmp_path / "cache", jobs=2, resume=True)
    assert (again.ran, again.skipped) == (0, 12)


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ("raise", "RuntimeError", "Frail.begin (in the module frail_of_local) raised RuntimeError: broke."),
        (
            str(int(signal.SIGKILL)),
            "SIGKILL",
            "its process ended by SIGKILL, and is gone. It may have",
        ),
        ("leave", "exit code 3", "its process ended by exit code 3"),
    ],
)
def test_a_cell_that_fails_or_takes_its_process_along_is_named_and_the_others_go_on(
    folder: Path, tmp_path: Path, recipe: Recipe, whole: Path, how: str, kind: str, said: str
) -> None:
    def run(*, resume: bool) -> Grid:
        return run_recipe(recipe, tmp_path, device="cpu", cache=folder / "cache", jobs=2, resume=resume)

    (folder / "how").write_text(how, encoding="utf-8")
    try:
        grid = run(resume=False)
    finally:
        (folder / "how").write_text("", encoding="utf-8")
    assert sorted(grid.failed) == sorted(FRAIL)
    assert grid.ran == 8
    for name, failure in grid.failed.items():
        assert failure.kind == kind
        assert failure.message.startswith(said)
        assert read_failure(tmp_path / name) == failure
        assert (tmp_path / name / store.STATE).exists()
    grid = run(resume=True)
    assert (grid.ran, grid.skipped, dict(grid.failed)) == (4, 8, {})
    assert_whole(tmp_path, whole)


@contextmanager
def interrupts_heard() -> Iterator[None]:
    """Processes started inside hear Ctrl-C, also where these tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Started:
    """`mithridate run` in a process group of its own.

    Args:
        folder: Of the recipe.
        out: Directory of the store.
        arguments: More of them.
    """

    def __init__(self, folder: Path, out: Path, *arguments: str, recipe: str = "grid.toml") -> None:
        self.out, self.log = out, out.with_suffix(".txt")
        call = ["run", str(folder / recipe), "--out", str(out), "--device", "cpu", "--threads", "1", *arguments]
        with self.log.open("w", encoding="utf-8") as log, interrupts_heard():
            self.process = subprocess.Popen(  # noqa: S603  (our own command)
                [sys.executable, "-m", "mithridate", *call, "--cache", str(folder / "cache")],
                env={**os.environ, "PYTHONPATH": str(SRC)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def until(self, ready: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 180
        while not ready():
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def at_work(self) -> list[Path]:
        return list(self.out.glob("*/state.safetensors"))

    def gone(self) -> bool:
        """Whether no process of the group is left."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.05)
        return False


@pytest.fixture
def long(folder: Path) -> str:
    """A recipe whose cells take long enough to be interrupted."""
    text = tiny_text(
        '[attack]\nname = "accumulative"\nlabel = "accu"\nsteps = 5\n'
        '[[defence]]\nname = "none"\n[[defence]]\nname = "clip"\n',
        "data.victim=400",
        "data.batch_size=1",
        "run.steps=40",
    )
    (folder / "long.toml").write_text(text, encoding="utf-8")
    return "long.toml"


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGKILL"])
def test_all_processes_end_with_the_command_and_leave_cells_to_be_resumed(
    folder: Path, tmp_path: Path, long: str, how: str
) -> None:
    started = Started(folder, tmp_path / "out", "--jobs", "2", recipe=long)
    started.until(lambda: len(started.at_work()) == 2)
    if how == "Ctrl-C":
        os.killpg(started.process.pid, signal.SIGINT)  # as a terminal does it
    else:
        started.process.kill()
    code = started.process.wait(60)
    text = started.log.read_text(encoding="utf-8")
    assert "Traceback" not in text
    assert code == (130 if how == "Ctrl-C" else -signal.SIGKILL)
    assert ("--resume" in text) == (how == "Ctrl-C")
    assert started.gone()
    assert not store.failed(tmp_path / "out")
    recipe = read_recipe(folder / long)
    log = Log()
    resumed = run_recipe(recipe, tmp_path / "out", device="cpu", cache=folder / "cache", resume=True, watcher=log)
    assert (resumed.ran, len(log.steps) < 80) == (2, True)  # they went on
    run_recipe(recipe, tmp_path / "whole", device="cpu", cache=folder / "cache")
    assert_whole(tmp_path / "out", tmp_path / "whole")


def test_two_commands_share_the_cells_of_a_store(folder: Path, tmp_path: Path, whole: Path) -> None:
    first = Started(folder, tmp_path / "out")
    first.until(first.at_work)
    second = Started(folder, tmp_path / "out", "--resume")
    codes = {first.process.wait(180), second.process.wait(180)}
    text = first.log.read_text(encoding="utf-8") + second.log.read_text(encoding="utf-8")
    assert "Traceback" not in text
    assert codes <= {0, 1}
    if 1 in codes:
        assert "another process is at work" in text
    assert_whole(tmp_path / "out", whole)


def test_a_script_without_the_guard_is_told(folder: Path, tmp_path: Path) -> None:
    script = (
        "import mithridate as mi\n"
        f"recipe = mi.read_recipe({str(folder / 'grid.toml')!r})\n"
        "try:\n"
        f"    mi.run_recipe(recipe, {str(tmp_path / 'out')!r}, device='cpu', cache={str(folder / 'cache')!r}, jobs=2)\n"
        "except mi.UserError as error:\n"
        "    print('TOLD:', error)\n"
    )
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    done = subprocess.run(  # noqa: S603  (a fixed command)
        [sys.executable, str(tmp_path / "script.py")],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert "TOLD: a process of --jobs could not be started" in done.stdout
    assert 'if __name__ == "__main__"' in done.stdout
    assert not store.failed(tmp_path / "out")
