"""A recipe's grid: any setting crossed with any other, each run with its own id, settings and burn-in."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from mithridate.bench.calibration import calibrate_recipe
from mithridate.bench.engine import run_recipe
from mithridate.bench.recipe import Recipe, make_recipe
from mithridate.bench.store import read_run
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.registry import config_of
from tests.recipes import Log, tiny_recipe

BASE = """
[burn_in]
epochs = 2
batch_size = 20
lr = 0.05
schedule = "constant"
checkpoints = [0, 1]
[[attack]]
name = "noise"
[[defence]]
name = "none"
[[defence]]
name = "clip"
"""
ACCU = """
[[attack]]
name = "accumulative"
label = "accu"
steps = 1
trigger_update = "after_step"
"""


def recipe_of(text: str, *changes: str, accu: str = ACCU) -> Recipe:
    """Two attacks and two defences of the tiny recipe, with a grid over them."""
    return tiny_recipe(BASE + accu + text, *changes)


def ids(recipe: Recipe) -> list[str]:
    return [cell.run_id for cell in recipe.cells()]


def setting(cell: Any, path: str) -> Any:
    table, _, key = path.partition(".")
    return cell.config()[table].get(key)


@pytest.mark.parametrize(
    ("path", "values", "names"),
    [
        ("data.victim", [60, 80], ["victim-60", "victim-80"]),
        ("data.name", ["digits"], ["digits"]),
        ("data.passes", [1, 2], ["passes-1", "passes-2"]),
        ("model.norm", ["batch", "none"], ["norm-batch", "norm-none"]),
        ("burn_in.epochs", [1, 2], ["epochs-1", "epochs-2"]),
        ("burn_in.checkpoints", [[1], [0, 1]], ["checkpoints-1", "checkpoints-0-1"]),
        ("burn_in.clip_norm", ["none", 0.1], ["clip_norm-none", "clip_norm-0.1"]),
        ("monitor.max_drop", [0.1, 0.2], ["max_drop-0.1", "max_drop-0.2"]),
        ("run.lr", [0.05, 1e-3], ["lr-0.05", "lr-0.001"]),
        ("run.restore_momentum", [True, False], ["restore_momentum-true", "restore_momentum-false"]),
    ],
)
def test_a_setting_of_a_table_that_is_there_once_makes_variants(path: str, values: list[Any], names: list[str]) -> None:
    text = tomli_w.dumps({"grid": {path: values}})
    recipe = recipe_of('[[monitor]]\nname = "accuracy_floor"\n' * path.startswith("monitor") + text)
    pairs = [("noise", "none"), ("accu", "none"), ("noise", "clip"), ("accu", "clip")]
    assert ids(recipe) == [
        f"{attack}__{defence}__{name}__seed0" for name in names for defence, attack in [(d, a) for a, d in pairs]
    ]
    for number, cell in enumerate(recipe.cells()):
        value = values[number // 4]
        assert setting(cell, path) == (None if value == "none" and path != "model.norm" else value)


def test_settings_of_attacks_and_defences_make_several_of_those_that_have_them() -> None:
    recipe = recipe_of('[grid]\nattack.eps = ["8/255", 0.1]\nattack.lam = [0.5, 1.0]\ndefence.clip_norm = [1, 10]\n')
    assert [a.label for a in recipe.attacks] == [
        "noise+eps-8-255",
        "noise+eps-0.1",
        *(f"accu+eps-{eps}+lam-{lam}" for eps in ("8-255", "0.1") for lam in ("0.5", "1")),
    ]
    assert [a.component.eps for a in recipe.attacks][:2] == [8 / 255, 0.1]  # type: ignore[union-attr]  # attacks of a stream
    assert [d.label for d in recipe.defences] == ["none", "clip+clip_norm-1", "clip+clip_norm-10"]
    assert not recipe.variants
    assert len(set(ids(recipe))) == 18


def test_one_component_is_named_by_its_label_and_what_is_said_of_it_wins() -> None:
    recipe = recipe_of('[grid]\nattack.eps = [0.1, 0.2]\n"attack.accu.eps" = [0.3]\n"attack.accu.steps" = [1, 2]\n')
    assert [a.label for a in recipe.attacks] == [
        "noise+eps-0.1",
        "noise+eps-0.2",
        "accu+eps-0.3+steps-1",
        "accu+eps-0.3+steps-2",
    ]


def test_components_themselves_are_crossed_by_name() -> None:
    recipe = recipe_of('[grid]\n"defence.clip.name" = ["clip", "at"]\nmodel.name = ["small_cnn", "resnet18"]\n')
    assert [d.label for d in recipe.defences] == ["none", "clip", "at"]
    assert [v.variant for v in recipe.variants] == ["small_cnn", "resnet18"]


def test_everything_at_once_varies_data_slowest_and_attacks_fastest() -> None:
    recipe = recipe_of(
        "[grid]\nrun.lr = [0.1, 0.2]\ndata.seed = [0, 1]\nburn_in.seed = [5, 6]\nattack.accu.lam = [0, 1]\n"
    )
    assert [v.variant for v in recipe.variants] == [
        f"data.seed-{data}+burn_in.seed-{burn_in}+lr-{lr}"
        for data in (0, 1)
        for burn_in in (5, 6)
        for lr in ("0.1", "0.2")
    ]
    assert ids(recipe)[:3] == [
        "noise__none__data.seed-0+burn_in.seed-5+lr-0.1__seed0",
        "accu+lam-0__none__data.seed-0+burn_in.seed-5+lr-0.1__seed0",
        "accu+lam-1__none__data.seed-0+burn_in.seed-5+lr-0.1__seed0",
    ]


def test_several_grids_are_done_one_after_the_other_and_single_values_are_set() -> None:
    recipe = recipe_of(
        '[[grid]]\ndata.name = ["digits"]\ndata.seed = [0, 1]\n'
        '[[grid]]\ndata.name = ["mnist"]\n"defence.clip.clip_norm" = 7.0\nburn_in.epochs = 1\n'
    )
    assert [v.variant for v in recipe.variants] == ["digits+seed-0", "digits+seed-1", "mnist"]
    assert [d.label for d in recipe.variants[2].defences] == ["none", "clip"]
    assert [v.defences[1].component.clip_norm for v in recipe.variants] == [1.0, 1.0, 7.0]  # type: ignore[attr-defined]  # clip
    assert [v.burn_in.epochs for v in recipe.variants] == [2, 2, 1]


def test_names_that_would_be_the_same_are_numbered() -> None:
    recipe = recipe_of("[grid]\nrun.lr = [0.1, 0.1000000001]\n")
    assert [v.variant for v in recipe.variants] == ["lr-0.1-1", "lr-0.1-2"]
    long = recipe_of(f'[grid]\nburn_in.lower_after = [{[1] * 20}, {[2] * 20}]\nburn_in.schedule = "steps"\n')
    assert [v.variant for v in long.variants] == ["lower_after-1", "lower_after-2"]


@pytest.mark.parametrize(
    "text",
    [
        '[grid]\nattack.eps = ["8/255", 0.1]\ndata.seed = [0, 1]\nburn_in.clip_norm = ["none", 1]\n',
        '[[surrogate]]\nlabel = "old"\nepoch = 0\n[[surrogate]]\nlabel = "older"\nepoch = 1\n'
        '[grid]\n"attack.accu.model_access" = ["victim", "surrogate"]\n',
    ],
)
def test_a_runs_settings_are_a_recipe_of_that_run_alone(text: str) -> None:
    for cell in recipe_of(text).cells():
        (only,) = make_recipe(tomllib.loads(tomli_w.dumps(cell.config()))).cells()
        assert only.run_id == cell.run_id
        assert only.config() == cell.config()


# Several surrogates.

SURROGATES = '[[surrogate]]\nlabel = "old"\nepoch = 0\n[[surrogate]]\nlabel = "other"\nkind = "trained"\n'


def test_only_attacks_that_craft_on_a_surrogate_are_run_once_for_each() -> None:
    recipe = recipe_of(SURROGATES, "attack.accu.model_access=surrogate", "defence=none")
    assert ids(recipe) == ["noise__none__seed0", "accu+old__none__seed0", "accu+other__none__seed0"]
    used = [cell.config().get("surrogate", {}) for cell in recipe.cells()]
    assert [s.get("kind") for s in used] == [None, "checkpoint", "trained"]
    crossed = recipe_of("[grid]\nsurrogate.epoch = [0, 1]\n", "attack.accu.model_access=surrogate", "defence=none")
    assert ids(crossed) == ["noise__none__seed0", "accu+epoch-0__none__seed0", "accu+epoch-1__none__seed0"]


def test_surrogates_need_labels_and_those_are_told_apart() -> None:
    with pytest.raises(ConfigError, match=r"\[surrogate\] label ''"):
        recipe_of("[[surrogate]]\nepoch = 0\n[[surrogate]]\nepoch = 1\n")
    with pytest.raises(ConfigError, match=r"two \[\[surrogate\]\] are called 'old'"):
        recipe_of(SURROGATES.replace("other", "old"))
    assert recipe_of("[[surrogate]]\nepoch = 1\n").surrogate.epoch == 1


# The command line.


def test_a_grid_can_be_given_changed_and_taken_out_by_set() -> None:
    assert [v.variant for v in recipe_of("", "grid.run.lr=[0.1, 0.2]").variants] == ["lr-0.1", "lr-0.2"]
    text = "[grid]\nrun.lr = [0.1, 0.2]\n"
    assert [v.variant for v in recipe_of(text, "grid.run.lr=[0.3, 0.4]").variants] == ["lr-0.3", "lr-0.4"]
    assert not recipe_of(text, "grid=none", "run.lr=0.3").variants
    eps = recipe_of("", 'grid.attack.accu.eps=["8/255", 0.1]')
    assert [a.label for a in eps.attacks] == ["noise", "accu+eps-8-255", "accu+eps-0.1"]


def test_of_several_grids_set_changes_those_that_have_the_setting_or_else_all() -> None:
    text = "[[grid]]\nrun.lr = [0.1, 0.2]\n[[grid]]\nrun.momentum = [0.5]\n"
    assert [v.variant for v in recipe_of(text, "grid.run.lr=[0.3]").variants] == ["lr-0.3", "momentum-0.5"]
    both = recipe_of(text, "grid.burn_in.epochs=1")
    assert [v.variant for v in both.variants] == ["lr-0.1", "lr-0.2", "momentum-0.5"]
    assert {setting(cell, "burn_in.epochs") for cell in both.cells()} == {1}


@pytest.mark.parametrize(
    ("grid", "change"),
    [
        ("run.lr = [0.1, 0.2]", "run.lr=0.3"),
        ("attack.eps = [0.1, 0.2]", "attack.eps=0.3"),
        ("attack.accu.eps = [0.1, 0.2]", "attack.eps=0.3"),
        ("attack.eps = [0.1, 0.2]", "attack.accu.eps=0.3"),
        ("burn_in.epochs = 1", "burn_in.epochs=2"),
    ],
)
def test_what_the_grid_would_overrule_is_refused(grid: str, change: str) -> None:
    shown = r"=\[\.\.\.\]'," if "[" in grid else r"=\.\.\.,"
    with pytest.raises(ConfigError, match=rf"the recipe's grid has .*{shown} .*--set grid=none"):
        recipe_of(f"[grid]\n{grid}\n", change)
    with pytest.raises(ConfigError, match="the recipe's grid has"):
        recipe_of(f"[[grid]]\n{grid}\n[[grid]]\nrun.momentum = [0.5]\n", change)
    noise, *accu = recipe_of("[grid]\nattack.accu.eps = [0.1, 0.2]\n", "attack.noise.eps=0.3").attacks
    assert [config_of(attack.component)["eps"] for attack in (noise, *accu)] == [0.3, 0.1, 0.2]


@pytest.mark.parametrize("table", ["monitor", "detector", "surrogate", "defence", "burn_in"])
def test_a_whole_table_is_unset_by_none(table: str) -> None:
    text = '[[monitor]]\nname = "accuracy_floor"\n[detector]\nname = "loss"\nepoch = 1\n[surrogate]\nepoch = 1\n'
    if table == "burn_in":  # which keeps the epoch that the detector looks at
        text = text.replace('[detector]\nname = "loss"\nepoch = 1\n', "")

    def said(recipe: Recipe) -> Any:
        return {
            "monitor": recipe.monitors,
            "detector": recipe.detectors,
            "surrogate": recipe.surrogate.epoch,
            "defence": ids(recipe),
            "burn_in": recipe.burn_in.epochs,
        }[table]

    unset = {"surrogate": None, "defence": ["noise__none__seed0", "accu__none__seed0"], "burn_in": 40}.get(table, [])
    assert said(recipe_of(text, f"{table}=none")) == unset
    assert said(recipe_of(text)) != unset


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[grid]\nrun.lr = []\n", r"\[grid\] run.lr = \[\]: give some values"),
        ("[grid]\nrun.seeds = [0, 1]\n", r"\[grid\] run.seeds: seeds are crossed as they are"),
        ("[grid]\nrum.lr = [0.1]\n", r"\[grid\]: unknown table 'rum': did you mean 'run'"),
        ("[grid]\nlr = [0.1]\n", r"\[grid\]: write table.key"),
        ("[grid]\nattack.epz = [0.1]\n", r"\[grid\]: no attack of the recipe has 'epz': did you mean 'eps'"),
        ("[grid]\nattack.acu.eps = [0.1]\n", r"\[grid\]: no attack 'acu' in the recipe: did you mean 'accu'"),
        ("[grid]\nrun.fast.lr = [0.1]\n", r"\[grid\]: \[run\] has no parts; write run.lr"),
        ("[grid]\nburn_in.epoch = [1]\n", r"\[burn_in\]: unknown key 'epoch': did you mean 'epochs'"),
        ("[grid]\nburn_in.lr = [0.1, -1]\n", r"\[burn_in\]: lr = -1"),
        ("[[grid]]\nrun.lr = [0.1]\n[[grid]]\nrun.lr = [0.1]\n", "two runs are called noise__none__lr-0.1__seed0"),
        ("[[grid]]\nrun.lr = 0.1\n[[grid]]\nrun.lr = 0.2\n", "two runs are called noise__none__seed0"),
    ],
)
def test_a_mistake_in_a_grid_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_of(text)


def test_a_grid_that_is_no_table_is_named() -> None:
    for grid in (3, [3], "all"):
        with pytest.raises(ConfigError, match=r"\[grid\] must be a table"):
            make_recipe({"attack": {"name": "noise"}, "grid": grid})


def test_a_variant_has_no_threshold_of_the_others() -> None:
    recipe = recipe_of("[grid]\nrun.lr = [0.1, 0.2]\n")
    with pytest.raises(ConfigError, match=r"2 variants.*--set grid=none"):
        next(calibrate_recipe(recipe))


def test_passes_say_nothing_of_a_federation() -> None:
    tables = {"attack": {"name": "clean"}, "federated": {}, "data": {"passes": 2}}
    with pytest.raises(ConfigError, match=r"\[data\] passes = 2: clients of a federation draw"):
        make_recipe(tables)


# Running one.


def test_every_variant_is_run_with_its_own_data_and_burn_ins_are_shared(tmp_path: Path) -> None:
    log = Log()
    recipe = recipe_of(
        "[grid]\ndata.seed = [0, 1]\nburn_in.epochs = [1, 2]\nrun.momentum = [0.5, 0.9]\n", "defence=none", accu=""
    )
    grid = run_recipe(recipe, tmp_path / "out", device="cpu", cache=tmp_path / "cache", watcher=log)
    assert (grid.ran, grid.skipped) == (8, 0)
    assert log.cells == [(number, 8) for number in range(8)]
    # At a constant rate the longer burn-in goes on from the shorter; other momenta of the stream share it.
    assert log.epochs == [(0, 1), (0, 2)] * 2
    runs = {d.name: read_run(d) for d in grid.directories}
    assert sorted(runs) == sorted(ids(recipe))
    keys = {name: run.summary["burn_in_key"] for name, run in runs.items()}
    assert len({key for name, key in keys.items()}) == 2
    for name, run in runs.items():
        variant = name.split("__")[2]
        expected = dict(part.rsplit("-", 1) for part in variant.split("+"))
        assert run.config["variant"] == variant
        for table, key in (("data", "seed"), ("burn_in", "epochs"), ("run", "momentum")):
            assert str(run.config[table][key]) == expected[key]
    again = run_recipe(recipe, tmp_path / "out", device="cpu", cache=tmp_path / "cache", resume=True)
    assert (again.ran, again.skipped) == (0, 8)
    # A single run of the grid is the run that its settings ask for.
    name = "noise__none__seed-1+epochs-2+momentum-0.5__seed0"
    alone = run_recipe(make_recipe(dict(runs[name].config)), tmp_path / "alone", device="cpu", cache=tmp_path / "cache")
    (only,) = map(read_run, alone.directories)
    assert [row["loss"] for row in only.trace] == [row["loss"] for row in runs[name].trace]


def test_what_a_later_variant_cannot_do_is_found_before_the_first_is_run(tmp_path: Path) -> None:
    recipe = recipe_of("[grid]\nrun.steps = [1, 99]\n")
    with pytest.raises(DataError, match="99 accumulative batches"):
        run_recipe(recipe, tmp_path / "out", device="cpu", cache=tmp_path / "cache")
    assert not (tmp_path / "out").exists()


def test_every_surrogate_gives_a_run_of_its_own(tmp_path: Path) -> None:
    text = SURROGATES.replace('kind = "trained"', "epoch = 1")
    recipe = recipe_of(
        text, "attack.accu.model_access=surrogate", "attack.accu.eps=0.2", "defence=none", "run.images=9"
    )
    grid = run_recipe(recipe, tmp_path / "out", device="cpu", cache=tmp_path / "cache")
    noise, old, other = map(read_run, grid.directories)
    assert (old.config["surrogate"]["epoch"], other.config["surrogate"]["epoch"]) == (0, 1)
    assert not (old.images["trigger.poisoned"] == other.images["trigger.poisoned"]).all()
    assert old.trace[0]["accuracy"] == other.trace[0]["accuracy"] == noise.trace[0]["accuracy"]
