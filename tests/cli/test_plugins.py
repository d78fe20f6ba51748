"""Components from elsewhere on the command line: an installed package, `--plugin`, and `package.module:Class`."""

import json
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from mithridate.bench.recipe import read_recipe
from mithridate.bench.store import read_run, read_runs, run_id
from mithridate.cli.blame import blamed
from mithridate.core import registry
from mithridate.core.defence import Defence
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.registry import KINDS, config_of, entries
from tests.command import Result, invoke, started
from tests.recipes import tiny_text

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin"
WEAK_DP = """
[attack]
name = "clean"
[[defence]]
name = "none"
[[defence]]
name = "weak_dp"
clip_norm = 0.5
"""
OWN_PARTS = """
[model]
name = "parts:Linear"
[attack]
name = "noise"
[[monitor]]
name = "parts:Silent"
[[defence]]
name = "halve"
[[defence]]
name = "parts:Scale"
factor = 0.25
"""
PARTS = """
import mithridate as mi
from torch import nn

@mi.register("defence", "halve")
@mi.settings
class Halve(mi.Defence):
    "Half of every gradient."
    factor: float = 0.5

    def bound(self, gradient, view):
        return gradient.with_rows(gradient.rows * self.factor)

@mi.settings
class Scale(Halve):
    pass

@mi.settings
class Silent(mi.Monitor):
    def alarm(self, readings):
        return None

class Linear(nn.Module):
    def __init__(self, info):
        super().__init__()
        channels, height, width = info.shape
        self.last = nn.Linear(channels * height * width, len(info.classes))

    def forward(self, x):
        return self.last(x.flatten(1))
"""


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What a test imports and registers is forgotten after it; it stands in an empty folder."""
    monkeypatch.setattr(registry, "_entries", {kind: dict(entries(kind)) for kind in KINDS})
    monkeypatch.chdir(tmp_path)
    modules = set(sys.modules)
    registry.broken_packages.cache_clear()
    yield
    for name in set(sys.modules) - modules:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path) or name == "weak_dp":
            del sys.modules[name]
    registry.broken_packages.cache_clear()


def lay_out(project: Path, target: Path) -> None:
    """What `pip install --target` leaves of a project, as far as Python looks at it."""
    about = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    for name in about["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]:
        target.mkdir(exist_ok=True)
        shutil.copy(project / name, target / name)
    name, version = about["project"]["name"], about["project"]["version"]
    info = target / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    lines = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
        for group, points in about["project"]["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.slow
def test_an_installed_package_runs_from_a_recipe_and_again_from_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "installed"
    lay_out(EXAMPLE, target)
    (tmp_path / "small.toml").write_text(tiny_text(WEAK_DP), encoding="utf-8")
    call = ("run", "small.toml", "--threads", "1", "--out", "first", "--set", "defence.weak_dp.noise=0.5")
    process = started(*call, folder=tmp_path, path=target)
    assert (process.returncode, process.stderr) == (0, "")
    first = read_run(tmp_path / "first" / "clean__weak_dp__seed0")
    assert first.config["defence"] == {"name": "weak_dp", "clip_norm": 0.5, "noise": 0.5, "seed": 0}
    assert "plugins" not in first.config  # whoever has the package needs no more

    done = invoke("report", "first", "--out", "report")  # a report needs no plug-in
    assert done.code == 0
    assert "weak_dp" in done.out
    assert "weak_dp" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    again = ("run", first.path / "config.toml", "--threads", "1", "--out", "again")
    done = invoke(*again)
    assert done.code == 2
    assert done.err.startswith("error: unknown defence 'weak_dp': Known: ")

    monkeypatch.syspath_prepend(target)
    registry.broken_packages.cache_clear()
    done = invoke(*again)
    assert (done.code, done.err) == (0, "")
    second = read_run(tmp_path / "again" / first.path.name)
    assert second.config == first.config
    assert [row["accuracy"] for row in second.trace] == [row["accuracy"] for row in first.trace]
    undefended = read_run(tmp_path / "first" / "clean__none__seed0")
    assert [row["loss"] for row in first.trace] != [row["loss"] for row in undefended.trace]

    done = invoke("list", "defences")
    assert done.code == 0
    for part in ("weak_dp", "Clip each update", "plug-in: mithridate-weak-dp 0.1"):
        assert part in done.out
    done = invoke("list", "defences", "weak_dp")
    assert done.code == 0
    for part in ("Clip each update", "noise = 0.001", "arXiv:1911.07963", "plug-in: mithridate-weak-dp 0.1"):
        assert part in done.out


@pytest.mark.slow
def test_a_plugin_and_a_place_are_found_in_the_current_directory_and_recorded(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "parts.py").write_text(PARTS, encoding="utf-8")
    (tmp_path / "tiny.toml").write_text(tiny_text(OWN_PARTS), encoding="utf-8")
    call = ("run", "../tiny.toml", "--plugin", "parts.py", "--threads", "1", "--out", tmp_path / "out")
    process = started(*call, "--set", "defence.Scale.factor=0.125", folder=work)
    assert (process.returncode, process.stderr) == (0, "")
    configs = {run.path.name: run.config for run in read_runs([tmp_path / "out"])}
    scaled = run_id("noise", "Scale", 0)  # a capital: where a file system knows none, "scale" has the same name
    assert set(configs) == {"noise__halve__seed0", scaled}
    for config in configs.values():
        assert config["plugins"] == [str(work / "parts.py")]
        assert config["model"] == {"name": "parts:Linear"}
        assert config["monitor"] == {"name": "parts:Silent", "label": "Silent"}
    assert configs[scaled]["defence"] == {"name": "parts:Scale", "label": "Scale", "factor": 0.125}
    assert configs["noise__halve__seed0"]["defence"] == {"name": "halve", "factor": 0.5}

    for name, config in configs.items():  # from another folder: the plug-in is named by its path
        (cell,) = read_recipe(tmp_path / "out" / name / "config.toml").cells()
        assert cell.run_id == name
        assert cell.config() == config


def test_the_recipe_of_the_example_is_whole() -> None:
    recipe = read_recipe(EXAMPLE / "recipe.toml", plugins=[str(EXAMPLE / "weak_dp.py")])
    assert [d.label for d in recipe.defences] == ["none", "weak_dp"]


def test_a_recipe_names_plugins_beside_it(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "parts.py").write_text(PARTS, encoding="utf-8")
    path = tmp_path / "recipes" / "tiny.toml"
    path.write_text('plugins = ["parts.py"]\n' + tiny_text(OWN_PARTS), encoding="utf-8")
    recipe = read_recipe(path, plugins=["recipes/parts.py"], changes=["defence.factor=0.75"])
    assert recipe.plugins == (str(tmp_path / "recipes" / "parts.py"),)
    assert [config_of(d.component)["factor"] for d in recipe.defences] == [0.75, 0.75]
    with pytest.raises(ConfigError, match=r"no defence of the recipe has 'facto': did you mean 'factor'"):
        read_recipe(path, changes=["defence.facto=0.75"])
    path.write_text("plugins = 3\n" + tiny_text(OWN_PARTS), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^plugins = 3: give a list of modules or \.py files"):
        read_recipe(path)


@pytest.mark.parametrize("command_", ["run", "calibrate", "list"])
def test_a_plugin_that_cannot_be_loaded_ends_with_code_2(tmp_path: Path, command_: str) -> None:
    recipe = [] if command_ == "list" else ["tiny.toml"]
    (tmp_path / "tiny.toml").write_text(tiny_text(OWN_PARTS), encoding="utf-8")
    done = invoke(command_, *recipe, "--plugin", "no_such_module")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: the plug-in no_such_module cannot be loaded (ModuleNotFoundError: ")


def test_a_plugin_is_listed_with_where_it_comes_from(tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(PARTS, encoding="utf-8")
    done = invoke("list", "defences", "--plugin", "parts.py")
    assert done.code == 0
    assert "Half of every gradient" in done.out
    assert "plug-in:" in done.out
    assert "parts.py" in done.out


def test_a_broken_package_is_told_after_the_list_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "installed"
    lay_out(EXAMPLE, target)
    (target / "weak_dp.py").write_text("import no_such_module\n", encoding="utf-8")
    monkeypatch.syspath_prepend(target)
    registry.broken_packages.cache_clear()
    done = invoke("list", "monitors")
    assert done.code == 2
    assert "accuracy_floor" in done.out
    assert done.err.startswith(
        "error: The components of the installed package mithridate-weak-dp cannot be loaded (Module"
    )
    assert done.err.endswith("pip uninstall mithridate-weak-dp).")


BROKEN = """
import mithridate as mi
from torch import nn

def helper(x):
    return x / 0

@mi.register("defence", "broken")
@mi.settings
class Broken(mi.Defence):
    "Raises an error of its own."
    where: str = ""

    def begin(self, view):
        if self.where == "begin" and view.step == 1:
            helper(1)

    def screen(self, batch, view):
        if self.where == "screen":
            raise RuntimeError("[bold]many[/]\\nlines, \\x1b[31m" + "and long ones " * 100)
        return super().screen(batch, view)

    def bound(self, updates, view):
        if self.where == "file":
            open("/nowhere/at/all")
        return updates

    def check_inputs(self, batch):
        if self.where == "check":
            raise KeyError("early")

@mi.settings
class Loud(mi.Monitor):
    def alarm(self, readings):
        assert len(readings) < 2, "no more than one"

class Half(nn.Module):
    def __init__(self, info):
        super().__init__()
        self.last = nn.Linear(64, len(info.classes))

    def forward(self, x):
        if self.training:
            raise NotImplementedError("training")
        return self.last(x.flatten(1))
"""


def tell(text: str, tmp_path: Path) -> Result:
    """Run a recipe with the broken parts."""
    (tmp_path / "parts.py").write_text(BROKEN, encoding="utf-8")
    whole = tiny_text(f'plugins = ["parts.py"]\n[attack]\nname = "clean"\n{text}\n')
    (tmp_path / "small.toml").write_text(whole, encoding="utf-8")
    done = invoke("run", "small.toml", "--threads", "1", "--out", "out", "--cache", "cache")
    assert "Traceback" not in done.err
    assert "\x1b" not in done.stdout + done.stderr
    return done


@pytest.mark.parametrize(
    ("recipe", "message", "line"),
    [
        ('[defence]\nname = "broken"\nwhere = "begin"', "Broken.begin .* ZeroDivisionError: division by zero", "x / 0"),
        ('[defence]\nname = "broken"\nwhere = "screen"', "Broken.screen .* RuntimeError: .*many", "raise RuntimeError"),
        ('[defence]\nname = "broken"\nwhere = "file"', "Broken.bound .* FileNotFoundError: .*nowhere", "open("),
        ('[monitor]\nname = "parts:Loud"', "Loud.alarm .* AssertionError: no more than one", "assert len"),
        ('[model]\nname = "parts:Half"', "Half.forward .* NotImplementedError: training", "raise NotImplementedError"),
    ],
    ids=["a step", "words of any kind", "a file", "a monitor", "a model"],
)
def test_an_error_of_a_components_own_is_a_sentence_and_its_traceback_is_kept(
    recipe: str, message: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    done = tell(recipe, tmp_path)
    assert done.code == 1
    start = r"error: 1 of 1 runs failed\. Mend what is wrong, and give the same command again \(`run` with --resume\)\."
    told = re.fullmatch(rf"{start} (\S+): {message}.* \[(\S+)\]", done.err)
    assert told, done.err
    assert len(done.err) < 620
    assert f"{told[1]} failed: " in done.out
    record = tmp_path / "out" / told[1] / "error.json"
    assert tmp_path / told[2] == record
    text = json.loads(record.read_text(encoding="utf-8"))["traceback"]
    assert line in text
    assert "parts.py" in text


def test_an_error_before_the_first_run_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    done = tell('[defence]\nname = "broken"\nwhere = "check"', tmp_path)
    assert done.code == 2
    end = r"Its traceback is in (\S+)\. Mend it, or leave it out\."
    told = re.fullmatch(rf"error: Broken.check_inputs .* KeyError: 'early'\. {end}", done.err)
    assert told, done.err
    assert "raise KeyError" in Path(told[1]).read_text(encoding="utf-8")
    assert not (tmp_path / "out").exists()


def test_an_error_that_is_nobody_elses_is_told_by_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small.toml").write_text(tiny_text('[attack]\nname = "clean"'), encoding="utf-8")
    monkeypatch.setattr("mithridate.bench.workplace.prepare", lambda *_: None)
    monkeypatch.setattr("mithridate.bench.workplace.run_cell", lambda *_: 1 / 0)
    done = invoke("run", "small.toml", "--threads", "1", "--out", "out", "--cache", "cache")
    assert done.code == 1
    assert "clean__none__seed0: ZeroDivisionError: division by zero." in done.err
    assert "1 / 0" in (tmp_path / "out" / "clean__none__seed0" / "error.json").read_text(encoding="utf-8")


def test_what_is_told_already_stays_what_it_is_and_names_the_traceback(tmp_path: Path) -> None:
    class Mine(Defence):
        def begin(self, view: object) -> None:
            raise ValueError("why")

    def told() -> None:
        with blamed(), blamed(tmp_path):
            try:
                Mine().begin(None)
            except ValueError as error:
                raise DataError("a sentence.") from error

    for _ in range(2):
        with pytest.raises(DataError, match=rf"^a sentence\. Its traceback is in {tmp_path}/traceback\.txt\.$"):
            told()
    assert (tmp_path / "traceback.txt").read_text(encoding="utf-8").count("ValueError: why") == 2
    with pytest.raises(ConfigError, match=r"^mine$"), blamed(tmp_path):
        raise ConfigError("mine")
