"""Recipes that extend others: what is merged, where paths begin, and what is refused."""

import copy
from pathlib import Path

import pytest
import tomli_w
import typer.testing

from mithridate.bench.inheritance import DEEPEST, LARGEST, MOST, merged
from mithridate.bench.recipe import Recipe, make_recipe, read_recipe
from mithridate.cli.app import app
from mithridate.core import registry
from mithridate.core.errors import LONGEST, ConfigError
from mithridate.core.registry import KINDS, entries
from mithridate.defences.clip import Clip
from mithridate.simulation.online import OnlineRun
from tests.recipes import TINY

PLUGIN = """
from mithridate.core.defence import Defence
from mithridate.core.registry import register, settings

@register("defence", "{name}")
@settings
class {name}(Defence):
    "A defence that does nothing."
"""


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def configs(recipe: Recipe) -> list[object]:
    return [cell.config() for cell in recipe.cells()]


def test_tables_are_merged_key_by_key_and_arrays_replaced() -> None:
    base = {
        "title": "base",
        "data": {"name": "digits", "test": 40},
        "attack": [{"name": "noise"}, {"name": "pgd"}],
        "monitor": [{"name": "accuracy_floor"}],
        "grid": {"data": {"seed": [0, 1]}},
        "plugins": ["a.py"],
    }
    over = {
        "title": "over",
        "data": {"test": 50},
        "attack": [{"name": "vanilla"}],
        "defence": {"name": "clip"},
        "monitor": "none",
        "grid": {"data": {"passes": [1, 2]}},
        "plugins": ["b.py"],
    }
    before = copy.deepcopy((base, over))
    result = merged(base, over)
    assert result == {
        "title": "over",
        "data": {"name": "digits", "test": 50},
        "attack": [{"name": "vanilla"}],
        "grid": {"data": {"seed": [0, 1], "passes": [1, 2]}},
        "plugins": ["a.py", "b.py"],
        "defence": {"name": "clip"},
    }
    result["data"]["test"] = result["attack"][0]["name"] = result["defence"]["name"] = None
    assert (base, over) == before  # the result shares nothing with either
    assert merged({}, base) == merged(base, {}) == base


def test_a_recipe_over_a_base_is_the_recipe_that_says_it_all(tmp_path: Path) -> None:
    written(tmp_path, "base.toml", TINY)
    child = written(
        tmp_path, "child.toml", 'extends = "base.toml"\n[run]\nlr = 0.01\n[[defence]]\nname = "clip"\nclip_norm = 0.5\n'
    )
    recipe = read_recipe(child, changes=["run.steps=2"])
    whole = TINY.replace("steps = 3\nlr = 0.05", "steps = 2\nlr = 0.01")
    whole += '[[defence]]\nname = "clip"\nclip_norm = 0.5\n'
    assert configs(recipe) == configs(read_recipe(written(tmp_path, "whole.toml", whole)))
    assert isinstance(recipe.run, OnlineRun)
    assert (recipe.run.steps, recipe.run.lr, recipe.title) == (2, 0.01, "tiny")


def test_of_several_bases_the_last_wins_and_the_file_itself_over_them(tmp_path: Path) -> None:
    written(tmp_path, "base.toml", TINY)
    written(tmp_path, "scale.toml", 'extends = "base.toml"\n[run]\nlr = 0.2\n[burn_in]\nlr = 0.2\n')
    written(tmp_path, "rate.toml", "[run]\nlr = 0.3\nmomentum = 0.5\n")
    child = written(tmp_path, "child.toml", 'extends = ["scale.toml", "rate.toml"]\n[run]\nmomentum = 0.6\n')
    recipe = read_recipe(child)
    assert isinstance(recipe.run, OnlineRun)
    assert (recipe.burn_in.lr, recipe.run.lr, recipe.run.momentum) == (0.2, 0.3, 0.6)


def test_paths_and_plugins_begin_at_the_file_that_says_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", {kind: dict(entries(kind)) for kind in KINDS})  # as they were, after it
    written(tmp_path, "bases/defences/below.py", PLUGIN.format(name="Below"))
    written(tmp_path, "children/above.py", PLUGIN.format(name="Above"))
    base = (
        'plugins = ["defences/below.py"]\n[[attack]]\nname = "noise"\n[[defence]]\nname = "Below"\n'
        '[data]\nname = "npz"\npath = "arrays.npz"\n'
        '[burn_in]\ncheckpoint = "m.safetensors"\nepochs = 3\n[burn_in.older]\n1 = "old.safetensors"\n'
    )
    written(tmp_path, "bases/base.toml", base)
    over = '[[defence]]\nname = "Above"\n[[defence]]\nname = "Below"\n[burn_in.older]\n2 = "old.safetensors"\n'
    child = written(tmp_path, "children/child.toml", f'extends = "../bases/base.toml"\nplugins = ["above.py"]\n{over}')
    recipe = read_recipe(child)
    bases, children = tmp_path / "children" / ".." / "bases", tmp_path / "children"
    assert Path(str(recipe.data.path)) == bases / "arrays.npz"
    assert Path(str(recipe.burn_in.checkpoint)) == bases / "m.safetensors"
    assert {int(epoch): Path(path) for epoch, path in recipe.burn_in.older.items()} == {
        1: bases / "old.safetensors",
        2: children / "old.safetensors",
    }
    assert [Path(plugin).name for plugin in recipe.plugins] == ["below.py", "above.py"]
    unset = written(
        tmp_path, "unset.toml", 'extends = "bases/base.toml"\n[burn_in]\ncheckpoint = "none"\nolder = "none"\n'
    )
    with pytest.raises(ConfigError, match="older"):  # a table of paths has no unset value
        read_recipe(unset)


def test_a_table_of_the_base_is_taken_out(tmp_path: Path) -> None:
    written(tmp_path, "base.toml", TINY + '[monitor]\nname = "accuracy_floor"\n[grid]\nrun.lr = [0.1, 0.2]\n')
    child = written(tmp_path, "child.toml", 'extends = "base.toml"\nmonitor = "none"\ngrid = "none"\n')
    assert len(list(read_recipe(tmp_path / "base.toml").cells())) == 2
    (cell,) = read_recipe(child).cells()
    assert cell.config()["monitor"] == []
    with pytest.raises(ConfigError, match=r"\[detector\] must be a table, not 'none'"):
        read_recipe(written(tmp_path, "wrong.toml", 'extends = "base.toml"\ndetector = "none"\n'))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": 'extends = "no.toml"'}, r"there is no recipe .*no\.toml; mend extends in .*a\.toml"),
        ({"a": 'extends = "a.toml"'}, r"a\.toml extends .*a\.toml, which extends it"),
        (
            {"a": 'extends = "b.toml"', "b": 'extends = ["./c.toml"]', "c": 'extends = "../x/a.toml"'},
            "which extends it",
        ),
        ({"a": "extends = 3"}, r"a\.toml: extends = 3: give the path of a recipe, or a list of paths"),
        ({"a": 'extends = ["b.toml", ""]', "b": ""}, "give the path of a recipe"),
        ({"a": "extends = [[[[]]]]"}, "give the path of a recipe"),
        ({"a": 'extends = "b.toml"', "b": "[atack]"}, r"unknown table \[atack\]: did you mean 'attack'"),
        ({"a": 'extends = "b.toml"', "b": "= 1"}, r"b\.toml is not readable TOML"),
        ({"a": 'extends = "b.toml"', "b": "#" * LARGEST + "#"}, r"b\.toml is larger than .* mend extends in .*a\.toml"),
        ({"a": 'extends = "."'}, r"is not readable \(Is a directory\)"),
        ({"a": r'extends = "b\u0000"'}, "NUL character"),
        ({"a": 'extends = "~nobody-here/x.toml"'}, "write the path without ~"),
        ({"a": 'extends = "b.toml"', "b": "plugins = 3"}, "plugins = 3: give a list"),
        ({"a": 'extends = "b.toml"\n[run.a.b]\nc = 1', "b": "attack.name = 'noise'\nrun.a = 1"}, r"\[run\]"),
        (
            {"a": 'extends = "b0.toml"', **{f"b{i}": f'extends = "b{i + 1}.toml"' for i in range(DEEPEST + 1)}},
            f"extends too much: {DEEPEST} files above each other",
        ),
        ({"a": tomli_w.dumps({"extends": ["b.toml"] * MOST}), "b": ""}, f"and {MOST} in all"),
        (
            {"a": 'extends = ["b.toml", "b.toml"]'}
            | {b: f'extends = ["{c}.toml", "{c}.toml", "{c}.toml"]' for b, c in ("bc", "cd", "de")}
            | {"e": ""},
            f"and {MOST} in all",
        ),
    ],
)
def test_what_cannot_be_extended_is_told_in_a_sentence(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in files.items():
        written(tmp_path, f"x/{name}.toml", f"{text}\n")
    with pytest.raises(ConfigError, match=message) as caught:
        read_recipe(tmp_path / "x" / "a.toml")
    assert len(str(caught.value)) <= LONGEST


def test_as_many_as_allowed_are_taken(tmp_path: Path) -> None:
    for i in range(DEEPEST):
        written(tmp_path, f"{i}.toml", f'extends = "{i + 1}.toml"\n')
    written(tmp_path, f"{DEEPEST}.toml", TINY)
    assert read_recipe(tmp_path / "0.toml").title == "tiny"
    written(tmp_path, "wide.toml", tomli_w.dumps({"extends": [f"{DEEPEST}.toml"] * (MOST - 1)}))
    assert read_recipe(tmp_path / "wide.toml").title == "tiny"


def test_the_command_line_says_it_and_writes_nothing(tmp_path: Path) -> None:
    child = written(tmp_path, "child.toml", 'extends = "base.toml"\n')
    done = typer.testing.CliRunner().invoke(app, ["run", str(child), "--out", str(tmp_path / "runs")])
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert f"there is no recipe {tmp_path / 'base.toml'}; mend extends in {child}." in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["child.toml"]


def test_tables_without_a_file_extend_nothing() -> None:
    with pytest.raises(ConfigError, match=r"extends belongs to a file: .* merge tables by `merged`"):
        make_recipe({"extends": "base.toml", "attack": {"name": "noise"}})


def test_a_changed_setting_reaches_the_component(tmp_path: Path) -> None:
    written(tmp_path, "base.toml", TINY + '[defence]\nname = "clip"\nclip_norm = 0.5\nnorm = "linf"\n')
    recipe = read_recipe(written(tmp_path, "child.toml", 'extends = "base.toml"\n[defence]\nclip_norm = 2\n'))
    assert recipe.defences[0].component == Clip(clip_norm=2, norm="linf")
