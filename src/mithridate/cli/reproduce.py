"""The command `reproduce`: published tables and figures, listed or run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from rich.table import Table
from rich.text import Text

from mithridate.cli.progress import Bars
from mithridate.cli.results import print_files
from mithridate.cli.terminal import out
from mithridate.core.errors import ConfigError

if TYPE_CHECKING:
    from mithridate.bench.engine import RunOptions
    from mithridate.bench.failure import Failure
    from mithridate.reproduce.item import Item, Scale
    from mithridate.reproduce.run import Reproduction

ALL = "all"
"""In place of a name: every table and figure."""


def list_items(directory: Path) -> None:
    """Print every table and figure with its claim, its runs at each scale, and which of them are finished.

    Args:
        directory: Where runs are looked for.
    """
    from mithridate.reproduce.item import SCALES, item_names, read_item
    from mithridate.reproduce.run import progress

    table = Table(box=None, pad_edge=False, title_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("what the paper says")
    for scale in SCALES:
        table.add_column(scale, justify="right", no_wrap=True)
    for name in item_names():
        item = read_item(name)
        standing = [_standing(*progress(item, scale, directory), item.cost.get(scale)) for scale in SCALES]
        table.add_row(name, Text(item.claim), *standing)
    out.print(table)
    out.print(
        "At each scale: runs; behind the comma the processor time that they took us on two shared cores, where we have "
        "measured it (a burn-in that several items share counts for the first of them); 'done', or how many are, in "
        f"{directory}.",
        markup=False,
    )


def _standing(done: int, runs: int, cost: float | None) -> str:
    took = "" if cost is None else f", {cost:.0f} s" if cost < 100 else f", {cost / 60:.0f} min"
    return f"{runs}{took}" + ("" if not done else " done" if done == runs else f" ({done} done)")


def chosen_items(names: Sequence[str]) -> "list[Item]":
    """The items of some names; of `all`, every one.

    Args:
        names: Such as `zhu2023-table1`, or `all` alone.

    Raises:
        ConfigError: There is none of a name, or no name at all.
    """
    from mithridate.reproduce.item import item_names, read_item

    if not names:
        raise ConfigError("say which table or figure, such as zhu2023-table1; `mithridate reproduce --list` has all.")
    return [read_item(name) for name in (item_names() if list(names) == [ALL] else names)]


def reproduce_items(
    items: "Sequence[Item]",
    scale: "Scale",
    directory: Path,
    *,
    seeds: Sequence[int] | None,
    changes: Sequence[str] = (),
    only: Sequence[str] = (),
    form: str,
    record: Path | None,
    **options: "Unpack[RunOptions]",
) -> tuple[dict[Path, "Failure"], int]:
    """Run items and print each one's table and verdicts.

    Args:
        items: Tables and figures.
        scale: At which size.
        directory: Where runs and pages go.
        seeds: In place of the recipes'.
        changes: Settings in which runs differ from the recipes', as `--set` takes them.
        only: Conditions on the runs that are made, as `--only` takes them; none: all are.
        form: `table` for the terminal, or `md`, `csv`, `latex`: that file alone is printed.
        record: Folder for records of the runs; None keeps none.
        options: Of `bench.engine.run_recipe`: device, data_root, cache, jobs, engine.

    Returns:
        Why runs failed, by directory, and how many runs there are in all.

    Raises:
        UserError: Anything in an item, the data, the device or the store that cannot work.
    """
    from mithridate.reproduce.records import write_records
    from mithridate.reproduce.run import directory_of, reproduce
    from mithridate.reproduce.selection import Selection

    chosen = Selection.asked(only) if only else None
    failures: dict[Path, Failure] = {}
    of = 0
    for item in items:
        if form == "table":
            out.print(f"{item.source}: {item.title}", style="bold", markup=False, highlight=False)
        with Bars() as bars:
            watcher = bars if form == "table" else None
            done = reproduce(
                item, scale, directory, seeds=seeds, changes=changes, only=chosen, watcher=watcher, **options
            )
        failures |= done.failures
        of += len(done.runs) + len(done.failures)
        if record is not None:
            for part in item.parts:  # runs of another item are kept where that has them
                own = [run for run in done.runs if run.path.parent == directory_of(directory, part, scale)]
                write_records(own, record / part.name / scale)
        if form == "table":
            _show(done)
        else:
            print_files(done.files, form)
    return failures, of


def _show(done: "Reproduction") -> None:
    from mithridate.report.terminal import fitted, section_table
    from mithridate.reproduce.outcome import summary

    for section in done.tables:
        out.print(section.heading, style="italic", markup=False, highlight=False)
        out.print(fitted(section_table(section), out.width))
    out.print(f"{summary(v.outcome for v in done.verdicts)}; report: {done.report.html}", soft_wrap=True, markup=False)


def add_defences(
    names: Sequence[str],
    recipe: Path,
    results: Path,
    directory: Path,
    *,
    plugins: Sequence[str],
    changes: Sequence[str],
    seeds: Sequence[int] | None,
    **options: "Unpack[RunOptions]",
) -> tuple[dict[Path, "Failure"], int]:
    """Run every attack of a recipe against some defences, and keep a record of each run.

    Args:
        names: Of the defences, or where their classes are; `all` for those of the recipe itself.
        recipe: Whose attacks, data and model are taken.
        results: Folder of the records.
        directory: Where the runs go.
        plugins: To be loaded before the defences are looked up.
        changes: Settings, as `--set` takes them.
        seeds: In place of the recipe's.
        options: Of `bench.engine.run_recipe`: device, data_root, cache, jobs, engine.

    Returns:
        Why runs failed, by directory, and how many runs there are in all.

    Raises:
        UserError: Anything in the recipe, the defences, the data, the device or the store that cannot work.
    """
    from mithridate.bench.engine import run_recipe
    from mithridate.bench.recipe import read_recipe
    from mithridate.bench.store import read_runs
    from mithridate.reproduce.records import write_records

    others = None if list(names) == [ALL] else names
    wanted = read_recipe(recipe, plugins=plugins, changes=changes, seeds=seeds, defences=others)
    with Bars() as bars:
        grid = run_recipe(wanted, directory / "runs", resume=True, watcher=bars, **options)
    if grid.ran + grid.skipped:
        write_records(read_runs(list(grid.directories)), results)
    return grid.failures, len(grid.directories)


def build_leaderboard(results: Path, directory: Path) -> None:
    """Write the page from records, and say where it is.

    Args:
        results: Folder of the records.
        directory: Where the page goes.

    Raises:
        UserError: The folder is missing, a file in it is no record, or the page cannot be written.
    """
    from mithridate.reproduce.leaderboard import reported_accuracies, write_leaderboard
    from mithridate.reproduce.records import read_records

    runs = read_records(results)
    beside = results.parent / "zhu2023-table1"
    reported = reported_accuracies(read_records(beside) if beside.is_dir() else [])
    out.print(f"leaderboard: {write_leaderboard(runs, directory, reported)}", markup=False, soft_wrap=True)
