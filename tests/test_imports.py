"""Imports point one way (maths, core, components, training, simulation, bench, cli); a report needs no torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
ROOT = SRC / "mithridate"

LAYERS: list[set[str]] = [
    {"maths"},
    {"core"},
    {"data"},
    {"models", "attacks", "update_attacks", "defences", "detectors", "aggregators", "monitors"},
    {"training"},
    {"simulation", "guard"},
    {"bench"},
    {"report"},
    {"reproduce", "audit"},
    {"testing"},
    {"mithridate"},
    {"cli"},
    {"__main__"},
]
"""Rooms, the lowest first: each may import those below it, and none beside it. A new room is a deliberate act."""

NAMES_OF_NOTHING = {"utils", "util", "common", "helpers", "helper", "misc"}

FILES = sorted(ROOT.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """`mithridate.attacks.pgd` lives in `attacks`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "mithridate"


def layer_of(room: str) -> int:
    (found,) = [number for number, rooms in enumerate(LAYERS) if room in rooms]
    return found


def exists(module: str) -> bool:
    path = SRC.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imported(source: str, module: str, *, package: bool = False) -> Iterator[str]:
    """Every module of this library that some source imports, anywhere in it: inside functions and for types too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + package]
                base = ".".join([*parents, *([base] if base else [])])
            # `from mithridate.bench import store` imports a module, `from mithridate.core.view import View` a name
            found = [f"{base}.{alias.name}" if exists(f"{base}.{alias.name}") else base for alias in node.names]
        else:
            continue
        yield from (name for name in found if name == "mithridate" or name.startswith("mithridate."))


def forbidden(source: str, module: str, *, package: bool = False) -> list[str]:
    """Imports of one module that point the wrong way."""
    room = room_of(module)
    rooms = {room_of(name): name for name in imported(source, module, package=package)}
    return [
        f"{module} imports {name}"
        for other, name in rooms.items()
        if other != room and layer_of(other) >= layer_of(room)
    ]


def test_every_room_is_known() -> None:
    assert len(FILES) > 20
    unknown = {room_of(module_of(path)) for path in FILES} - set().union(*LAYERS)
    assert not unknown, f"new rooms {sorted(unknown)}: say in LAYERS where they stand"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_one_way(path: Path) -> None:
    assert forbidden(path.read_text(encoding="utf-8"), module_of(path), package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "line", "wrong"),
    [
        ("mithridate.attacks.pgd", "from mithridate.defences.clip import Clip", True),
        ("mithridate.attacks.pgd", "import mithridate.defences.clip", True),
        ("mithridate.attacks.pgd", "from mithridate import defences", True),
        ("mithridate.attacks.pgd", "from ..defences import clip", True),
        ("mithridate.attacks.pgd", "def f():\n    from mithridate.training import learner", True),
        ("mithridate.attacks.pgd", "from mithridate import View", True),
        ("mithridate.attacks.pgd", "from .delusive import Delusive", False),
        ("mithridate.attacks.pgd", "from mithridate.maths import norms", False),
        ("mithridate.attacks.pgd", "from ..core import View", False),
        ("mithridate.attacks.pgd", "import torch", False),
        ("mithridate.core.model", "from mithridate.attacks import pgd", True),
        ("mithridate.data.stream", "from mithridate.models import build_model", True),
        ("mithridate.report.page", "from mithridate.cli import app", True),
        ("mithridate.report.page", "from mithridate.bench import store", False),
        ("mithridate.bench.store", "from mithridate.report import page", True),
        ("mithridate.simulation.online", "from mithridate.guard import flower", True),
    ],
)
def test_the_checker_sees_what_it_should(module: str, line: str, wrong: bool) -> None:
    assert bool(forbidden(line, module)) == wrong


def test_relative_imports_of_a_package_start_at_itself() -> None:
    assert list(imported("from .clip import Clip", "mithridate.defences", package=True)) == ["mithridate.defences.clip"]
    assert list(imported("from .. import core", "mithridate.defences", package=True)) == ["mithridate.core"]


@pytest.mark.parametrize("path", [p for p in FILES if room_of(module_of(p)) == "models"], ids=module_of)
def test_models_take_only_the_description_of_a_data_set(path: Path) -> None:
    names = {
        alias.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mithridate.data")
        for alias in node.names
    }
    assert names <= {"DatasetInfo", "dataset_info"}


def test_no_file_is_named_after_nothing() -> None:
    names = {part for path in FILES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not names & NAMES_OF_NOTHING


TORCHLESS = sorted(
    [
        "mithridate",
        "mithridate.bench.store",
        "mithridate.core.errors",
        "mithridate.core.files",
        "mithridate.guard.quarantine",
        "mithridate.guard.step_log",
        "mithridate.guard.trackers",
    ]
    + [module_of(p) for p in FILES if room_of(module_of(p)) == "report"]
)


def test_a_report_imports_no_torch() -> None:
    """One interpreter for all of them: each line of its output is a module after which torch was there."""
    assert "mithridate.report" in TORCHLESS
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    code += "    if 'torch' in sys.modules: sys.exit(f'{name} imports torch')"
    done = subprocess.run([sys.executable, "-c", code, *TORCHLESS], capture_output=True, text=True, check=False)  # noqa: S603  (a fixed command)
    assert done.returncode == 0, done.stderr
