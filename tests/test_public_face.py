"""What `import mithridate as mi` gives: the nouns of the loop, and components by their folders."""

import ast
import importlib
import inspect
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import mithridate as mi
from mithridate.core.registry import KINDS, Kind, entries

ROOT = Path(__file__).parents[1] / "src" / "mithridate"


def test_every_public_name_is_there() -> None:
    assert dir(mi) == mi.__all__ == sorted(set(mi.__all__))
    assert all(getattr(mi, name) is not None for name in mi.__all__)
    assert {"attacks", "update_attacks", "defences", "detectors", "aggregators", "monitors", "models", "guard"} <= set(
        mi.__all__
    )
    with pytest.raises(AttributeError, match="no attribute 'Accumulative'"):
        _ = mi.Accumulative  # type: ignore[attr-defined]  # on purpose: it is reached through its folder
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mi.guard.nothing  # type: ignore[attr-defined]  # on purpose: there is no such name


def registering(path: Path) -> list[str]:
    """Classes of a file that are registered under a name."""
    return [
        node.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and any("register(" in ast.unparse(line) for line in node.decorator_list)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_each_component_is_exported_by_its_folder(kind: Kind) -> None:
    folder = importlib.import_module(f"mithridate.{kind}s")
    assert getattr(mi, f"{kind}s") is folder
    written = {name for path in (ROOT / f"{kind}s").glob("*.py") for name in registering(path)}
    known = {found.cls.__name__: found.cls for found in entries(kind).values() if found.built_in}
    assert set(known) == written, f"a file of {kind}s is not imported by its __init__.py"
    assert {name: getattr(folder, name, None) for name in written} == known
    reexported = {
        alias.asname
        for node in ast.parse(inspect.getsource(folder)).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert written <= reexported, "write `import X as X`, so that type checkers see it"


def test_no_two_public_classes_have_one_name() -> None:
    places = defaultdict(list)
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert len(places) > 50
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_what_needs_an_extra_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {name for name in sys.modules if name.partition(".")[0] == "flwr"} | {"flwr"}:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("mithridate.guard.flower", "mithridate.guard.flower_attack"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert mi.guard.ReplyLimits.__name__ == "ReplyLimits"
    for name in ("GuardedStrategy", "attack_mod"):
        with pytest.raises(mi.UserError, match=rf"{name} needs Flower, .* pip install 'mithridate\[flower\]'"):
            getattr(mi.guard, name)


def test_with_flower_the_guard_is_there() -> None:
    pytest.importorskip("flwr", reason="the extra flower is not installed")
    from mithridate.guard.flower import GuardedStrategy

    assert mi.guard.GuardedStrategy is GuardedStrategy
