"""Components from elsewhere: modules, files, installed packages, and classes by where they are."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mithridate as mi
from mithridate.core import registry
from mithridate.core.errors import ConfigError
from mithridate.core.registry import KINDS, build, config_of, entries, entry, load_plugin
from mithridate.data.catalogue import dataset_info
from mithridate.models import build_model

HEAD = """
from dataclasses import dataclass
import mithridate as mi
from mithridate.core.registry import register, settings
"""
HALVE = """
@register("defence", "halve")
@settings
class Halve(mi.Defence):
    "Half of every gradient."
    factor: float = 0.5
"""


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What a test imports and registers is forgotten after it."""
    known = {kind: dict(entries(kind)) for kind in KINDS}
    monkeypatch.setattr(registry, "_entries", known)
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.chdir(tmp_path)
    modules = set(sys.modules)
    registry.broken_packages.cache_clear()
    yield
    for name in set(sys.modules) - modules:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]
    registry.broken_packages.cache_clear()


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEAD + text, encoding="utf-8")
    importlib.invalidate_caches()
    return path


def install(folder: Path, name: str, module: str) -> None:
    """As much of an installed package as Python looks at to find its entry points."""
    info = folder / f"{name}-1.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[mithridate.components]\nany = {module}\n", encoding="utf-8")


# Modules and files.


def test_a_module_is_loaded_by_its_name(tmp_path: Path) -> None:
    write(tmp_path / "path" / "zoo" / "__init__.py", "")
    write(tmp_path / "path" / "zoo" / "halving.py", HALVE)
    assert load_plugin("zoo.halving") == "zoo.halving"
    assert entry("defence", "halve").origin == "zoo.halving"
    assert config_of(build("defence", {"name": "halve", "factor": 0.25})) == {"name": "halve", "factor": 0.25}
    assert load_plugin("zoo.halving") == "zoo.halving"  # twice is once
    with pytest.raises(ConfigError, match="unknown defence 'halv': did you mean 'halve'"):
        entry("defence", "halv")


def test_a_file_is_loaded_by_its_path_from_any_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "elsewhere" / "halving.py", HALVE)
    assert load_plugin("halving.py", folder=tmp_path / "elsewhere") == str(path)
    assert load_plugin("elsewhere/halving.py") == str(path)
    assert entry("defence", "halve").origin == str(path)
    assert entry("defence", "halving:Halve").cls is entry("defence", "halve").cls


def test_a_file_hides_no_module_of_its_name(tmp_path: Path) -> None:
    import colorsys

    write(tmp_path / "colorsys.py", HALVE)
    load_plugin("./colorsys.py")
    assert "halve" in entries("defence")
    assert sys.modules["colorsys"] is colorsys
    assert importlib.import_module("colorsys") is colorsys


def test_two_files_of_one_name_are_two_plugins(tmp_path: Path) -> None:
    write(tmp_path / "a" / "mine.py", HALVE)
    write(tmp_path / "b" / "mine.py", HALVE.replace("halve", "quarter"))
    load_plugin("a/mine.py")
    load_plugin("b/mine.py")
    assert {"halve", "quarter"} <= set(entries("defence"))


def test_every_kind_of_component_is_known_by_name_and_by_place(tmp_path: Path) -> None:
    bases = {
        "aggregator": "mi.aggregators.Median",
        "attack": "mi.attacks.Noise",
        "update_attack": "mi.update_attacks.NoiseUpdates",
        "defence": "mi.defences.Clip",
        "detector": "mi.detectors.Loss",
        "model": "mi.models.SmallCNN",
        "monitor": "mi.monitors.AccuracyFloor",
    }
    assert set(bases) == set(KINDS)
    write(
        tmp_path / "path" / "allsorts.py",
        "".join(
            f'@register("{kind}", "of_all_sorts")\n@settings\nclass The_{kind}({base}):\n    "Some {kind}."\n'
            for kind, base in bases.items()
        ),
    )
    for kind in KINDS:
        placed = build(kind, {"name": f"allsorts:The_{kind}"})
        assert config_of(placed)["name"] == f"allsorts:The_{kind}"
        assert build(kind, config_of(placed)) == placed
    load_plugin("allsorts")
    for kind in KINDS:
        named = build(kind, {"name": "of_all_sorts"})
        assert config_of(named)["name"] == "of_all_sorts"
        assert type(named) is entry(kind, f"allsorts:The_{kind}").cls


@pytest.mark.parametrize(
    ("plugin", "text", "message"),
    [
        (
            "no_such_module",
            None,
            r"plug-in no_such_module cannot be loaded \(ModuleNotFoundError: No module named 'no_",
        ),
        ("none.py", None, r"there is no plug-in .*none\.py; give a module's name"),
        (".", None, r"there is no plug-in .*; give a module's name"),
        ("raising.py", "1 / 0", r"raising\.py cannot be loaded \(ZeroDivisionError: division by zero\)"),
        ("wrong.py", "def", r"wrong\.py cannot be loaded \(SyntaxError: "),
        ("lazy.py", "x = 1", r"lazy\.py \(.*lazy\.py\) registers no component; decorate"),
        ("json", None, r"the plug-in json \(.*json.*\) registers no component; .* give the path of the file"),
        ("taken.py", HALVE.replace("halve", "clip"), r"'clip' is registered already, by mithridate; choose another"),
        (
            "kind.py",
            HALVE.replace('"defence"', '"defense"'),
            r"unknown kind of component 'defense': did you mean 'defence'",
        ),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_told(tmp_path: Path, plugin: str, text: str | None, message: str) -> None:
    if text is not None:
        write(tmp_path / plugin, text)
    before = {kind: set(entries(kind)) for kind in KINDS}
    with pytest.raises(ConfigError, match=message) as caught:
        load_plugin(plugin)
    assert "\n" not in str(caught.value)
    assert {kind: set(entries(kind)) for kind in KINDS} == before


def test_a_plugin_that_fails_registers_nothing(tmp_path: Path) -> None:
    write(tmp_path / "half.py", HALVE + "raise RuntimeError('no')\n")
    with pytest.raises(ConfigError, match="RuntimeError: no"):
        load_plugin("half.py")
    assert "halve" not in entries("defence")
    write(tmp_path / "half.py", HALVE)
    load_plugin("half.py")
    assert "halve" in entries("defence")


# Installed packages.


def test_installed_packages_offer_components(tmp_path: Path) -> None:
    write(tmp_path / "path" / "zoo" / "__init__.py", "from zoo import halving\n")
    write(tmp_path / "path" / "zoo" / "halving.py", HALVE)
    install(tmp_path / "path", "the-zoo", "zoo")
    assert entries("defence")["halve"].origin == "the-zoo 1.5"
    assert not registry.broken_packages()
    assert config_of(build("defence", {"name": "halve"})) == {"name": "halve", "factor": 0.5}
    assert "zoo.halving" in sys.modules


def test_a_broken_package_is_told_and_stands_in_nobodys_way(tmp_path: Path) -> None:
    write(tmp_path / "path" / "broken.py", HALVE.replace("halve", "third") + "import no_such_module\n")
    write(tmp_path / "path" / "halving.py", HALVE)
    write(tmp_path / "path" / "thief.py", HALVE.replace("halve", "clip"))
    install(tmp_path / "path", "broken-package", "broken")
    install(tmp_path / "path", "the-zoo", "halving")
    install(tmp_path / "path", "thief", "thief")
    assert build("defence", {"name": "clip"}) == mi.defences.Clip()
    assert {"halve", "clip"} <= set(entries("defence"))
    assert entry("defence", "clip").cls is mi.defences.Clip
    assert "third" not in entries("defence")
    first, second = registry.broken_packages()
    assert "installed package broken-package cannot be loaded (ModuleNotFoundError: No module named 'no_such" in first
    assert "pip uninstall broken-package" in first
    assert "installed package thief cannot be loaded (defence 'clip' is registered already, by mithridate" in second
    with pytest.raises(ConfigError, match=r"^unknown defence 'third': .* package broken-package cannot be loaded"):
        build("defence", {"name": "third"})


def test_known_names_are_looked_up_without_loading_packages(tmp_path: Path) -> None:
    write(tmp_path / "path" / "slow_package.py", HALVE)
    install(tmp_path / "path", "slow-package", "slow_package")
    build("defence", {"name": "clip"})
    assert "slow_package" not in sys.modules
    build("defence", {"name": "halve"})
    assert "slow_package" in sys.modules


# Classes by where they are.

ZOO = """
@dataclass(frozen=True, kw_only=True)
class Halve(mi.Defence):
    factor: float = 0.5
    sizes: tuple[int, ...] = ()

    class Inner(mi.Monitor):
        pass

class Undecorated(mi.Defence):
    pass

@settings
class Abstract(mi.Attack):
    pass

@settings
class Lossy(mi.Defence):
    floor: float | None = 0.8

@register("defence", "with_presets", presets={"paper": {"factor": 0.1}})
@settings
class WithPresets(mi.Defence):
    factor: float = 0.5

@settings
class Unrelated:
    pass
"""


def test_a_class_needs_no_registration(tmp_path: Path) -> None:
    write(tmp_path / "path" / "zoo.py", ZOO)
    made = build("defence", {"name": "zoo:Halve", "factor": 0.25})
    assert config_of(made) == {"name": "zoo:Halve", "factor": 0.25, "sizes": []}
    assert made.factor == 0.25
    with pytest.raises(ConfigError, match=r"^\[defence\] zoo:Halve: unknown key 'facto': did you mean 'factor'"):
        build("defence", {"name": "zoo:Halve", "facto": 0.25})
    chain = build("defence", {"name": "chain", "parts": [{"name": "zoo:Halve"}, {"name": "clip"}]})
    assert [part["name"] for part in config_of(chain)["parts"]] == ["zoo:Halve", "clip"]


def test_a_registered_class_has_its_presets_by_place_too(tmp_path: Path) -> None:
    write(tmp_path / "path" / "zoo.py", ZOO)
    made = build("defence", {"name": "zoo:WithPresets", "preset": "paper"})
    assert made.factor == 0.1
    assert config_of(made) == {"name": "zoo:WithPresets", "factor": 0.1}


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("defence", "zoo:Halv", r"zoo\.py has no Halv: did you mean 'Halve'\? Known: Halve, Lossy, WithPresets\.$"),
        ("defence", "zoo:Halve.Outer", r"zoo\.py has no Halve\.Outer"),
        ("attack", "zoo:Halve", "Halve is of the kind 'defence', not 'attack'; name it there, or another class here"),
        ("defence", "zoo:Halve.Inner", "Halve.Inner is of the kind 'monitor', not 'defence'"),
        ("model", "zoo:Halve", "Halve is of the kind 'defence', not 'model'"),
        (
            "defence",
            "zoo:Unrelated",
            "Unrelated is no defence; name a dataclass that derives from mithridate's Defence",
        ),
        ("defence", "zoo:dataclass", "dataclass is no defence"),
        ("defence", "zoo:Undecorated", "Undecorated is no dataclass; decorate it"),
        ("attack", "zoo:Abstract", "Abstract is abstract: it lacks ball, craft, ratio; write them"),
        ("defence", "zoo:Lossy", r"floor may be None, so its default must be None, not 0\.8"),
        ("defence", "aquarium:Halve", r"the module aquarium cannot be imported \(ModuleNotFoundError: .*'aquarium'\)"),
        ("defence", "failing:Halve", r"the module failing cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("defence", "zoo:", "write package.module:Class"),
        ("defence", ":Halve", "write package.module:Class"),
        ("defence", "zoo.py:Halve:x", "write package.module:Class"),
        ("model", "zoo:Net", r"zoo\.py has no Net"),
    ],
)
def test_a_place_without_the_class_is_told(tmp_path: Path, kind: registry.Kind, name: str, message: str) -> None:
    write(tmp_path / "path" / "zoo.py", ZOO)
    write(tmp_path / "path" / "failing.py", "1 / 0\n")
    with pytest.raises(ConfigError, match=message) as caught:
        build(kind, {"name": name})
    assert str(caught.value).startswith(f"{kind} '{name}': ")
    assert "\n" not in str(caught.value)


# Models by function.

NETS = """
import torch
from torch import nn

def linear(info, *, seed, bias=True, scale=1.0):
    channels, height, width = info.shape
    net = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, len(info.classes), bias=bias))
    net.seed, net.scale = seed, scale
    return net

class Bare(nn.Module):
    "Knows nothing of data sets and seeds; its width must be said."
    def __init__(self, width, pixels=64, norm=None):
        super().__init__()
        self.hidden, self.last = nn.Linear(pixels, width), nn.Linear(width, 10)
    def forward(self, x):
        return self.last(self.hidden(x.flatten(1)).relu())

def anything(**options):
    return Bare(**options)

def number():
    return 3
"""


@pytest.fixture
def nets(tmp_path: Path) -> None:
    write(tmp_path / "path" / "nets.py", NETS)


@pytest.mark.parametrize(
    "table",
    [
        {"name": "nets:linear", "bias": False},
        {"name": "nets:Bare", "width": 5},
        {"name": "nets:anything", "width": 5},
    ],
    ids=lambda table: str(table["name"]),
)
def test_any_function_makes_a_model(nets: None, table: dict[str, object]) -> None:
    info = dataset_info("digits")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = (build_model(table, info, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        assert not torch.equal(parameter, other.get_parameter(name))
    made = build("model", table)
    config = config_of(made)
    assert config["name"] == table["name"]
    assert table.items() <= config.items()
    assert build("model", config) == made
    assert hash(build("model", config)) == hash(made)


def test_a_function_gets_what_its_signature_names(nets: None) -> None:
    table = {"name": "nets:linear", "scale": 2.0}
    net = build_model(table, dataset_info("digits"), seed=5)
    assert net.seed == 5
    assert net.scale == 2.0
    assert config_of(build("model", table)) == {"name": "nets:linear", "bias": True, "scale": 2.0}
    bare = config_of(build("model", {"name": "nets:Bare", "width": 5}))
    assert bare == {"name": "nets:Bare", "pixels": 64, "width": 5}  # TOML has no None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "nets:Bare"}, r"^\[model\] nets:Bare: width has no default; give it a value"),
        ({"name": "nets:Bare", "widht": 3}, r"^\[model\] nets:Bare: unknown key 'widht': did you mean 'width'"),
        ({"name": "nets:linear", "seed": 3}, r"^\[model\] nets:linear: unknown key 'seed'"),
        ({"name": "nets:Bare", "width": "x"}, r"^\[model\] nets:Bare cannot make a model for digits \(TypeError"),
        ({"name": "nets:Bare", "width": 3, "pixels": 9}, "Bare cannot take one image of digits"),
        ({"name": "nets:number"}, r"^\[model\] nets:number gives int; it must return a torch\.nn\.Module"),
        ({"name": "nets:liner"}, "has no liner: did you mean 'linear'"),
    ],
)
def test_a_function_that_does_not_fit_is_told(nets: None, table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(table, dataset_info("digits"), seed=0)
