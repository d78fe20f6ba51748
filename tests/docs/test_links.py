"""Links between pages lead somewhere, as they stand in the Markdown: on a code host and, built, on the site."""

import re
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "docs").rglob("*.ipynb"),
        *ROOT.glob("examples/*/README.md"),
    ]
)
GENERATED = ROOT / "docs" / "reference"
"""Headings of these pages are made when the site is built, which checks links to them."""


def anchors(page: Path) -> set[str]:
    """The headings of a page as a code host names them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    names = set()
    for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE):
        plain = re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading).strip().lower()
        kept = [c for c in plain if c in "-_ " or unicodedata.category(c)[0] in "LN"]
        names.add("".join(kept).replace(" ", "-"))
    return names


def broken_links(page: Path) -> list[str]:
    """Links of a page to files that are not there, or to headings that they have not; each with its line."""
    found = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        for target in re.findall(r"\]\(((?!https?:|mailto:)[^)\s]+)\)", line):
            place, _, anchor = target.partition("#")
            path = page if not place else (page.parent / place).resolve()
            if not path.exists():
                found.append(f"{page.relative_to(ROOT)}:{number}: {target} is not there")
            elif anchor and path.suffix == ".md" and path.parent != GENERATED and anchor not in anchors(path):
                found.append(f"{page.relative_to(ROOT)}:{number}: {target} has no such heading")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_named_with_its_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tests.docs.test_links.ROOT", tmp_path)
    (tmp_path / "there.md").write_text("# One heading\n", encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text("[a](there.md#one-heading)\n[b](gone.md)\n[c](there.md#two)\n", encoding="utf-8")
    assert broken_links(page) == ["page.md:2: gone.md is not there", "page.md:3: there.md#two has no such heading"]


def test_every_page_of_the_docs_is_listed_on_the_front_page() -> None:
    front = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = {
        (ROOT / "docs" / target) for target in re.findall(r"^- \[[^\]]+\]\(([\w/.-]+)\)", front, flags=re.MULTILINE)
    }
    pages = {*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")} - {ROOT / "docs" / "index.md"}
    assert listed == pages
