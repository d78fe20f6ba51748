"""Federated recipes: their tables, what is refused before anything is trained, and runs that are killed and go on."""

from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from mithridate.bench.engine import run_recipe
from mithridate.bench.recipe import Recipe, make_recipe, read_recipe
from mithridate.bench.running import deterministic
from mithridate.bench.store import TRACE_SCHEMA, read_run, read_runs
from mithridate.core.errors import ConfigError, DataError, UserError
from mithridate.core.registry import fields_of
from mithridate.data.shards import Shards
from mithridate.data.stream import open_stream
from mithridate.models import build_model
from mithridate.simulation.clients import FederatedRun, federate
from mithridate.simulation.federated import run_federated
from mithridate.simulation.run import victim_optimiser
from mithridate.training.burn_in import burn_in
from mithridate.training.learner import Learner
from mithridate.update_attacks.accumulative import AccumulativeUpdates
from mithridate.update_attacks.sign_flip import SignFlip
from tests.command import invoke
from tests.recipes import FEDERATION, Log, same_runs, timeless, timeless_rows, tiny_recipe, tiny_tables, tiny_text

RECIPE = (
    """
[[attack]]
name = "sign_flip"
poison_ratio = 0.2
"""
    + FEDERATION
    + """
[[defence]]
name = "none"
[[defence]]
name = "chain"
label = "server"
parts = [{name = "clip"}, {name = "gate"}]
[monitor]
name = "accuracy_floor"
max_drop = 0.01
"""
)
RULE = {"name": "centered_clipping", "worker_momentum": 0.5}

tables_of = partial(tiny_tables, RECIPE)
recipe_of = partial(tiny_recipe, RECIPE)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The finished grid; read only."""
    out = tmp_path_factory.mktemp("grid")
    assert run_recipe(recipe_of(), out, device="cpu", cache=cache).ran == 4
    return out


# The tables.


def test_what_the_tables_build() -> None:
    recipe = recipe_of()
    assert recipe.clients == Shards(clients=10, partition="dirichlet", alpha=1.0, smallest=2)
    assert recipe.run == FederatedRun(rounds=3, per_round=6, local_batch=2, lr=0.05, rule=RULE)
    assert recipe.rules == {}
    assert [type(a.component) for a in recipe.attacks] == [SignFlip, AccumulativeUpdates]
    plain = make_recipe({"federated": {}, "attack": {"name": "clean"}})
    assert (plain.clients, plain.run) == (Shards(), FederatedRun())


def test_presets_of_attacks_on_rounds() -> None:
    paper, released = (
        fields_of(
            make_recipe({"federated": {}, "attack": {"name": "accumulative", "preset": preset}}).attacks[0].component
        )
        for preset in ("paper", "released")
    )
    assert (paper["trigger"], paper["normalise"], paper["clean_weight"]) == ("reoptimised", "none", 1.0)
    assert (released["trigger"], released["normalise"], released["clean_weight"]) == ("reoptimised", "global", 0.0)
    assert (released["lam"], released["alpha"]) == (0.08, 0.01)


def test_changes_from_the_command_line() -> None:
    recipe = recipe_of(
        "federated.rounds=7",
        "clients.alpha=0.3",
        "attack.poison_ratio=0.4",
        "attack.accu.lam=0.5",
        "federated.seeds=[3, 4]",
        "federated.bound=before",
    )
    assert (recipe.run.steps, recipe.clients and recipe.clients.alpha, recipe.seeds) == (7, 0.3, [3, 4])
    flip, accumulative = (fields_of(a.component) for a in recipe.attacks)
    assert (flip["poison_ratio"], accumulative["poison_ratio"], accumulative["lam"]) == (0.4, 0.4, 0.5)
    assert fields_of(recipe.run)["bound"] == "before"


def test_seeds_given_beside_the_recipe_replace_its_own(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_text(RECIPE), encoding="utf-8")
    assert read_recipe(path, seeds=[5, 6]).seeds == [5, 6]
    assert read_recipe(path, changes=["federated.rounds=9"]).run.steps == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("run.steps=3",), r"\[run\] belongs to an online recipe, and \[federated\] is there too"),
        (("detector.name=loss",), r"\[detector\] belongs to an online recipe"),
        (("federated.round=3",), r"\[federated\]: unknown key 'round': did you mean 'rounds'"),
        (("federated.steps=3",), r"\[federated\]: unknown key 'steps'"),
        (("federated.per_round=0",), r"\[federated\]: per_round = 0"),
        (('federated.rule={name = "krumm"}',), "unknown aggregator 'krumm': did you mean 'krum'"),
        (('federated.rule={name = "krum", hostil = 1}',), r"\[federated\] rule krum: unknown key 'hostil'"),
        (
            ('federated.rule=[{name = "krum"}, {name = "krum"}]',),
            r"two \[\[rule\]\] are called 'krum'",
        ),
        (('federated.rule=[{name = "krum", label = "a b"}]',), r"\[rule\] label 'a b'"),
        (('federated.rule=[{name = "krum", hostile = -1}]',), "hostile = -1"),
        (("federated.rule=krum",), r"\[federated\]: rule = 'krum'"),
        (('federated.rule=["krum"]',), r"\[federated\] rule must be a table or an array of tables, not 'krum'"),
        (
            ("defence.none.name=robust",),
            r"a setting of the server now: write rule = .*in \[federated\]",
        ),
        (("federated.seeds=[]",), r"\[federated\] seeds"),
        (("federated.seeds=[1, 1]",), r"\[federated\] seeds = \[1, 1\]: a seed twice"),
        (("clients.alpha=0",), r"\[clients\]: alpha = 0"),
        (("clients.alpha=-1",), r"\[clients\]: alpha = -1"),
        (("clients.clients=0",), r"\[clients\]: clients = 0"),
        (("clients.client=3",), r"\[clients\]: unknown key 'client': did you mean 'clients'"),
        (("attack.poison_ratio=1.01",), r"\[attack\] sign_flip: poison_ratio = 1\.01"),
        (("attack.accu.eps=0.1",), r"\[attack\] accumulative: unknown key 'eps'"),
        (("attack.sign_flip.name=pgd",), "unknown update_attack 'pgd'"),
    ],
    ids=str,
)
def test_a_mistake_is_named(changes: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_of(*changes)


def test_clients_without_a_federation_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[clients\] belongs to a federation; add a table \[federated\]"):
        make_recipe({"attack": {"name": "noise"}, "clients": {"clients": 5}})
    with pytest.raises(ConfigError, match="unknown attack 'sign_flip'"):
        make_recipe({"attack": {"name": "sign_flip"}})


def test_a_runs_settings_are_a_recipe_of_that_run() -> None:
    for cell in recipe_of("federated.seeds=[0, 2]").cells():
        config = cell.config()
        assert {"clients", "federated"} <= set(config)
        assert "run" not in config
        (again,) = make_recipe(config).cells()
        assert again.config() == config
        assert (again.run_id, again.seed) == (cell.run_id, cell.seed)


# A grid over rules.


def rules_of(*tables: str, defence: str = "") -> Recipe:
    return recipe_of(f"federated.rule=[{', '.join(tables)}]", defences=defence)


def test_an_array_of_rules_is_a_grid_over_them() -> None:
    recipe = rules_of(
        '{name = "mean"}', '{name = "krum", hostile = 1}', '{name = "krum", label = "krum-2", hostile = 2}'
    )
    assert list(recipe.rules) == ["mean", "krum", "krum-2"]
    cells = list(recipe.cells())
    assert [cell.run_id for cell in cells] == [
        f"{attack}__{defence}{rule}__seed0"
        for defence in ("", "server+")
        for attack in ("sign_flip", "accu")
        for rule in ("mean", "krum", "krum-2")
    ]
    for cell in cells:
        rule = cell.defence.label.removeprefix("server+")
        assert isinstance(cell.recipe.run, FederatedRun)
        assert cell.recipe.run == recipe.rules[rule]
        assert fields_of(cell.recipe.run)["rule"]["name"] == rule.removesuffix("-2")
        assert cell.recipe.run.rounds == 3
        assert cell.recipe.rules == {}
        config = cell.config()
        assert "label" not in config["federated"]["rule"]
        (again,) = make_recipe(config).cells()
        assert again.config() == config
        assert (again.run_id, again.recipe.run) == (cell.run_id, cell.recipe.run)


def test_a_rule_beside_no_defence_and_no_rule_beside_a_defence_keep_their_names() -> None:
    assert {cell.defence.label for cell in rules_of('{name = "median"}').cells()} == {"median", "server+median"}
    assert {cell.defence.label for cell in recipe_of().cells()} == {"none", "server"}  # one rule for all: as it was


def test_runs_of_a_grid_over_rules_are_runs_with_each_rule(tmp_path: Path, cache: Path, grid: Path) -> None:
    tables = tables_of(attacks="accu", defences="server")
    tables["federated"]["rule"] = [{"name": "median"}, {**RULE, "label": "cc"}]
    recipe = make_recipe(tables)
    done = run_recipe(recipe, tmp_path, device="cpu", cache=cache)
    assert [path.name for path in done.directories] == ["accu__server+median__seed0", "accu__server+cc__seed0"]
    median, clipped = (read_run(path) for path in done.directories)
    alone = read_run(grid / "accu__server__seed0")
    assert timeless_rows(clipped.trace) == timeless_rows(alone.trace)
    assert timeless_rows(median.trace[1:]) != timeless_rows(alone.trace[1:])
    assert clipped.config["federated"]["rule"] == alone.config["federated"]["rule"]
    assert (median.summary["defence"], clipped.summary["defence"]) == ("server+median", "server+cc")


# Refused before anything is trained or written.


@pytest.mark.parametrize(
    ("changes", "defence", "error", "message"),
    [
        (("clients.clients=101", "clients.smallest=1"), "none", DataError, "101 clients need at least 101 samples"),
        (("clients.smallest=11",), "none", DataError, "10 clients need at least 110 samples"),
        (("federated.per_round=11",), "none", DataError, "11 of 10 clients asked for"),
        (("federated.local_batch=60",), "none", DataError, r"local_batch = 60, and a client of round 0 holds \d+ sam"),
        (
            ('federated.rule={name = "krum", hostile = 2}',),
            "none",
            ConfigError,
            r"6 rows are too few for 2.*2f \+ 3 = 7",
        ),
        (('federated.rule={name = "bulyan", hostile = 1}',), "none", ConfigError, r"n >= 4f \+ 3 = 7"),
        (
            ('federated.rule=[{name = "median"}, {name = "bulyan", hostile = 1}]',),
            "none",
            ConfigError,
            r"n >= 4f \+ 3 = 7",
        ),
        (('federated.rule={name = "fltrust"}', "data.trusted=0"), "none", ConfigError, "fltrust compares with"),
        ((), "dsc", ConfigError, "acts on training samples"),
        (("data.trusted=0",), "gate", DataError, "gate needs the trusted set"),
        (("data.validation=0",), "none", DataError, "accu needs the validation batch"),
    ],
    ids=str,
)
def test_what_cannot_run_leaves_nothing(
    tmp_path: Path, changes: tuple[str, ...], defence: str, error: type[UserError], message: str
) -> None:
    tables = tables_of(*changes) | {"defence": {"name": defence}}
    log = Log()
    with pytest.raises(error, match=message):
        run_recipe(make_recipe(tables), tmp_path / "runs", device="cpu", cache=tmp_path / "cache", watcher=log)
    assert log.epochs == []
    assert not (tmp_path / "runs").exists()


def test_the_command_ends_with_code_two_and_names_the_bound(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_text(RECIPE, 'federated.rule={name = "krum", hostile = 2}'), encoding="utf-8")
    done = invoke("run", path, "--cache", tmp_path / "cache", "--out", tmp_path / "runs")
    assert done.code == 2
    assert "6 rows are too few for 2 hostile ones: it needs n >= 2f + 3 = 7" in done.err
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.toml"]


def test_a_rule_that_needs_more_memory_than_allowed_fails(tmp_path: Path, cache: Path) -> None:
    recipe = recipe_of("federated.max_matrix=1e-9", attacks="accu", defences="server")
    (failure,) = run_recipe(recipe, tmp_path, device="cpu", cache=cache).failed.values()
    assert "looks at all updates of a round at once" in failure.message
    assert (failure.kind, failure.told) == ("ConfigError", True)


# What is on disk, and going on.


def test_a_cell_is_the_federated_loop_after_the_burn_in(grid: Path) -> None:
    recipe = recipe_of(attacks="accu", defences="server")
    (cell,) = recipe.cells()
    assert isinstance(recipe.run, FederatedRun)
    assert recipe.clients is not None
    stream = open_stream(recipe.data)
    model = build_model(recipe.model, stream.info, seed=0)
    burn_in(model, stream, recipe.burn_in, seed=0)
    optimiser = victim_optimiser(model, recipe.run)
    learner = Learner(model, optimiser, defence=cell.defence.component, trusted=stream.trusted.all())
    with deterministic():
        outcome = run_federated(
            learner,
            federate(stream, recipe.clients, seed=0),
            cell.attack.component,  # type: ignore[arg-type]  # the recipe is federated
            recipe.run,
            monitors=[m.component for m in recipe.monitors],
        )
    found = read_run(grid / cell.run_id)
    assert timeless_rows(found.trace) == timeless_rows(outcome.trace)
    expected = timeless(outcome.summary())
    assert {k: found.summary[k] for k in expected} == expected


def test_every_run_has_the_stores_files_and_columns(grid: Path) -> None:
    runs = read_runs([grid])
    assert sorted(run.path.name for run in runs) == [
        f"{a}__{d}__seed0" for a in ("accu", "sign_flip") for d in ("none", "server")
    ]
    for run in runs:
        assert {p.name for p in run.path.iterdir()} == {
            "config.toml",
            "trace.parquet",
            "summary.json",
            "environment.json",
            "SHA256SUMS",
            ".lock",
        }
        assert pq.read_schema(run.path / "trace.parquet").equals(TRACE_SCHEMA)
        assert [row["step"] for row in run.trace] == [0, 1, 2, 3, 4]
        assert run.config["clients"]["clients"] == 10
        hostile = 2 / 6 if "sign_flip" in run.path.name else 1 / 6  # rounded up to whole clients of six
        assert [row["poisoned"] for row in run.trace] == pytest.approx([0, *[hostile] * 4])


@pytest.mark.parametrize("kill_at", [1, 3])
@pytest.mark.parametrize("attack", ["accu", "sign_flip"])
def test_a_killed_run_goes_on_to_the_same_numbers(
    tmp_path: Path, grid: Path, cache: Path, attack: str, kill_at: int
) -> None:
    recipe = recipe_of(attacks=attack, defences="server")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path, device="cpu", cache=cache, watcher=Log(kill_at))
    (directory,) = tmp_path.glob("*/")
    assert (directory / "state.safetensors").exists()
    log = Log()
    run_recipe(recipe, tmp_path, device="cpu", resume=True, cache=cache, watcher=log)
    assert log.steps == list(range(kill_at + 1, 4))
    assert same_runs(read_run(directory), read_run(grid / directory.name))


def test_looking_back_in_rounds_survives_a_kill(tmp_path: Path, cache: Path) -> None:
    tables = tables_of("federated.rounds=4", attacks="sign_flip")
    tables["defence"] = {"name": "dgc", "old": "back", "back": 2, "threshold": 0.0, "clip_norm": 0.05, "lr": 0.05}
    recipe = make_recipe(tables)
    run_recipe(recipe, tmp_path / "whole", device="cpu", cache=cache)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "killed", device="cpu", cache=cache, watcher=Log(3))
    run_recipe(recipe, tmp_path / "killed", device="cpu", cache=cache, resume=True)
    (whole,), (killed,) = (read_runs([tmp_path / name]) for name in ("whole", "killed"))
    assert same_runs(whole, killed)
    norms = [row["bounded_norm"] for row in whole.trace[1:]]
    assert [norm <= 0.05 * (1 + 1e-5) for norm in norms] == [False, False, True, True, True]  # once there is a past


@pytest.mark.parametrize("changes", [("clients.alpha=2.0",), ("federated.lr=0.1",), ("attack.poison_ratio=0.5",)])
def test_other_settings_do_not_resume(grid: Path, cache: Path, changes: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="was made with other settings"):
        run_recipe(recipe_of(*changes), grid, device="cpu", resume=True, cache=cache)


def test_the_burn_ins_momentum_can_be_taken_over(tmp_path: Path, grid: Path, cache: Path) -> None:
    run_recipe(
        recipe_of("federated.restore_momentum=true", attacks="sign_flip", defences="none"),
        tmp_path,
        device="cpu",
        cache=cache,
    )
    (run,) = read_runs([tmp_path])
    usual = read_run(grid / run.path.name)
    assert run.trace[0]["accuracy"] == usual.trace[0]["accuracy"]
    assert run.trace[1]["bounded_norm"] == usual.trace[1]["bounded_norm"]
    assert run.trace[1]["update_norm"] != usual.trace[1]["update_norm"]


def test_seeds_divide_and_draw_anew(tmp_path: Path, cache: Path) -> None:
    recipe = recipe_of("burn_in.seed=5", "federated.seeds=[0, 1]", attacks="sign_flip", defences="none")
    run_recipe(recipe, tmp_path, device="cpu", cache=cache)
    first, second = read_runs([tmp_path])
    assert first.trace[0]["loss"] == second.trace[0]["loss"]  # one burn-in
    assert first.trace[1]["loss"] != second.trace[1]["loss"]
    assert torch.isfinite(torch.tensor([row["loss"] for row in first.trace])).all()
