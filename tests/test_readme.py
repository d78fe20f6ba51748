"""The README's examples use names that there are."""

import ast
import re
from pathlib import Path

import mithridate

README = Path(__file__).parents[1] / "README.md"


def test_every_name_in_the_python_examples_is_public() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    used = {
        node.attr
        for block in blocks
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mi"
    }
    assert {"run_online", "run_federated"} <= used <= set(mithridate.__all__)


def test_every_recipe_it_names_is_there_and_every_recipe_is_named() -> None:
    named = set(re.findall(r"[\w-]+\.toml", README.read_text(encoding="utf-8")))
    there = {path.name for path in (README.parent / "recipes").glob("*.toml")}
    assert there <= named
    assert named - there <= {"pyproject.toml"}
