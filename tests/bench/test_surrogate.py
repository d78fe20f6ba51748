"""Attackers without access to the victim's model, from the recipe to the store."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from mithridate.bench.engine import run_recipe
from mithridate.bench.recipe import make_recipe
from mithridate.bench.store import Run, read_run
from mithridate.core.errors import ConfigError
from tests.recipes import same_arrays, tiny_tables

ATTACK: dict[str, Any] = {"name": "accumulative", "eps": 0.2, "steps": 2, "trigger_update": "after_step"}
BLIND: dict[str, Any] = {**ATTACK, "model_access": "surrogate"}


def run(out: Path, cache: Path, attack: dict[str, Any], **surrogate: Any) -> Run:
    tables = tiny_tables("", "burn_in.epochs=4", "burn_in.checkpoints=[0, 2]", "run.steps=2") | {"attack": attack}
    if surrogate:
        tables["surrogate"] = surrogate
    grid = run_recipe(make_recipe(tables), out, device="cpu", cache=cache)
    return read_run(grid.directories[0])


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Run:
    return run(tmp_path_factory.mktemp("usual"), cache, ATTACK)


@pytest.mark.parametrize(
    "surrogate",
    [
        {"kind": "checkpoint", "epoch": 2},
        {"kind": "trained", "seed_offset": 7},
        {"kind": "trained", "model": {"name": "small_cnn", "width": 8, "norm": "group"}},
    ],
    ids=["older", "another seed", "another architecture"],
)
def test_a_run_on_a_surrogate_says_so_and_differs(
    tmp_path: Path, cache: Path, usual: Run, surrogate: dict[str, Any]
) -> None:
    made = run(tmp_path, cache, BLIND, **surrogate)
    held = tomllib.loads((tmp_path / "accumulative__none__seed0" / "config.toml").read_text(encoding="utf-8"))
    assert held["attack"]["model_access"] == "surrogate"
    assert surrogate.items() <= {**held["surrogate"], "model": surrogate.get("model")}.items()
    if "model" in surrogate:
        assert surrogate["model"].items() <= held["surrogate"]["model"].items()
    assert not same_arrays(made.images, usual.images)
    assert made.trace[0]["accuracy"] == usual.trace[0]["accuracy"]  # the victim is the same
    assert made.trace[-1]["poison_linf"] == pytest.approx(0.2, abs=1e-5)


def test_a_white_box_run_names_no_surrogate(usual: Run) -> None:
    assert "surrogate" not in usual.config
    assert usual.config["attack"]["model_access"] == "victim"


def test_the_earliest_checkpoint_is_the_default(tmp_path: Path, cache: Path) -> None:
    unset, first, later = (
        run(tmp_path / name, cache, BLIND, kind="checkpoint", **epoch)
        for name, epoch in (("unset", {}), ("first", {"epoch": 0}), ("later", {"epoch": 2}))
    )
    assert same_arrays(unset.images, first.images)
    assert not same_arrays(unset.images, later.images)


def test_a_checkpoint_that_was_not_kept_is_an_error(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[surrogate\] looks back at burn-in epoch 3.*checkpoints = \[3\]"):
        run(tmp_path, cache, BLIND, kind="checkpoint", epoch=3)


def test_hiding_from_a_checkpoint_works_in_a_grid_and_says_if_it_cannot(
    tmp_path: Path, cache: Path, usual: Run
) -> None:
    hidden = run(tmp_path / "hidden", cache, {**ATTACK, "beta": 1.0, "hide": "pixels", "hide_from": 2})
    assert not same_arrays(hidden.images, usual.images)
    with pytest.raises(ConfigError, match="attack accumulative looks back at burn-in epoch 3"):
        run(tmp_path / "missing", cache, {**ATTACK, "beta": 1.0, "hide_from": 3})


def test_the_gate_aware_attack_runs_from_a_recipe(tmp_path: Path, cache: Path) -> None:
    inner = {k: v for k, v in ATTACK.items() if k != "eps"}
    made = run(tmp_path, cache, {"name": "gate_aware", "eps": 0.2, "victim_lr": 0.05, "inner": inner})
    assert made.config["attack"]["inner"]["steps"] == 2
    assert "eps" not in made.config["attack"]["inner"]
    assert made.summary["status"] == "finished"


def test_a_surrogates_own_burn_in_of_another_environment_is_recorded(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = torch.backends.cpu.get_cpu_capability()
    run(tmp_path / "filled", cache, BLIND, kind="trained", seed_offset=91)  # leaves the surrogate in the cache
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
    whole = {name: run(tmp_path / name, cache, BLIND, **how) for name, how in SURROGATES.items()}
    assert whole["own"].environment["surrogate"] == {"cpu_capability": f"OTHER, {here}"}
    for name in ("own", "older"):
        assert whole[name].environment["burn_in"] == {"cpu_capability": f"OTHER, {here}"}
    assert "surrogate" not in whole["older"].environment  # the victim's burn-in, which is named already
    assert "surrogate" not in whole["trained here"].environment


SURROGATES: dict[str, dict[str, Any]] = {
    "own": {"kind": "trained", "seed_offset": 91},
    "older": {"kind": "checkpoint", "epoch": 2},
    "trained here": {"kind": "trained", "seed_offset": 92},
}
