"""The README names what there is; `tests/docs` runs its examples."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_every_recipe_it_names_is_there_and_every_recipe_is_named() -> None:
    named = set(re.findall(r"[\w-]+\.toml", README.read_text(encoding="utf-8")))
    there = {path.name for path in (README.parent / "recipes").glob("*.toml")}
    assert there <= named
    assert named - there <= {"pyproject.toml", "audit.toml"}
