"""README and docs name what there is; `tests/docs` runs their examples."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_recipe_is_named_where_recipes_are_listed_and_none_that_is_not_there() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").partition("## The recipes that ship")[2]
    assert set(re.findall(r"`([\w-]+\.toml)`", text)) == {path.name for path in (ROOT / "recipes").glob("*.toml")}


def test_the_readme_is_read_in_one_go() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150
