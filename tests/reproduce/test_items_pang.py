"""The tables and figures of Pang et al.: the runs of each scale hold every printed number and what claims compare."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from mithridate.bench.store import Run
from mithridate.report.figures import FIGURES
from mithridate.reproduce.item import SCALES, Item, Scale, item_names, read_item
from mithridate.reproduce.selection import Selection

NAMES = [name for name in item_names() if name.startswith("pang2021-")]


@cache
def item(name: str) -> Item:
    return read_item(name)


@cache
def planned(name: str, scale: Scale) -> Sequence[Run]:
    """The runs of an item before they are made: settings and labels, with the first seed of each."""
    cells = list(item(name).recipe(scale).cells())
    first = [cell for cell in cells if cell.seed == cell.recipe.seeds[0]]
    return [
        Run(
            path=Path(cell.run_id),
            config=cell.config(),
            summary={"attack": cell.attack.label, "defence": cell.defence.label, "seed": cell.seed},
            trace=[],
            environment={},
            images={},
        )
        for cell in first
    ]


def picked(selection: Selection, name: str, scale: Scale) -> list[str]:
    return [run.path.name for run in selection.runs(item(name).where.runs(planned(name, scale)))]


def test_all_of_the_paper_is_there() -> None:
    tables = [f"pang2021-table{n}" for n in range(1, 8)]
    figures = [f"pang2021-figure{n}" for n in range(1, 6)]
    assert [*tables, *figures, "pang2021-timing"] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_printed_number_is_one_of_our_runs_at_paper_scale(name: str) -> None:
    table = item(name).table
    chosen = {} if table is None else {tuple(c.keys.values()): table.selection(c) for c in table.cells}
    found = {keys: picked(selection, name, "paper") if selection else [] for keys, selection in chosen.items()}
    assert {keys: runs for keys, runs in found.items() if len(runs) != 1} == {}
    places = [runs[0] for runs in found.values()]
    assert len(places) == len(set(places))  # no run is two rows


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_claim_is_about_runs(name: str, scale: Scale) -> None:
    """At paper scale all that a claim compares is run; at the others, at least one claim is decided."""
    complete = []
    for check in item(name).checks:
        chosen = [selection for part in check.parts for selection in part.selections]
        complete.append(all(picked(selection, name, scale) for selection in chosen))
    assert all(complete) if scale == "paper" else any(complete)


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_redrawn_by_name_and_tables_have_published_numbers(name: str) -> None:
    of = item(name)
    assert set(of.draw) <= set(FIGURES)
    assert bool(of.draw) == ("figure" in name)
    assert (of.table is not None) == (name not in {f"pang2021-figure{n}" for n in (2, 3, 4, 5)})


@pytest.mark.parametrize("name", NAMES)
def test_no_seed_is_run_on_which_settings_were_chosen(name: str) -> None:
    """Small settings were tried on seed 10, and before that, for their forerunners, on seed 0."""
    assert list(item(name).recipe("small").seeds) == [1, 2, 3]
