"""What a run goes on from: whatever happened to its files, two processes in one place, a full disk, other samples."""

import contextlib
import errno
import json
import resource
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mithridate.bench import store
from mithridate.bench.engine import Grid, run_recipe
from mithridate.bench.prepare import prepare
from mithridate.bench.recipe import Cell, make_recipe
from mithridate.bench.store import Run, read_run
from mithridate.core import registry
from mithridate.core.errors import StoreError, WriteError
from tests.recipes import Log, same_runs, tiny_recipe, tiny_tables

DETECTORS = """
[[detector]]
name = "loss"
[[detector]]
name = "discrepancy"
"""
NAME = "noise__none__seed0"

tables_of = partial(tiny_tables, DETECTORS, "run.steps=4")
recipe_of = partial(tiny_recipe, DETECTORS, "run.steps=4")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Run:
    """The run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    run_recipe(recipe_of(), out, device="cpu", cache=cache)
    return read_run(out / NAME)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Directories of runs that were killed after steps 2 and 3."""
    folder: Path = tmp_path_factory.mktemp("killed")
    for step in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe_of(), folder / str(step), device="cpu", cache=cache, watcher=Log(step))
    return folder


def copied(directory: Path, out: Path) -> Path:
    """A copy of a run's directory in another store."""
    return Path(shutil.copytree(directory, out / directory.name))


def leftovers(directory: Path) -> set[str]:
    return {p.name for p in directory.iterdir()} - {*store.FILES, store.SUMS, store.LOCK}


# Files that have changed.


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit": flip,
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "zeros": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
    "missing": Path.unlink,
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (store.CONFIG, "one bit"),
        (store.TRACE, "one bit"),
        (store.SUMMARY, "missing"),
        (store.SUMMARY, "zeros"),
        (store.ENVIRONMENT, "cut off"),
        (store.IMAGES, "missing"),
        (store.SCORES, "zeros"),
        (store.SUMS, "one bit"),
        (store.SUMS, "missing"),
    ],
)
def test_a_damaged_run_is_made_anew(tmp_path: Path, cache: Path, whole: Run, name: str, damage: str) -> None:
    directory = copied(whole.path, tmp_path)
    DAMAGES[damage](directory / name)
    log = Log()
    run_recipe(recipe_of(), tmp_path, device="cpu", cache=cache, resume=True, watcher=log)
    assert log.steps == [1, 2, 3, 4]
    assert same_runs(read_run(directory), whole)
    told = [] if (name, damage) == (store.SUMS, "missing") else [True]  # without it, the run had not finished
    assert [name in reason for reason in log.reasons] == told


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (store.STATE, "one bit"),
        (store.STATE, "missing"),
        (store.JOURNAL, "one bit"),
        (store.JOURNAL, "missing"),
        (store.CONFIG, "one bit"),
        (store.ENVIRONMENT, "zeros"),
    ],
)
def test_a_damaged_resume_point_is_no_dead_end(
    tmp_path: Path, cache: Path, whole: Run, killed: Path, name: str, damage: str
) -> None:
    directory = copied(killed / "2" / NAME, tmp_path)
    DAMAGES[damage](directory / name)
    log = Log()
    run_recipe(recipe_of(), tmp_path, device="cpu", cache=cache, resume=True, watcher=log)
    assert same_runs(read_run(directory), whole)
    assert leftovers(directory) == set()
    if name in {store.STATE, store.JOURNAL}:
        assert log.steps == [1, 2, 3, 4]
        assert bool(log.reasons) == ((name, damage) != (store.STATE, "missing"))
    else:
        assert log.steps == [3, 4]


@pytest.mark.parametrize("name", [store.STATE, store.JOURNAL])
def test_the_state_of_another_run_is_not_gone_on_with(
    tmp_path: Path, cache: Path, whole: Run, killed: Path, name: str
) -> None:
    directory = copied(killed / "2" / NAME, tmp_path)
    (directory / name).write_bytes((killed / "3" / NAME / name).read_bytes())
    log = Log()
    run_recipe(recipe_of(), tmp_path, device="cpu", cache=cache, resume=True, watcher=log)
    assert log.steps == [1, 2, 3, 4]
    assert same_runs(read_run(directory), whole)


def test_what_was_written_behind_the_last_resume_point_is_cut_off(
    tmp_path: Path, cache: Path, whole: Run, killed: Path
) -> None:
    directory = copied(killed / "2" / NAME, tmp_path)
    with (directory / store.JOURNAL).open("ab") as file:
        file.write(b'{"row": {"step": 3, "acc')
    (directory / ".state.safetensors.x.part").write_bytes(b"half")
    log = Log()
    run_recipe(recipe_of(), tmp_path, device="cpu", cache=cache, resume=True, watcher=log)
    assert log.steps == [3, 4]
    assert same_runs(read_run(directory), whole)
    assert leftovers(directory) == set()


def test_leftovers_of_a_process_that_was_killed_at_its_end_go(tmp_path: Path, cache: Path, whole: Run) -> None:
    directory = copied(whole.path, tmp_path)
    for name in (store.STATE, store.JOURNAL, ".summary.json.x.part"):
        (directory / name).write_bytes(b"old")
    assert run_recipe(recipe_of(), tmp_path, device="cpu", cache=cache, resume=True).skipped == 1
    assert leftovers(directory) == set()


# Other settings, other samples.


def test_a_damaged_run_of_other_settings_is_not_made_anew(tmp_path: Path, cache: Path) -> None:
    run_recipe(recipe_of("attack.eps=0.3"), tmp_path, device="cpu", cache=cache)
    flip(tmp_path / NAME / store.TRACE)
    before = (tmp_path / NAME / store.SUMMARY).read_bytes()
    with pytest.raises(StoreError, match=r"made with other settings \(attack\.eps\)"):
        run_recipe(recipe_of(), tmp_path, device="cpu", cache=cache, resume=True)
    (tmp_path / NAME / store.CONFIG).unlink()  # the summary still says so
    with pytest.raises(StoreError, match="made with other settings"):
        run_recipe(recipe_of(), tmp_path, device="cpu", cache=cache, resume=True)
    assert (tmp_path / NAME / store.SUMMARY).read_bytes() == before


def write_samples(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    np.savez(path, x=rng.integers(0, 256, (300, 1, 8, 8), dtype=np.uint8), y=np.arange(300) % 3)


@pytest.mark.parametrize("step", [2, None], ids=["unfinished", "finished"])
def test_samples_that_have_changed_since_are_noticed(tmp_path: Path, cache: Path, step: int | None) -> None:
    write_samples(tmp_path / "own.npz", 0)
    tables = tables_of()
    tables["data"] |= {"name": "npz", "path": str(tmp_path / "own.npz")}
    recipe, out = make_recipe(tables), tmp_path / "runs"
    with contextlib.suppress(KeyboardInterrupt):
        run_recipe(recipe, out, device="cpu", cache=cache, watcher=Log(step))
    changed = np.load(tmp_path / "own.npz")
    x, y = changed["x"].copy(), changed["y"]
    x[-1, 0, 0, 0] ^= 1  # one bit of one sample
    np.savez(tmp_path / "own.npz", x=x, y=y)
    with pytest.raises(StoreError, match="from other samples or files"):
        run_recipe(recipe, out, device="cpu", cache=cache, resume=True)
    write_samples(tmp_path / "own.npz", 0)
    assert len(run_recipe(recipe, out, device="cpu", cache=cache, resume=True).directories) == 1


def test_a_checkpoint_that_has_changed_since_is_noticed(tmp_path: Path, cache: Path, whole: Run) -> None:
    weights = tmp_path / "model.safetensors"
    epochs = cache / "burn_in" / whole.summary["burn_in_key"]
    first, second = (epochs / f"epoch-000{n}.safetensors" for n in (1, 2))
    tables = tables_of()
    tables["burn_in"] = {"checkpoint": str(weights)}
    tables["detector"] = [{"name": "loss"}]
    weights.write_bytes(second.read_bytes())
    run_recipe(make_recipe(tables), tmp_path / "runs", device="cpu", cache=cache)
    weights.write_bytes(first.read_bytes())
    with pytest.raises(StoreError, match="from other samples or files"):
        run_recipe(make_recipe(tables), tmp_path / "runs", device="cpu", cache=cache, resume=True)


# Two processes.


class Second(Log):
    """A second runner, in a thread of its own; its run waits for the first one's.

    Args:
        out: The store of both.
        cache: That of both.
    """

    def __init__(self, out: Path, cache: Path) -> None:
        super().__init__()
        self.waits = threading.Event()
        self.grids: list[Grid] = []
        self.thread = threading.Thread(target=self._run, args=(out, cache))

    def _run(self, out: Path, cache: Path) -> None:
        self.grids.append(run_recipe(recipe_of(), out, device="cpu", cache=cache, resume=True, watcher=self))

    def waiting(self, cell: Cell) -> None:
        self.waits.set()

    def come(self) -> None:
        self.thread.start()
        assert self.waits.wait(60)

    def joined(self) -> Grid:
        self.thread.join()
        (grid,) = self.grids
        return grid


@pytest.mark.parametrize("stopped", [False, True])
def test_a_second_runner_waits_for_the_first_and_makes_what_that_leaves(
    tmp_path: Path, cache: Path, whole: Run, monkeypatch: pytest.MonkeyPatch, *, stopped: bool
) -> None:
    """It comes while the first is between its steps 2 and 3, which is then stopped, or goes on."""
    monkeypatch.setattr("mithridate.bench.engine.deterministic", contextlib.nullcontext)  # a switch of the process
    second = Second(tmp_path, cache)

    def meanwhile() -> None:
        second.come()
        if stopped:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) if stopped else contextlib.nullcontext():
        run_recipe(recipe_of(), tmp_path, device="cpu", cache=cache, watcher=Log(2, then=meanwhile))
    grid = second.joined()
    assert (grid.ran, grid.skipped, dict(grid.failed)) == (int(stopped), int(not stopped), {})
    assert second.steps == ([3, 4] if stopped else [])
    assert same_runs(read_run(tmp_path / NAME), whole)


def test_a_second_runner_of_other_settings_is_refused_at_once(tmp_path: Path, cache: Path, whole: Run) -> None:
    errors: list[str] = []

    def second() -> None:
        for changes, resume in (((), False), (("attack.eps=0.3",), False), (("attack.eps=0.3",), True)):
            with pytest.raises(StoreError) as caught:
                run_recipe(recipe_of(*changes), tmp_path, device="cpu", cache=cache, resume=resume)
            errors.append(str(caught.value))

    def meanwhile() -> None:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    run_recipe(recipe_of(), tmp_path, device="cpu", cache=cache, watcher=Log(2, then=meanwhile))
    told = ("exists; go on", "exists; go on", "made with other settings")
    assert [part in error for part, error in zip(told, errors, strict=True)] == [True] * 3
    assert same_runs(read_run(tmp_path / NAME), whole)


@pytest.mark.parametrize(("change", "kept"), [("attack.eps=0.3", False), ("run.save_every=1", True)])
def test_settings_are_compared_again_once_the_place_is_locked(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, change: str, kept: bool
) -> None:
    """Another runner makes the same run, from its first to its last step, while this one prepares."""
    place = "mithridate.bench.workplace.prepare"

    def slowly(cell: Cell, context: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(place, prepare)
            run_recipe(recipe_of(change), tmp_path, device="cpu", cache=cache)
        return prepare(cell, context)

    monkeypatch.setattr(place, slowly)
    if kept:
        assert run_recipe(recipe_of(), tmp_path, device="cpu", cache=cache, resume=True).skipped == 1
    else:
        failure = run_recipe(recipe_of(), tmp_path, device="cpu", cache=cache, resume=True).failed[NAME]
        assert "made with other settings (attack.eps)" in failure.message
        assert not (tmp_path / NAME / store.ERROR).exists()  # what stands there is another's
    assert read_run(tmp_path / NAME).config["attack"]["eps"] == (0.1 if kept else 0.3)


def test_labels_that_look_alike_do_not_share_a_directory(tmp_path: Path, cache: Path) -> None:
    tables = tables_of()
    tables["attack"] = [{"name": "noise", "eps": 0.1, "label": label} for label in ("a", "a__b", "A")]
    tables["defence"] = [{"name": "none", "label": label} for label in ("c", "b__c")]
    tables["run"]["steps"] = 1
    found = run_recipe(make_recipe(tables), tmp_path, device="cpu", cache=cache)
    assert len({directory.name.lower() for directory in found.directories}) == 6
    assert len({(r.summary["attack"], r.summary["defence"]) for r in store.read_runs(tmp_path)}) == 6


# Disks.


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes; a write that would is cut off there and fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 50, 700, 3000, 6000, 9000])
def test_a_disk_that_takes_no_more_bytes(tmp_path: Path, cache: Path, whole: Run, size: int) -> None:
    with file_size_limit(size), pytest.raises(WriteError, match=r"cannot be written .*make room"):
        run_recipe(recipe_of(), tmp_path, device="cpu", cache=cache)
    assert not list(tmp_path.rglob("*.part"))
    run_recipe(recipe_of(), tmp_path, device="cpu", cache=cache, resume=(tmp_path / NAME / store.JOURNAL).exists())
    assert same_runs(read_run(tmp_path / NAME), whole)


class Full:
    """Every file that is opened to be written is one more; the disk is full at one of them."""

    def __init__(self, at: int | None, error: BaseException) -> None:
        self.at, self.error, self.count = at, error, 0

    def one_more(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise self.error

    def install(self, patch: pytest.MonkeyPatch) -> None:
        make, replace, opened = tempfile.mkstemp, Path.replace, Path.open

        def mkstemp(*args: Any, **options: Any) -> Any:
            self.one_more()
            return make(*args, **options)

        def move(path: Path, target: Any) -> Path:
            self.one_more()
            return replace(path, target)

        def append(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            if mode == "ab":
                self.one_more()
            return opened(path, mode, *args, **options)

        patch.setattr(tempfile, "mkstemp", mkstemp)
        patch.setattr(Path, "replace", move)
        patch.setattr(Path, "open", append)


@pytest.mark.parametrize("kind", ["full", "killed"])
def test_every_write_may_fail(tmp_path: Path, whole: Run, kind: str) -> None:
    """One run with its burn-in, stopped at its first write, then at a later one, and so on until nothing stops it."""
    error = OSError(errno.ENOSPC, "No space left on device") if kind == "full" else KeyboardInterrupt()
    expected = WriteError if kind == "full" else KeyboardInterrupt
    out, cache = tmp_path / "runs", tmp_path / "cache"
    for at in range(1, 200):
        full = Full(at, error)
        with pytest.MonkeyPatch.context() as patch:
            full.install(patch)
            try:
                run_recipe(recipe_of(), out, device="cpu", cache=cache, resume=True)
            except expected:
                assert not list(tmp_path.rglob("*.part"))
                with contextlib.suppress(StoreError):
                    assert same_runs(read_run(out / NAME), whole), "what can be read is right"
                continue
        break
    assert at > 10
    assert same_runs(read_run(out / NAME), whole)
    assert leftovers(out / NAME) == set()


def test_a_file_where_a_folder_belongs(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / NAME).write_text("mine", encoding="utf-8")
    with pytest.raises(StoreError, match=rf"{NAME} is not a directory"):
        run_recipe(recipe_of(), tmp_path / "runs", device="cpu", cache=cache, resume=True)
    (tmp_path / "cache").write_text("mine", encoding="utf-8")
    with pytest.raises(WriteError, match="cannot be written"):
        run_recipe(recipe_of(), tmp_path / "other", device="cpu", cache=tmp_path / "cache")
    assert not list((tmp_path / "other").glob("*/"))


# Where it was made.


def test_the_environment_says_what_decides_the_bits(whole: Run) -> None:
    found = whole.environment
    assert found["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert found["threads"] == torch.get_num_threads()
    assert found["numpy"] == np.__version__
    assert found["precision"]["float32_matmul"] == torch.get_float32_matmul_precision()
    assert found["precision"]["deterministic"] is True
    assert found["processor"]
    assert "burn_in" not in found
    assert "resumed" not in found


def test_a_run_says_that_it_was_resumed_or_started_elsewhere(
    tmp_path: Path, cache: Path, killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, here = copied(killed / "2" / NAME, tmp_path), torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
    run_recipe(recipe_of(), tmp_path, device="cpu", cache=cache, resume=True)
    found = read_run(directory).environment
    assert found["cpu_capability"] == here
    assert found["resumed"] == [{"after_step": 2, "cpu_capability": f"OTHER, {here}"}]
    run_recipe(recipe_of(), tmp_path / "new", device="cpu", cache=cache)
    found = read_run(tmp_path / "new" / NAME).environment
    assert found["burn_in"] == {"cpu_capability": f"OTHER, {here}"}


def test_the_code_of_a_plug_in_is_part_of_the_environment(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry._entries, "defence", dict(registry.entries("defence")))  # what it adds goes with it
    plugin = tmp_path / "going_on_plugin.py"
    plugin.write_text(
        "from mithridate.core.registry import register\nfrom mithridate.core.settings import settings\n"
        "from mithridate.core.defence import Defence\n\n"
        '@register("defence", "going_on")\n@settings\nclass GoingOn(Defence):\n    """Does nothing."""\n',
        encoding="utf-8",
    )
    tables = tables_of() | {"plugins": [str(plugin)], "defence": {"name": "going_on"}}
    with pytest.raises(KeyboardInterrupt):
        run_recipe(make_recipe(tables), tmp_path / "runs", device="cpu", cache=cache, watcher=Log(2))
    plugin.write_text(plugin.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    run_recipe(make_recipe(tables), tmp_path / "runs", device="cpu", cache=cache, resume=True)
    (found,) = store.read_runs(tmp_path / "runs")
    assert list(found.environment["code"]) == [str(plugin)]
    assert [sorted(entry) for entry in found.environment["resumed"]] == [["after_step", f"code.{plugin}"]]


def test_a_summary_names_its_settings_and_inputs(whole: Run) -> None:
    text = json.loads((whole.path / store.SUMMARY).read_text(encoding="utf-8"))
    assert len(text["settings_key"]) == len(text["inputs_key"]) == 16
