"""What the docs site is made of follows from the code: nothing is left out, and every defence says what breaks it."""

import re
from pathlib import Path

import pytest
import typer

from mithridate.audit.identifiers import IDENTIFIERS
from mithridate.cli.app import app
from mithridate.core.descriptions import described_fields
from mithridate.core.registry import KINDS, Kind, entries
from mithridate.reproduce.item import item_names, read_item
from tools.site.commands import commands
from tools.site.components import component_pages, matrix, measured_costs, said_by
from tools.site.contents import outward, trees
from tools.site.identifiers import POISONED, identifiers
from tools.site.papers import papers

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_has_every_component_with_every_setting(kind: Kind) -> None:
    built_in = [item for item in entries(kind).values() if item.built_in]
    sections = re.split(r"^## ", component_pages(kind), flags=re.MULTILINE)[1:]
    assert [section.partition("\n")[0] for section in sections] == [item.name for item in built_in]
    for item, section in zip(built_in, sections, strict=True):
        assert re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE) == list(item.fields)
        assert described_fields(item.cls).keys() == item.fields.keys(), f"{item.name} says of each setting what it is"
        assert f"`mi.{kind}s.{item.cls.__name__}`" in section
        assert not item.presets or "Preset `" in section


def test_every_defence_and_rule_says_what_breaks_it() -> None:
    baselines = {"none", "mean"}
    for kind in ("defence", "aggregator"):
        silent = {n for n, item in entries(kind).items() if item.built_in and not said_by(item.cls).breaks}
        assert silent <= baselines
    lines = matrix().splitlines()
    for item in entries("defence").values():
        (line,) = [line for line in lines if line.startswith(f"| [`{item.name}`](defences.md")]
        assert line.count(" | ") == 4


def test_costs_are_those_of_the_committed_records() -> None:
    costs = measured_costs(ROOT / "results" / "leaderboard")
    assert costs["none"] == {"none": ("1", "0")}
    assert float(costs["at"]["at"][0].partition(" ")[0]) > 2  # adversarial training makes many passes
    assert set(costs["chain"]) == {"recommended"}


def test_the_page_of_commands_has_every_command_and_option() -> None:
    page = commands()
    root = typer.main.get_command(app)
    for name, command in root.commands.items():  # type: ignore[attr-defined]  # it is a group
        assert f"\n## {name}\n" in f"\n{page}"
        assert "|  |" not in page, "every argument says what it is"
        for option in (option for parameter in command.params for option in parameter.opts if option.startswith("--")):
            assert option in page


def test_every_table_of_the_papers_is_there_and_says_where_we_have_none(tmp_path: Path) -> None:
    page = papers(tmp_path)
    for name in item_names():
        assert (f"## {name}\n" in page) == (read_item(name).table is not None)
    assert page.count("No records of ours") == page.count("\n## ") + page.startswith("## ")
    assert "83.38" in page


def test_what_we_have_run_stands_with_the_verdict_on_each_claim() -> None:
    page = papers()
    overview, _, _ = page.partition("\n## ")
    for folder in sorted((ROOT / "results").glob("*/small")):
        item = read_item(folder.parent.name)
        _, _, part = page.partition(f"## {folder.parent.name}\n")
        part = part.partition("\n## ")[0]
        assert f"of {len(item.checks)} checks hold" in part
        (line,) = (line for line in overview.splitlines() if line.startswith(f"| [{item.name}](#{item.name}) | small "))
        _, seeds, claims, *by_verdict = map(int, line.strip("| ").split(" | ")[2:])
        assert (seeds, claims, sum(by_verdict)) == (3, len(item.checks), len(item.checks))
        _, _, small = part.partition("At the scale `small`")
        assert sum(f"| {check.says} | " in small for check in item.checks) == len(item.checks) - by_verdict[-1]


def test_a_row_at_paper_scale_says_what_was_set_otherwise_and_only_claims_that_it_has_runs_for() -> None:
    _, _, part = papers().partition("## zhu2023-table1\n")
    paper, _, small = part.partition("\n## ")[0].partition("At the scale `small`")
    assert "Settings changed: `burn_in.precision=bfloat16, " in paper
    assert "Settings changed" not in small
    assert "| CIFAR-10: DSC ends above ST under the attack | not decided | " in paper
    assert "SVHN: DSC" not in paper
    assert "SVHN: DSC" in small


def test_the_lists_of_the_front_page_are_the_tree_of_contents() -> None:
    page = "# Title\n\n## Start\n- [One](one.md), first\n- [Two](a/two.ipynb)\n\n## Words\nNone.\n"
    assert trees(page) == "```{toctree}\n:hidden:\n:caption: Start\n\none\na/two\n```\n"


def test_links_out_of_the_docs_are_downloads() -> None:
    page = "[a](../examples/a/README.md) [b](b.md) [c](../../c.md) [d](../examples/d) [e](../e.json)"
    assert (
        outward(page, depth=0) == "{download}`a <../examples/a/README.md>` [b](b.md) [c](../../c.md) d [e](../e.json)"
    )
    assert outward(page, depth=1) == page.replace("[c](../../c.md)", "{download}`c <../../c.md>`")


def test_names_of_findings_stand_with_their_editions() -> None:
    page = identifiers()
    assert {*POISONED, "none"} == set(IDENTIFIERS)
    for identifier in (i for several in IDENTIFIERS.values() for i in several):
        answer = "yes" if identifier.checked else "no"
        assert f"| {identifier.catalogue} | {identifier.id} | {identifier.title} | {answer} |" in page
