"""The README's examples use names that there are."""

import ast
import re
from operator import attrgetter
from pathlib import Path

import mithridate

README = Path(__file__).parents[1] / "README.md"


def test_every_name_in_the_python_examples_is_public() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    used = {name for block in blocks for name in re.findall(r"\bmi\.([\w.]*\w)", block)}
    assert {"run_online", "run_federated", "attacks.Accumulative", "defences.Clip"} <= used
    for block in blocks:
        ast.parse(block)
    for name in used:
        assert name.partition(".")[0] in mithridate.__all__
        assert attrgetter(name)(mithridate) is not None


def test_every_recipe_it_names_is_there_and_every_recipe_is_named() -> None:
    named = set(re.findall(r"[\w-]+\.toml", README.read_text(encoding="utf-8")))
    there = {path.name for path in (README.parent / "recipes").glob("*.toml")}
    assert there <= named
    assert named - there <= {"pyproject.toml", "audit.toml"}
