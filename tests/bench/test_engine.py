"""The engine: what a grid leaves on disk, what a killed one goes on with, and what is refused beforehand."""

import dataclasses
import itertools
import json
import math
import tomllib
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from mithridate.bench.engine import run_recipe
from mithridate.bench.prepare import choose_device
from mithridate.bench.recipe import Labelled
from mithridate.bench.running import deterministic
from mithridate.bench.store import TRACE_SCHEMA, read_run, read_runs
from mithridate.core import registry
from mithridate.core.attack import Attack
from mithridate.core.defence import Defence
from mithridate.core.errors import CheckpointError, ConfigError, DataError, DeviceError, StoreError, UserError
from mithridate.core.registry import Entry, settings
from mithridate.core.updates import Updates
from mithridate.core.view import View
from mithridate.data.stream import open_stream
from mithridate.models import build_model
from mithridate.report import build_report
from mithridate.simulation.online import OnlineRun, run_online
from mithridate.simulation.run import adopt_momentum, victim_optimiser
from mithridate.training.burn_in import burn_in
from mithridate.training.learner import Learner
from tests.recipes import ACCUMULATIVE, Log, files, same_runs, timeless, timeless_rows, tiny_recipe

RECIPE = (
    """
[[attack]]
name = "noise"
eps = 0.1
"""
    + ACCUMULATIVE
    + """
[[defence]]
name = "none"
[[defence]]
name = "clip"
clip_norm = 0.5
[monitor]
name = "accuracy_floor"
max_drop = 0.01
"""
)


recipe_of = partial(tiny_recipe, RECIPE)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The finished grid; read only."""
    out = tmp_path_factory.mktemp("grid") / "deep" / "runs"
    found = run_recipe(recipe_of(), out, device="cpu", cache=cache)
    assert (found.ran, found.skipped) == (4, 0)
    assert [d.name for d in found.directories] == [
        "noise__none__seed0",
        "accu__none__seed0",
        "noise__clip__seed0",
        "accu__clip__seed0",
    ]
    return out


# What is on disk.


def test_every_cell_has_its_directory_with_the_stores_files(grid: Path) -> None:
    names = [f"{a}__{d}__seed0" for a in ("accu", "noise") for d in ("clip", "none")]
    assert sorted(p.name for p in grid.iterdir()) == sorted([*names, "grid.json"])
    for directory in (grid / name for name in names):
        assert {p.name for p in directory.iterdir()} == {
            "config.toml",
            "trace.parquet",
            "summary.json",
            "environment.json",
            "images.safetensors",
            "SHA256SUMS",
            ".lock",
        }


def test_the_trace_has_the_schemas_columns_and_a_row_a_step(grid: Path) -> None:
    for run in read_runs([grid]):
        assert pq.read_schema(run.path / "trace.parquet").equals(TRACE_SCHEMA)
        assert [row["step"] for row in run.trace] == [0, 1, 2, 3, 4]
        assert [row["phase"] for row in run.trace] == ["start", *["accumulative"] * 3, "trigger"]


def test_the_summary_is_the_outcome(grid: Path) -> None:
    for run in read_runs([grid]):
        summary, rows = run.summary, run.trace
        assert {
            "accuracy_start",
            "accuracy_before_trigger",
            "accuracy_after_trigger",
            "drop",
            "steps",
            "seconds",
            "seed",
            "status",
        } <= summary.keys()
        assert summary["accuracy_start"] == rows[0]["accuracy"]
        assert summary["accuracy_before_trigger"] == rows[-2]["accuracy"]
        assert summary["accuracy_after_trigger"] == rows[-1]["accuracy"]
        assert summary["drop"] == rows[-2]["accuracy"] - rows[-1]["accuracy"]
        assert 0 <= summary["accuracy_start"] <= 1
        assert (summary["steps"], summary["seed"], summary["status"]) == (3, 0, "finished")
        assert run.path.name == f"{summary['attack']}__{summary['defence']}__seed0"
        assert (summary["dataset"], summary["model"]) == ("digits", "small_cnn")
        alarmed = [row["step"] for row in rows if row["alarms"]]
        assert summary["alarms"] == len(alarmed)
        assert summary["first_alarm_step"] == (alarmed[0] if alarmed else None)
    assert len({run.summary["burn_in_key"] for run in read_runs([grid])}) == 1


def test_the_settings_on_disk_are_those_of_the_cell(grid: Path) -> None:
    for cell in recipe_of().cells():
        held = tomllib.loads((grid / cell.run_id / "config.toml").read_text(encoding="utf-8"))
        assert held == cell.config()
        assert set(held) == {"title", "data", "model", "burn_in", "attack", "defence", "monitor", "run"}
        for component in ("model", "attack", "defence", "monitor"):
            assert held[component]["name"]


def test_the_environment_names_versions_device_and_threads(grid: Path) -> None:
    for run in read_runs([grid]):
        assert run.environment["torch"] == torch.__version__
        assert run.environment["device"] == "cpu"
        assert run.environment["threads"] == torch.get_num_threads()
        assert {"mithridate", "python", "platform"} <= run.environment.keys()


def test_images_are_pairs_within_the_budget(grid: Path) -> None:
    for run in read_runs([grid]):
        assert set(run.images) == {f"{p}.{k}" for p in ("accumulative", "trigger") for k in ("clean", "poisoned")}
        budget = run.config["attack"]["eps"]
        for phase in ("accumulative", "trigger"):
            clean, poisoned = run.images[f"{phase}.clean"], run.images[f"{phase}.poisoned"]
            assert clean.shape == poisoned.shape == (2, 1, 8, 8)
            assert abs(poisoned - clean).max() <= budget + 1e-6
            assert poisoned.min() >= 0
            assert poisoned.max() <= 1


@pytest.mark.parametrize("changes", [(), ("run.restore_momentum=true", "run.update_mode=eval")], ids=["usual", "other"])
def test_a_cell_is_the_online_loop_after_the_burn_in(tmp_path: Path, cache: Path, changes: tuple[str, ...]) -> None:
    recipe = recipe_of(*changes, attacks="accu", defences="clip")
    run_recipe(recipe, tmp_path / "runs", device="cpu", cache=cache)
    (found,) = read_runs([tmp_path / "runs"])

    (cell,) = recipe.cells()
    run, attack = recipe.run, cell.attack.component
    assert isinstance(run, OnlineRun)
    assert isinstance(attack, Attack)
    stream = open_stream(recipe.data)
    model = build_model(recipe.model, stream.info, seed=0)
    burned = burn_in(model, stream, recipe.burn_in, seed=0)
    optimiser = victim_optimiser(model, run)
    if run.restore_momentum:
        adopt_momentum(optimiser, burned.final)
    learner = Learner(model, optimiser, defence=cell.defence.component, update_mode=run.update_mode)
    monitors = [m.component for m in recipe.monitors]
    with deterministic():
        outcome = run_online(learner, stream, attack, run, monitors=monitors, seed=0)
    assert timeless_rows(found.trace) == timeless_rows(outcome.trace)
    expected = timeless(outcome.summary())
    assert {k: found.summary[k] for k in expected} == expected


def test_the_burn_ins_momentum_matters_if_it_is_asked_for(tmp_path: Path, cache: Path, grid: Path) -> None:
    changes = ("run.restore_momentum=true",)
    run_recipe(recipe_of(*changes, attacks="noise", defences="none"), tmp_path / "runs", device="cpu", cache=cache)
    (found,) = read_runs([tmp_path / "runs"])
    usual = read_run(grid / "noise__none__seed0")
    assert found.trace[0]["accuracy"] == usual.trace[0]["accuracy"]
    assert found.trace[1]["update_norm"] > usual.trace[1]["update_norm"]


def test_the_same_recipe_gives_the_same_numbers_with_another_cache(tmp_path: Path, grid: Path) -> None:
    run_recipe(recipe_of(attacks="accu", defences="none"), tmp_path / "runs", device="cpu", cache=tmp_path / "cache")
    (again,) = read_runs([tmp_path / "runs"])
    assert same_runs(again, read_run(grid / "accu__none__seed0"))


def test_a_burn_in_with_a_seed_of_its_own_is_trained_once_for_all_seeds(tmp_path: Path) -> None:
    log = Log()
    recipe = recipe_of("burn_in.seed=5", "run.seeds=[0, 1]", attacks="noise", defences="none,clip")
    run_recipe(recipe, tmp_path / "runs", device="cpu", cache=tmp_path / "cache", watcher=log)
    runs = read_runs([tmp_path / "runs"])
    assert log.epochs == [(0, 1), (0, 2)]
    assert len({run.summary["burn_in_key"] for run in runs}) == 1
    assert len({run.summary["accuracy_start"] for run in runs}) == 1
    assert {run.summary["seed"] for run in runs} == {0, 1}
    first, second = (read_run(tmp_path / "runs" / f"noise__none__seed{s}") for s in (0, 1))
    assert timeless_rows(first.trace[1:]) != timeless_rows(second.trace[1:])


def test_such_a_burn_in_does_not_depend_on_which_seed_runs_first(tmp_path: Path) -> None:
    losses = []
    for seed in (0, 1):
        recipe = recipe_of("burn_in.seed=5", f"run.seeds=[{seed}]", attacks="noise", defences="none")
        run_recipe(recipe, tmp_path / f"runs{seed}", device="cpu", cache=tmp_path / f"cache{seed}")
        losses.append(read_runs([tmp_path / f"runs{seed}"])[0].trace[0]["loss"])
    assert losses[0] == losses[1]


def test_each_seed_has_its_own_burn_in_otherwise(tmp_path: Path, cache: Path) -> None:
    recipe = recipe_of("run.seeds=[0, 1]", attacks="noise", defences="none")
    run_recipe(recipe, tmp_path / "runs", device="cpu", cache=cache)
    a, b = read_runs([tmp_path / "runs"])
    assert a.summary["burn_in_key"] != b.summary["burn_in_key"]
    assert a.trace[0]["loss"] != b.trace[0]["loss"]


# Going on.


def test_an_existing_directory_is_in_the_way(tmp_path: Path, grid: Path, cache: Path) -> None:
    before = files(grid)
    with pytest.raises(StoreError, match=r"accu__clip__seed0 exists; go on with --resume"):
        run_recipe(recipe_of(attacks="accu", defences="clip"), grid, device="cpu", cache=cache)
    (tmp_path / "accu__clip__seed0").mkdir()  # the last cell's directory stops the first cell, too
    with pytest.raises(StoreError, match="exists"):
        run_recipe(recipe_of(), tmp_path, device="cpu", cache=cache)
    assert [p.name for p in tmp_path.iterdir()] == ["accu__clip__seed0"]
    assert files(grid) == before


def test_resuming_a_finished_grid_touches_nothing(grid: Path, cache: Path) -> None:
    before = files(grid)
    log = Log()
    found = run_recipe(recipe_of(), grid, device="cpu", resume=True, cache=cache, watcher=log)
    assert files(grid) == before
    assert (found.ran, found.skipped) == (0, 4)
    assert (log.epochs, log.steps) == ([], [])
    assert log.ended == [(cell.run_id, True) for cell in recipe_of().cells()]


@pytest.mark.parametrize("kill_at", [1, 2, 3])
@pytest.mark.parametrize("name", ["accu", "noise"])
def test_a_killed_run_goes_on_to_the_same_numbers(
    tmp_path: Path, grid: Path, cache: Path, kill_at: int, name: str
) -> None:
    recipe = recipe_of(attacks=name, defences="clip")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path, device="cpu", cache=cache, watcher=Log(kill_at))
    (directory,) = tmp_path.glob("*/")
    assert {p.name for p in directory.iterdir()} == {
        "config.toml",
        "environment.json",
        "state.safetensors",
        "journal.jsonl",
        ".lock",
    }
    log = Log()
    found = run_recipe(recipe, tmp_path, device="cpu", resume=True, cache=cache, watcher=log)
    assert log.steps == list(range(kill_at + 1, 4))  # it went on, it did not begin again
    assert (found.ran, found.skipped) == (1, 0)
    assert {p.name for p in directory.iterdir()} == {p.name for p in (grid / directory.name).iterdir()}
    assert same_runs(read_run(directory), read_run(grid / directory.name))


@settings
class Counting(Defence):
    """Keeps a share of the gradient that depends on how many it has seen."""

    def bound(self, gradient: Updates, view: View) -> Updates:
        view.memory["seen"] = view.memory.get("seen", torch.zeros(())) + 1
        return gradient.with_rows(gradient.rows / view.memory["seen"])


def test_a_resumed_defence_remembers(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._entries["defence"], "counting", Entry("defence", "counting", Counting, {}))
    recipe = dataclasses.replace(recipe_of(attacks="noise"), defences=[Labelled("counting", Counting())])
    run_recipe(recipe, tmp_path / "whole", device="cpu", cache=cache)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "killed", device="cpu", cache=cache, watcher=Log(2))
    run_recipe(recipe, tmp_path / "killed", device="cpu", cache=cache, resume=True)
    (whole,), (killed,) = (read_runs([tmp_path / name]) for name in ("whole", "killed"))
    assert same_runs(whole, killed)
    shares = [row["bounded_norm"] / row["gradient_norm"] for row in whole.trace[1:]]
    assert shares == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4], rel=1e-5)


def test_a_run_may_be_killed_at_every_step(tmp_path: Path, grid: Path, cache: Path) -> None:
    recipe = recipe_of(attacks="accu", defences="none")
    for step in (1, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe, tmp_path, device="cpu", resume=True, cache=cache, watcher=Log(step))
    run_recipe(recipe, tmp_path, device="cpu", resume=True, cache=cache)
    assert same_runs(read_run(tmp_path / "accu__none__seed0"), read_run(grid / "accu__none__seed0"))


def test_resume_points_may_be_rare(tmp_path: Path, grid: Path, cache: Path) -> None:
    recipe = recipe_of("run.save_every=2", attacks="accu", defences="none")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path, device="cpu", cache=cache, watcher=Log(3))
    log = Log()
    run_recipe(recipe, tmp_path, device="cpu", resume=True, cache=cache, watcher=log)
    assert log.steps == [3]
    usual = read_run(grid / "accu__none__seed0")
    assert timeless_rows(read_run(tmp_path / "accu__none__seed0").trace) == timeless_rows(usual.trace)


def test_a_grid_killed_in_its_second_cell_keeps_the_first(tmp_path: Path, grid: Path, cache: Path) -> None:
    recipe = recipe_of(defences="none")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path, device="cpu", cache=cache, watcher=Log(2, cell="accu"))
    before = files(tmp_path / "noise__none__seed0")
    found = run_recipe(recipe, tmp_path, device="cpu", resume=True, cache=cache)
    assert (found.ran, found.skipped) == (1, 1)
    assert files(tmp_path / "noise__none__seed0") == before
    for name in ("noise__none__seed0", "accu__none__seed0"):
        assert same_runs(read_run(tmp_path / name), read_run(grid / name))


def test_a_grid_killed_in_its_burn_in_goes_on_there(tmp_path: Path, grid: Path) -> None:
    recipe = recipe_of(attacks="noise", defences="none")
    runs, own = tmp_path / "runs", tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, runs, device="cpu", cache=own, watcher=Log(at_epoch=1))
    assert [p.name for p in runs.iterdir()] == ["grid.json"]
    log = Log()
    run_recipe(recipe, runs, device="cpu", resume=True, cache=own, watcher=log)
    assert log.epochs == [(0, 2)]
    assert same_runs(read_run(runs / "noise__none__seed0"), read_run(grid / "noise__none__seed0"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (("attack.eps=0.3",), "attack.eps"),
        (("run.steps=2",), "run.steps"),
        (("data.seed=1",), "data.seed"),
        (("burn_in.lr=0.01",), "burn_in.lr"),
        (("model.width=8",), "model.width"),
        (("monitor.floor=0.2",), "monitor.floor"),
        (("defence.clip_norm=2",), "defence.clip_norm"),
    ],
)
def test_other_settings_do_not_resume(grid: Path, cache: Path, changes: tuple[str, ...], named: str) -> None:
    before = files(grid)
    with pytest.raises(StoreError, match=rf"made with other settings \({named}\)"):
        run_recipe(recipe_of(*changes, attacks="accu", defences="clip"), grid, device="cpu", resume=True, cache=cache)
    assert files(grid) == before


def test_another_title_does_resume(grid: Path, cache: Path) -> None:
    renamed = dataclasses.replace(recipe_of(), title="renamed")
    assert run_recipe(renamed, grid, device="cpu", resume=True, cache=cache).skipped == 4


# Outcomes that are no crash.


def test_a_diverging_victim_is_recorded(tmp_path: Path, cache: Path) -> None:
    recipe = recipe_of("run.weight_decay=1e30", attacks="accu", defences="none")
    run_recipe(recipe, tmp_path, device="cpu", cache=cache)
    (found,) = read_runs([tmp_path])
    assert found.summary["status"] == "diverged"
    assert any(math.isnan(row["loss"]) for row in found.trace)
    text = (found.path / "summary.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_diverging_run_resumes(tmp_path: Path, cache: Path) -> None:
    recipe = recipe_of("run.weight_decay=1e30", attacks="noise", defences="none")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path, device="cpu", cache=cache, watcher=Log(2))
    run_recipe(recipe, tmp_path, device="cpu", cache=cache, resume=True)
    assert read_runs([tmp_path])[0].summary["status"] == "diverged"


def test_a_halted_run_has_no_drop(tmp_path: Path, cache: Path) -> None:
    recipe = recipe_of("run.on_alarm=halt", "monitor.floor=1.0", attacks="noise", defences="none")
    run_recipe(recipe, tmp_path, device="cpu", cache=cache)
    (found,) = read_runs([tmp_path])
    assert (found.summary["status"], found.summary["drop"], found.summary["steps"]) == ("halted", None, 1)
    assert set(found.images) == {"accumulative.clean", "accumulative.poisoned"}


# What is refused before anything is made.


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (("run.steps=9",), DataError, "9 accumulative batches and the trigger batch"),
        (("burn_in.checkpoint=none.pt",), CheckpointError, r"none\.pt"),
        (("data.validation=0",), DataError, "accu needs the validation batch"),
        (("data.name=cifar10", "data.test=100"), DataError, "data root"),
    ],
    ids=str,
)
def test_a_recipe_that_cannot_run_leaves_nothing(
    tmp_path: Path, cache: Path, changes: tuple[str, ...], error: type[UserError], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_recipe(recipe_of(*changes), tmp_path / "runs", device="cpu", cache=cache, data_root=tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_attacks_that_need_no_validation_images_run_without(tmp_path: Path, cache: Path) -> None:
    recipe = recipe_of("data.validation=0", attacks="noise", defences="none")
    assert run_recipe(recipe, tmp_path, device="cpu", cache=cache).ran == 1


def test_a_file_in_the_place_of_the_store_is_named(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "runs").write_text("mine", encoding="utf-8")
    with pytest.raises(StoreError, match="runs is not a directory"):
        run_recipe(recipe_of(), tmp_path / "runs", device="cpu", cache=cache)
    assert (tmp_path / "runs").read_text(encoding="utf-8") == "mine"


def test_a_device_that_is_not_there_is_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="CUDA was asked for"):
        run_recipe(recipe_of(), tmp_path / "runs", device="cuda", cache=cache)
    assert not (tmp_path / "runs").exists()
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(DeviceError, match="unknown device 'gpu'; use auto, cpu or cuda"):
        choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("on", "warn"), list(itertools.product([False, True], repeat=2)))
def test_torchs_settings_come_back(on: bool, warn: bool) -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(on, warn_only=warn)
        held = torch.is_deterministic_algorithms_warn_only_enabled()
        with deterministic():
            assert torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled() is on
        assert torch.is_deterministic_algorithms_warn_only_enabled() is held
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# What is measured when.


def test_runs_that_measure_seldom_and_a_burn_in_that_is_measured_reach_store_and_report(
    tmp_path: Path, cache: Path, grid: Path
) -> None:
    seldom = recipe_of("run.evaluate_every=2", "burn_in.evaluate_every=1", attacks="noise", defences="none")
    (directory,) = run_recipe(seldom, tmp_path / "runs", device="cpu", cache=cache).directories
    run, usual = read_run(directory), read_run(grid / "noise__none__seed0")
    assert [row["accuracy"] is None for row in run.trace] == [False, True, False, False, False]
    assert [row["accuracy"] for row in run.trace if row["step"] != 1] == [
        row["accuracy"] for row in usual.trace if row["step"] != 1
    ]
    assert (run.summary["read_step"], usual.summary["read_step"]) == (2, 3)
    assert run.summary["read_accuracy"] == usual.trace[2]["accuracy"]
    assert [point["epoch"] for point in run.summary["burn_in_curve"]] == [1, 2]
    assert run.summary["burn_in_curve"][-1]["accuracy"] == run.summary["accuracy_start"]
    assert usual.summary["burn_in_curve"] == []
    paths = build_report([directory], tmp_path / "report")
    assert '<div id="chart-1">' in paths.html.read_text(encoding="utf-8")


def test_runs_that_measure_a_subset_between_reach_store_and_report(tmp_path: Path, cache: Path, grid: Path) -> None:
    some = recipe_of("run.evaluate_size=30", "run.evaluate_precision=bfloat16", attacks="noise", defences="none")
    (directory,) = run_recipe(some, tmp_path / "runs", device="cpu", cache=cache).directories
    run, usual = read_run(directory), read_run(grid / "noise__none__seed0")
    whole = usual.trace[0]["test_samples"]
    assert [row["test_samples"] for row in run.trace] == [whole, 30, 30, whole, whole]
    assert [row["test_samples"] for row in usual.trace] == [whole] * 5
    assert (run.summary["read_step"], run.summary["read_samples"], run.summary["classes_unread"]) == (3, 30, 0)
    assert run.summary["accuracy_start"] == pytest.approx(usual.summary["accuracy_start"], abs=0.01)
    page = build_report([directory], tmp_path / "report").html.read_text(encoding="utf-8")
    assert f"accuracy on 30 of {whole} test samples" in page


def test_a_subset_that_is_larger_than_the_test_part_is_refused_before_anything_is_written(
    tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(ConfigError, match=r"evaluate_size = 100000: the test part has \d+ samples"):
        run_recipe(recipe_of("run.evaluate_size=100000"), tmp_path / "runs", device="cpu", cache=cache)
    assert not (tmp_path / "runs").exists()
