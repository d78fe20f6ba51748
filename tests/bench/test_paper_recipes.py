"""The recipes at the papers' size: what they resolve to, and that they run when they are cut to a size for a test."""

from pathlib import Path

import pytest

from mithridate.bench.engine import run_recipe
from mithridate.bench.recipe import Recipe, read_recipe
from mithridate.bench.store import read_run
from mithridate.core.registry import config_of, fields_of

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = (
    "model.width=2",
    "burn_in.epochs=1",
    "burn_in.checkpoints=[0]",
    "data.burn_in=60",
    "data.victim=20",
    "data.batch_size=10",
    "data.test=40",
    "data.validation=20",
    "run.images=0",
    "run.steps=1",
)


def changed(recipe: str, *changes: str, seeds: list[int] | None = None) -> Recipe:
    return read_recipe(RECIPES / recipe, changes=changes, seeds=seeds)


@pytest.mark.parametrize("recipe", ["cifar10-paper.toml", "defences-paper.toml"])
def test_burn_in_and_stream_are_the_papers(recipe: str) -> None:
    """Pang et al., section 4 and A.3; Zhu et al., section 4.1."""
    for variant in changed(recipe).each():
        sgd = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
        burn_in, run = fields_of(variant.burn_in), fields_of(variant.run)
        assert burn_in.items() >= {**sgd, "epochs": 40, "batch_size": 100, "schedule": "constant"}.items()
        assert run.items() >= sgd.items()
        assert config_of(variant.model).items() >= {"name": "resnet18", "width": 64, "norm": "batch"}.items()
        data = variant.data.resolved()
        assert (data.overlap, data.augment, data.augment_stream, data.batch_size) == (True, True, True, 100)
        assert data.burn_in == {"cifar10": 50_000, "cifar100": 50_000, "svhn": 73_257}[data.name]


def test_table_1_of_pang_et_al_has_all_its_rows_and_two_epochs_of_phase() -> None:
    recipe = changed("cifar10-paper.toml")
    assert recipe.run.steps == 1000
    made = {attack.label: config_of(attack.component) for attack in recipe.attacks}
    tricks = {"", "+accu", "+accu+sval", "+accu+momentum", "+accu+opt", "+accu+opt+momentum"}
    budgets = {"8-255": 8 / 255, "16-255": 16 / 255, "0.1": 0.1}
    rows = {f"poisoned{trick}+eps-{name}": eps for trick in tricks for name, eps in budgets.items()}
    assert made.keys() == rows.keys() | {f"noise+eps-{name}" for name in budgets} | {"clean-trigger"} | {
        f"clean+accu{trick}" for trick in ("", "+sval", "+momentum")
    }
    for label, eps in rows.items():
        assert (made[label]["eps"], made[label]["steps"]) == (eps, 100)
        assert "step_size" not in made[label]  # 2 eps / C
        assert made[label].get("weight_momentum") == (1.1 if "+momentum" in label else None)
        if "accu" in label:
            assert made[label]["accuracy_floor"] == 0.8
            assert made[label]["resample_validation"] == ("+sval" in label)
            assert (made[label]["trigger_mode"] == "reoptimised") == ("+opt" in label)


def test_table_1_of_zhu_et_al_has_its_data_sets_defences_and_thresholds() -> None:
    recipe = changed("defences-paper.toml")
    assert [(v.variant, v.data.name) for v in recipe.variants] == [(n, n) for n in ("cifar10", "svhn", "cifar100")]
    for variant in recipe.variants:
        assert [d.label for d in variant.defences] == ["none", "clip", "at", "dsc"]
        dsc = config_of(variant.defences[3].component)
        assert (dsc["mu"], dsc["tau"]) == ((1.7, 0.1) if variant.variant == "cifar100" else (0.5, 0.02))
        assert dsc["epoch"] == variant.burn_in.epochs // 2 == 20
        assert variant.burn_in.checkpoints == (20,)
        assert variant.run.steps + 1 == 100  # batches of the clean oracle


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "svhn", "cifar100"])
def test_table_1_of_zhu_et_al_runs_on_each_data_set_at_a_size_for_a_test(
    name: str, tmp_path: Path, data_root: Path
) -> None:
    # The train split of svhn is not in every mirror, and to decode that of cifar100 takes long.
    split = [] if name == "cifar10" else ["data.split=test"]
    changes = ("grid=none", f"data.name={name}", *split, *TINY, "defence.epoch=0", "defence.steps=1", "attack.steps=1")
    grid = run_recipe(
        changed("defences-paper.toml", *changes, seeds=[3]),
        tmp_path / "out",
        device="cpu",
        data_root=data_root,
        cache=None,
    )
    runs = [read_run(directory) for directory in grid.directories]
    assert len(runs) == 3 * 4
    assert {run.summary["dataset"] for run in runs} == {name}
    assert {run.trace[-1]["phase"] for run in runs} == {"trigger"}


@pytest.mark.slow
def test_table_1_of_pang_et_al_runs_at_a_size_for_a_test(tmp_path: Path, data_root: Path) -> None:
    budgets = [f'grid.attack.{label}.eps=["16/255"]' for label in ("noise", "poisoned", "poisoned+accu+opt+momentum")]
    others = [f"grid.attack.poisoned+accu{trick}.eps=[0.1]" for trick in ("", "+sval", "+momentum", "+opt")]
    recipe = changed("cifar10-paper.toml", *budgets, *others, *TINY, "attack.steps=1", "data.passes=2", seeds=[3])
    grid = run_recipe(recipe, tmp_path / "out", device="cpu", data_root=data_root, cache=None)
    runs = {d.name.partition("__")[0]: read_run(d) for d in grid.directories}
    assert len(runs) == 11
    assert runs["poisoned+eps-16-255"].trace[-1]["poison_linf"] == pytest.approx(16 / 255, abs=1e-6)
    assert runs["clean-trigger"].summary["steps"] == 0
    assert {run.trace[-1]["phase"] for run in runs.values()} == {"trigger"}
