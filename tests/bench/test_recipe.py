"""Recipes: what they say is what runs, and what they cannot say is an error that names the nearest thing."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from mithridate.attacks.accumulative import Accumulative
from mithridate.bench.recipe import Recipe, apply_change, make_recipe, read_recipe
from mithridate.core import registry
from mithridate.core.attack import Attack
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.registry import Kind, entries
from mithridate.defences.clip import Clip
from mithridate.monitors.accuracy_floor import AccuracyFloor

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


def recipe_of(text: str) -> Recipe:
    return make_recipe(tomllib.loads(text))


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# The recipes that come with the library.


def test_the_promised_recipes_are_shipped() -> None:
    promised = {"demo", "cifar10-small", "cifar10-paper", "mnist-small", "cifar10-defences-small", "federated-demo"}
    promised |= {"defences-paper"}
    assert promised <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.stem))
def test_a_shipped_recipe_is_whole(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.title
    assert len({cell.run_id.lower() for cell in recipe.cells()}) == len(list(recipe.cells()))
    for variant in recipe.each():
        cells = list(variant.cells())
        pairs = len(variant.attacks) * len(variant.defences) * max(len(variant.rules), 1)
        assert len(cells) == pairs * len(variant.seeds)
        assert "clean" in {
            registry.config_of(a.component)["name"] for a in variant.attacks
        }  # something to compare with
        resolved = variant.data.resolved()
        assert isinstance(resolved.victim, int)
        assert resolved.batch_size is not None
        if variant.clients is None:
            assert variant.run.steps + 1 <= resolved.passes * (resolved.victim // resolved.batch_size)
        else:
            assert variant.clients.clients <= resolved.victim


# Tables.

SMALL = '[attack]\nname = "noise"\n'


def test_what_is_left_out_has_its_default() -> None:
    recipe = recipe_of(SMALL)
    assert [a.label for a in recipe.attacks] == ["noise"]
    assert [d.label for d in recipe.defences] == ["none"]
    assert list(recipe.monitors) == []
    assert list(recipe.seeds) == [0]
    assert (recipe.data.name, recipe.title) == ("digits", "")


def test_one_table_or_an_array_of_tables() -> None:
    several = recipe_of(
        '[[attack]]\nname = "noise"\n[[attack]]\nname = "noise"\nlabel = "loud+2.0"\neps = 0.5\n'
        '[[defence]]\nname = "clip"\nclip_norm = 0.5\n[[defence]]\nname = "none"\n'
        '[[monitor]]\nname = "accuracy_floor"\nfloor = 0.5\n[run]\nseeds = [3, 1]\nsteps = 2\n'
    )
    ids = [cell.run_id for cell in several.cells()]
    assert ids == [
        f"{attack}__{defence}__seed{seed}"
        for seed in (3, 1)
        for defence in ("clip", "none")
        for attack in ("noise", "loud+2.0")
    ]
    loud = several.attacks[1].component
    assert isinstance(loud, Attack)
    assert loud.ball.eps == 0.5
    assert several.defences[0].component == Clip(clip_norm=0.5)
    assert several.monitors[0].component == AccuracyFloor(floor=0.5)
    single = recipe_of(
        '[attack]\nname = "noise"\n[defence]\nname = "clip"\n[monitor]\nname = "accuracy_floor"\nfloor = 0.5\n'
    )
    assert [len(part) for part in (single.attacks, single.defences, single.monitors)] == [1, 1, 1]


def test_a_preset_is_a_start_that_fields_win_over() -> None:
    recipe = recipe_of('[attack]\nname = "accumulative"\npreset = "released"\nsteps = 5\n')
    attack = recipe.attacks[0].component
    assert isinstance(attack, Accumulative)
    assert (attack.steps, attack.eps, attack.normalise) == (5, 0.2, "tensor")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"the recipe has no \[attack\].*mithridate list attacks"),
        ('[atack]\nname = "noise"\n', r"unknown table \[atack\]: did you mean 'attack'"),
        ('[attack]\nname = "noize"\n', "unknown attack 'noize': did you mean 'noise'"),
        ('[attack]\nname = "noise"\nepz = 0.1\n', r"\[attack\] noise: unknown key 'epz': did you mean 'eps'"),
        ("[attack]\neps = 0.1\n", r"\[attack\] has no `name`"),
        ('[attack]\nname = "accumulative"\npreset = "papr"\n', "unknown preset 'papr': did you mean 'paper'"),
        ('[attack]\nname = "noise"\neps = -0.1\n', r"\[attack\] noise: eps = -0.1: .*greater than or equal to 0"),
        ('[attack]\nname = "noise"\neps = nan\n', r"\[attack\] noise: eps = nan"),
        ('[attack]\nname = "noise"\neps = "big"\n', r"\[attack\] noise: eps = 'big'"),
        (SMALL + '[defence]\nname = "clipp"\n', "unknown defence 'clipp': did you mean 'clip'"),
        (SMALL + '[monitor]\nname = "accuracy"\n', "unknown monitor 'accuracy': did you mean 'accuracy_floor'"),
        (SMALL + '[model]\nname = "resnet19"\n', "unknown model 'resnet19': did you mean 'resnet18'"),
        (SMALL + '[model]\nname = "small_cnn"\nwith = 3\n', "unknown key 'with': did you mean 'width'"),
        (SMALL + '[data]\nname = "cifar"\n', "unknown data set 'cifar': did you mean 'cifar10'"),
        (SMALL + "[data]\nbatchsize = 3\n", r"\[data\]: unknown key 'batchsize': did you mean 'batch_size'"),
        (SMALL + "[burn_in]\nepoch = 3\n", r"\[burn_in\]: unknown key 'epoch': did you mean 'epochs'"),
        (SMALL + "[burn_in]\nepochs = 3\ncheckpoints = [4]\n", r"\[burn_in\] checkpoints \[4\] come after"),
        (SMALL + "[run]\nstep = 3\n", r"\[run\]: unknown key 'step': did you mean 'steps'"),
        (SMALL + "[run]\nsteps = 1.5\n", r"\[run\]: steps = 1.5"),
        (SMALL + "[run]\nsteps = -1\n", r"\[run\]: steps = -1"),
        (SMALL + '[run]\non_alarm = "stop"\n', r"\[run\]: on_alarm = 'stop'"),
        (SMALL + "[run]\nseeds = []\n", r"\[run\] seeds = \[\]: give a list of whole numbers"),
        (SMALL + "[run]\nseeds = 3\n", r"\[run\] seeds = 3: give a list"),
        (SMALL + "[run]\nseeds = [0, -1]\n", r"\[run\] seeds = \[0, -1\]"),
        (SMALL + "[run]\nseeds = [true]\n", r"\[run\] seeds = \[True\]"),
        (SMALL + "[run]\nseeds = [1, 2, 1]\n", "a seed twice is the same run twice"),
        ('[[attack]]\nname = "noise"\n[[attack]]\nname = "noise"\n', r"two \[\[attack\]\] are called 'noise'"),
        ('[attack]\nname = "noise"\nlabel = "a/b"\n', r"\[attack\] label 'a/b': use 1 to 64"),
        ('[attack]\nname = "noise"\nlabel = "../up"\n', r"\[attack\] label '../up'"),
        ('[attack]\nname = "noise"\nlabel = ""\n', r"\[attack\] label ''"),
        ("attack = 3\n", r"\[attack\] must be a table, not 3"),
        ("attack = [1, 2]\n", r"\[attack\] must be a table or an array of tables, not 1"),
        (SMALL + "[[data]]\nname = 'digits'\n", r"\[data\] must be a table"),
        ("run = 3\n" + SMALL, r"\[run\] must be a table, not 3"),
    ],
)
def test_a_mistake_is_named_and_so_is_the_nearest_right_thing(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path / "a.toml", text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(path)


@pytest.mark.parametrize(
    "text", ["attack = 3\n", "attack = [1, 2]\n", "run = 3\n" + SMALL, "data = 'digits'\n" + SMALL]
)
def test_a_table_that_is_none_is_named_also_where_it_is_changed(tmp_path: Path, text: str) -> None:
    path = written(tmp_path / "a.toml", text)
    wrong = text.partition(" ")[0]
    for options in ({"seeds": [1]}, {"changes": ["attack.eps=0.1", "run.steps=2", "data.seed=3"]}):
        with pytest.raises(ConfigError, match=rf"\[{wrong}\] must be a table"):
            read_recipe(path, **options)


def test_portions_that_do_not_fit_are_refused_when_the_recipe_is_read() -> None:
    with pytest.raises(DataError, match="too few for"):
        recipe_of(SMALL + "[data]\nvictim = 99999\n")


@pytest.mark.parametrize(
    ("content", "message"), [(b"[attack", "not readable TOML"), (b"\xff\xfe", "not readable TOML")]
)
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_recipe(tmp_path / "bad.toml")
    assert "bad.toml" in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no recipe .*none\.toml"):
        read_recipe(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="not readable"):
        read_recipe(tmp_path)


# Changes from the command line.

GRID = """
[[attack]]
name = "clean"
label = "clean-trigger"
[[attack]]
name = "vanilla"
[[attack]]
name = "accumulative"
label = "accu+8.255"
lam = 0.5
[defence]
name = "clip"
[run]
steps = 3
"""


def changed(*changes: str, text: str = GRID) -> Recipe:
    tables = tomllib.loads(text)
    for change in changes:
        apply_change(tables, change)
    return make_recipe(tables)


def attacks(recipe: Recipe) -> dict[str, Any]:
    return {a.label: a.component for a in recipe.attacks}


def test_a_change_reaches_every_component_that_has_the_key() -> None:
    made = attacks(changed("attack.normalise=tensor", "attack.eps = 0.25"))
    assert made["vanilla"].normalise == made["accu+8.255"].normalise == "tensor"
    assert [a.eps for a in made.values()] == [0.25] * 3
    assert made["accu+8.255"].lam == 0.5


def test_a_change_by_label_reaches_that_one_alone() -> None:
    made = attacks(changed("attack.accu+8.255.eps=0.25", "attack.vanilla.steps=7"))
    assert made["accu+8.255"].eps == 0.25
    assert made["vanilla"].eps != 0.25
    assert (made["vanilla"].steps, made["accu+8.255"].steps) == (7, 10)


def test_changes_of_other_tables_and_of_tables_that_were_not_there() -> None:
    recipe = changed(
        "run.steps=9",
        "run.seeds=[4, 5]",
        "data.victim=600",
        "burn_in.epochs=2",
        "model.name=small_cnn",
        "model.norm=group",
        "defence.clip_norm=inf",
        "monitor.name=accuracy_floor",
        "monitor.floor=0.8",
    )
    assert (recipe.run.steps, list(recipe.seeds), recipe.data.victim, recipe.burn_in.epochs) == (9, [4, 5], 600, 2)
    assert recipe.model.norm == "group"
    assert recipe.defences[0].component == Clip(clip_norm=float("inf"))
    assert recipe.monitors[0].component == AccuracyFloor(floor=0.8)
    assert isinstance(changed("defence.name=clip", text=SMALL).defences[0].component, Clip)


def test_later_changes_win() -> None:
    assert changed("run.steps=1", "run.steps=2").run.steps == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("attack.eps", "write table.key=value"),
        ("eps=0.1", "write table.key=value"),
        ("attack.=1", "write table.key=value"),
        (".eps=1", "write table.key=value"),
        ("atack.eps=0.1", "unknown table 'atack': did you mean 'attack'"),
        ("attack.epz=0.1", "no attack of the recipe has 'epz': did you mean 'eps'"),
        ("attack.vanila.eps=0.1", "no attack 'vanila' in the recipe: did you mean 'vanilla'"),
        ("run.fast.steps=3", r"\[run\] has no parts; write run.steps"),
        ("run.stepz=3", r"\[run\]: unknown key 'stepz': did you mean 'steps'"),
        ("run.steps=many", r"\[run\]: steps = 'many'"),
        ("defence.clip_nom=1", "unknown key 'clip_nom': did you mean 'clip_norm'"),
    ],
)
def test_a_wrong_change_is_named(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(change)


def test_seeds_given_beside_the_recipe_replace_its_own(tmp_path: Path) -> None:
    path = written(tmp_path / "a.toml", GRID + "seeds = [0, 1, 2]\n")
    assert list(read_recipe(path).seeds) == [0, 1, 2]
    assert list(read_recipe(path, seeds=[7]).seeds) == [7]
    assert list(read_recipe(path, seeds=[7], changes=["run.seeds=[3]"]).seeds) == [7]
    with pytest.raises(ConfigError, match=r"seeds = \[1, 1\]"):
        read_recipe(path, seeds=[1, 1])


# The resolved settings of a run.

EVERYTHING = """
title = "ü, \\"quoted\\""
[data]
name = "digits"
victim = 300
augment = false
[model]
name = "small_cnn"
norm = "group"
width = 8
[burn_in]
epochs = 3
checkpoints = [1, 2]
lr = 0.30000000000000004
[[attack]]
name = "accumulative"
preset = "paper"
label = "paper"
max_drop = 0.034
[[attack]]
name = "clean"
[[defence]]
name = "clip"
clip_norm = inf
[[monitor]]
name = "accuracy_floor"
floor = 0.8
[[monitor]]
name = "loss_amplification"
label = "loss"
window = 4
[run]
steps = 4
seeds = [1, 2]
"""


def configs(recipe: Recipe) -> list[Mapping[str, Any]]:
    return [cell.config() for cell in recipe.cells()]


def test_a_runs_settings_are_a_recipe_of_that_run() -> None:
    every = [recipe_of(EVERYTHING), recipe_of(SMALL), *map(read_recipe, SHIPPED)]
    for recipe in every:
        for cell in recipe.cells():
            again = recipe_of(tomli_w.dumps(cell.config()))
            assert configs(again) == [cell.config()]
            (only,) = again.cells()
            assert only.run_id == cell.run_id
            assert only.attack == cell.attack
            assert only.defence == cell.defence
            assert only.recipe.monitors == cell.recipe.monitors
            assert only.recipe.run == cell.recipe.run
            assert recipe.rules or recipe.variants or cell.recipe.run == recipe.run
            assert only.recipe.model == cell.recipe.model
            assert only.recipe.burn_in == cell.recipe.burn_in


def test_the_settings_are_resolved() -> None:
    config = configs(recipe_of(EVERYTHING))[0]
    assert set(config) == {"title", "data", "model", "burn_in", "attack", "defence", "monitor", "run"}
    assert config["attack"]["label"] == "paper"
    assert (config["attack"]["steps"], config["attack"]["accuracy_floor"]) == (100, 0.8)  # the preset, written out
    assert "preset" not in config["attack"]
    assert config["defence"]["clip_norm"] == float("inf")
    assert config["data"]["burn_in"] == 700
    assert config["run"]["seeds"] == [1]
    assert config["burn_in"]["lr"] == 0.30000000000000004


@pytest.mark.parametrize("kind", ["attack", "defence", "monitor"])
def test_every_component_can_be_asked_for_by_name(kind: Kind) -> None:
    for name in entries(kind):
        tables: dict[str, Any] = {"attack": {"name": "clean"}, kind: {"name": name}, "burn_in": {"checkpoints": [20]}}
        (cell,) = make_recipe(tables).cells()
        assert configs(recipe_of(tomli_w.dumps(cell.config()))) == [cell.config()]


@pytest.mark.parametrize("table", ["burn_in", "run", "federated"])
@pytest.mark.parametrize(
    ("key", "value", "bound"),
    [
        ("momentum", 1, "less than 1"),
        ("momentum", 1.5, "less than 1"),
        ("momentum", -0.1, "greater than or equal to 0"),
        ("lr", 1e6, "less than 1000000"),
        ("lr", 3e30, "less than 1000000"),
        ("lr", "inf", "valid number|finite"),
        ("lr", 0, "greater than 0"),
        ("lr", -0.1, "greater than 0"),
    ],
)
def test_rates_that_no_sgd_should_be_given_are_refused(table: str, key: str, value: Any, bound: str) -> None:
    attack = {"attack": {"name": "clean"}}
    with pytest.raises(ConfigError, match=rf"\[{table}\]: {key} = .*: .*({bound})"):
        make_recipe(
            {**attack, "federated": {}, table: {key: value}}
            if table == "federated"
            else {**attack, table: {key: value}}
        )
    make_recipe({**attack, table: {"momentum": 0.999, "lr": 999_999}})


def test_who_follows_the_victims_steps_has_its_ranges() -> None:
    for table in ({"name": "gate_aware", "victim_momentum": 1.0}, {"name": "gate_aware", "victim_lr": 1e6}):
        with pytest.raises(ConfigError, match="less than"):
            make_recipe({"attack": table})
    with pytest.raises(ConfigError, match=r"lr = .*less than"):
        make_recipe({"attack": {"name": "clean"}, "defence": {"name": "dgc", "lr": 1e6}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            'defence={name = "gate"}',
            r"is a table.* Write --set defence\.name=\.\.\., .*--set defence=none\.$",
        ),
        ("defence={name=gate}", r"Write --set defence\.KEY=\.\.\., "),
        ("defence=name=gate", r"Write --set defence\.KEY=\.\.\., "),
        ("defence=gate", r"Write --set defence\.name=gate, "),
        ("model=vgg11", r"Write --set model\.name=vgg11, "),
        ("attack=pgd", r"Write --set attack\.noise\.name=pgd, "),
        ("burn_in={epochs=3,lr=1}", r"Write --set burn_in\.epochs=\.\.\. --set burn_in\.lr=\.\.\., "),
        ("run=3", r"Write --set run\.KEY=\.\.\., "),
        (
            "federated.rule={name=krum}",
            r"""is no TOML; .* --set 'federated\.rule=\{ name = "krum" \}'\.$""",
        ),
        ("burn_in.checkpoints=[a]", r"""\[a\] is no TOML; .* --set 'burn_in\.checkpoints=\["a", "b"\]'\.$"""),
        ("burn_in.checkpoints=none", r"checkpoints = 'none': it is a list; for none of them, write \[\]\.$"),
        ("burn_in.checkpoints=None", r"checkpoints = 'None': it is a list; for none of them, write \[\]\.$"),
        ("burn_in.checkpoints=1,2", r"checkpoints = '1,2': give a list in brackets, such as \[1, 2\]\.$"),
        ("burn_in.older=none", r"older = 'none': it is a table; for none of them, write \{\}\.$"),
        ("burn_in.older=3", r"older = 3: give a table, such as"),
        ("burn_in.epochs=none", r"epochs = 'none': it cannot be unset; give it a value, or .* its default, 40\.$"),
        ("burn_in.seed=null", r"seed = 'null': to unset it, write none\.$"),
        ("grid.run.lr=none", r"lr = 'none': it cannot be unset"),
    ],
)
def test_a_change_that_is_none_says_what_to_write(change: str, message: str) -> None:
    tables: dict[str, Any] = {"attack": [{"name": "noise"}, {"name": "clean"}]}
    with pytest.raises(ConfigError, match=message) as caught:  # noqa: PT012  (either may tell)
        apply_change(tables, change)
        make_recipe(tables)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("change", ["burn_in.checkpoints=[]", "burn_in.older={}", "burn_in.seed=none", "defence=none"])
def test_what_such_a_message_says_can_be_written(change: str) -> None:
    tables: dict[str, Any] = {"attack": {"name": "noise"}}
    apply_change(tables, change)
    make_recipe(tables)
