"""Reproduce a table or figure: run its recipe, read the runs, and write the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Unpack

from mithridate.bench.engine import RunOptions, run_recipe
from mithridate.bench.failure import Failure
from mithridate.bench.recipe import Recipe
from mithridate.bench.store import Run, finished, read_runs
from mithridate.bench.watcher import Watcher
from mithridate.core.errors import ConfigError, StoreError
from mithridate.core.files import path_of, write_whole
from mithridate.report import ReportPaths, build_report
from mithridate.report.records import as_files
from mithridate.report.tables.latex import latex
from mithridate.report.tables.section import TableSection
from mithridate.reproduce.checks import Judgement
from mithridate.reproduce.comparison import beside, compared, records
from mithridate.reproduce.item import Item, Scale
from mithridate.reproduce.outcome import check_records, checks_table, lead_of, verdicts
from mithridate.reproduce.selection import Selection


@dataclass(frozen=True)
class Reproduction:
    """What came of an item.

    Args:
        item: The table or figure.
        scale: Of the runs.
        runs: Finished ones.
        verdicts: On its claims.
        report: The files of the page.
        tables: The paper's numbers beside ours, and the claims.
        files: The same, as CSV, Parquet, Markdown and LaTeX.
        failures: Why other runs of the item failed, by directory.
    """

    item: Item
    scale: Scale
    runs: Sequence[Run]
    verdicts: Sequence[Judgement]
    report: ReportPaths
    tables: Sequence[TableSection]
    files: Sequence[Path]
    failures: Mapping[Path, Failure] = field(default_factory=dict)


def directory_of(out: str | Path, item: Item, scale: Scale) -> Path:
    """Where the runs and the page of an item lie."""
    return path_of(out) / item.name / scale


def recipe_of(item: Item, scale: Scale, seeds: Sequence[int] | None, changes: Sequence[str] = ()) -> Recipe:
    """The recipe of an item, with other seeds and settings if some are given."""
    recipe = item.recipe(scale, changes)
    if seeds is None:
        return recipe
    variants = [replace(variant, seeds=tuple(seeds)) for variant in recipe.variants]
    return replace(recipe, seeds=tuple(seeds), variants=variants)


def reproduce(
    item: Item,
    scale: Scale,
    out: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    changes: Sequence[str] = (),
    only: Selection | None = None,
    watcher: Watcher | None = None,
    **options: Unpack[RunOptions],
) -> Reproduction:
    """Run what an item needs, as far as it has not been run, and write its page.

    Runs of another item that it shows are made where that item has them.

    Args:
        item: The table or figure.
        scale: At which size.
        out: Runs and page go to `out/<item>/<scale>/`.
        seeds: In place of the recipe's.
        changes: Settings in which the runs differ from the recipe's, as `--set` takes them; the page names them.
        only: Which runs are made, and shown; None: all.
        watcher: Follows progress.
        options: Of `bench.engine.run_recipe`: device, data_root, cache, jobs, engine.

    Raises:
        UserError: Anything in the item, the data, the device or the store that cannot work; no run is chosen, or none
            was finished.
    """
    runs: list[Path] = []
    failures: dict[Path, Failure] = {}
    for part, recipe in _chosen(item, scale, seeds, changes, only):
        chosen = only.picks_cell if only else None
        grid = run_recipe(recipe, directory_of(out, part, scale), resume=True, only=chosen, watcher=watcher, **options)
        runs += grid.directories
        failures |= grid.failures
    if len(failures) == len(runs):
        raise StoreError(f"every run of {item.name} failed: {next(iter(failures.values())).message}")
    return replace(write_page(item, scale, directory_of(out, item, scale), runs, changes), failures=failures)


def _chosen(
    item: Item, scale: Scale, seeds: Sequence[int] | None, changes: Sequence[str], only: Selection | None
) -> list[tuple[Item, Recipe]]:
    """The parts of an item that have a run which is chosen, each with its recipe."""
    parts = [(part, recipe_of(part, scale, seeds, changes)) for part in item.parts]
    if only is None:
        return parts
    chosen = [(part, recipe) for part, recipe in parts if any(map(only.picks_cell, recipe.cells()))]
    if not chosen:
        cells = [cell for _, recipe in parts for cell in recipe.cells()]
        labels = {
            "attack": [cell.attack.label for cell in cells],
            "defence": [cell.defence.label for cell in cells],
            "variant": [cell.recipe.variant for cell in cells if cell.recipe.variant],
        }
        there = "; ".join(f"{kind}: {', '.join(dict.fromkeys(of))}" for kind, of in labels.items() if of)
        raise ConfigError(f"no run of {item.name} at {scale} scale is what --only asks for; there are {there}.")
    return chosen


def write_page(
    item: Item, scale: Scale, directory: Path, places: Sequence[Path], changes: Sequence[str] = ()
) -> Reproduction:
    """Write the page and the tables of runs that are finished.

    Args:
        item: The table or figure.
        scale: Of the runs.
        directory: Where the files go.
        places: Directories of the runs, or such that hold them.
        changes: In what the runs differ from the item's recipe.

    Raises:
        StoreError: There is no finished run, or one is damaged.
    """
    runs = read_runs(places)
    report = build_report(places, directory, lead_of(item, scale, changes))
    said = verdicts(item, runs)
    files: dict[str, str | bytes] = {}
    tables = []
    if said:
        files |= as_files("claims", check_records(said))
        tables.append(checks_table(said))
    if item.table is not None:
        cells = compared(item, runs)
        files |= as_files("table", records(item, cells))
        tables.append(beside(item, cells, scale))
    files["table.md"] = "\n".join(f"{table.heading}\n\n{table.markdown()}" for table in tables)
    files["table.tex"] = "\n".join(map(latex, tables))
    for name, content in files.items():
        write_whole(directory / name, content)
    return Reproduction(item, scale, runs, said, report, tables, [directory / name for name in files])


def progress(item: Item, scale: Scale, out: str | Path) -> tuple[int, int]:
    """How many of an item's runs are finished, and how many there are."""
    places = [
        directory_of(out, part, scale) / cell.run_id
        for part in item.parts
        for variant in part.recipe(scale).each()
        for cell in variant.cells()
    ]
    return sum(map(finished, places)), len(places)
