"""What `mithridate run` and `demo` do: read a recipe, run its grid, and report on it."""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import typer

from mithridate.cli.blame import blamed
from mithridate.cli.progress import Bars
from mithridate.cli.results import end_with, report_on
from mithridate.cli.terminal import out
from mithridate.core.errors import ConfigError

if TYPE_CHECKING:
    from mithridate.bench.engine import RunOptions


def run_and_report(
    recipe_path: Path,
    out_dir: Path,
    *,
    changes: Sequence[str] = (),
    plugins: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    yes: bool = False,
    resume: bool = False,
    **options: "Unpack[RunOptions]",
) -> None:
    """Run a recipe, print how it goes and what came of it, and end the command if runs failed.

    Args:
        recipe_path: A TOML file.
        out_dir: Where runs and report go.
        changes: Settings, as `--set` takes them.
        plugins: To be loaded before.
        seeds: In place of the recipe's.
        yes: Whether a grid of any size is run without asking.
        resume: Whether finished runs are skipped, and killed ones continued.
        options: Of `bench.engine.run_recipe`: device, data_root, cache, jobs, engine.

    Raises:
        UserError: Anything in the recipe, the data, the device or the store that cannot work.
        Exit: Runs failed.
    """
    from mithridate.bench.changes import LargeGridError
    from mithridate.bench.engine import run_recipe
    from mithridate.bench.recipe import read_recipe

    read = functools.partial(read_recipe, recipe_path, plugins=plugins, changes=changes, seeds=seeds)
    with blamed(out_dir):
        try:
            recipe = read(most=None) if yes else read()
        except LargeGridError as error:
            if not (_at_a_terminal() and typer.confirm(f"{error}\nGo on?")):
                raise
            recipe = read(most=None)
    if recipe.title:
        out.print(recipe.title, style="bold", markup=False, highlight=False)
    with blamed(out_dir), Bars() as bars:
        grid = run_recipe(recipe, out_dir, resume=resume, watcher=bars, **options)
    if grid.skipped:
        out.print(
            f"{grid.skipped} of {len(grid.directories)} runs were finished already; delete {out_dir} to run them "
            "again.",
            markup=False,
            soft_wrap=True,
        )
    if grid.ran + grid.skipped:
        report_on(list(grid.directories), out_dir)
    end_with(grid.failures, len(grid.directories))


def shipped_recipe(name: str) -> Path:
    """A recipe that comes with the library: inside an installed package, or beside the sources.

    Args:
        name: Of the file.

    Raises:
        ConfigError: It is in neither place.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"the recipe {name} is missing from this installation; install mithridate again.")


def _at_a_terminal() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin.isatty()
