"""What `mithridate calibrate` prints: the threshold of DSC, and what it does on clean batches that it never saw."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from rich.table import Table

from mithridate.bench.calibration import CalibrationOptions, calibrate_recipe
from mithridate.bench.recipe import read_recipe
from mithridate.cli.progress import Bars
from mithridate.cli.terminal import out

if TYPE_CHECKING:
    from mithridate.core.defence import Calibration
    from mithridate.defences.threshold import Share


def print_thresholds(
    recipe: Path,
    *,
    plugins: Sequence[str],
    changes: Sequence[str],
    seeds: Sequence[int] | None,
    **options: Unpack[CalibrationOptions],
) -> None:
    """Calibrate DSC for every seed of a recipe, and print a line for each.

    Args:
        recipe: A TOML file with a defence `dsc`.
        plugins: To be loaded before.
        changes: Settings, as `--set` takes them.
        seeds: In place of the recipe's.
        options: Of `bench.calibration.calibrate_recipe`, but for its watcher.

    Raises:
        UserError: Anything in the recipe, the data or the device that cannot work.
    """
    wanted = read_recipe(recipe, plugins=plugins, changes=changes, seeds=seeds)
    table = Table(title="threshold P = mu + tau m of dsc", title_justify="left", box=None, pad_edge=False)
    for column in ("seed", "mu", "tau", "above it: trusted set", "above it: unseen clean batches"):
        table.add_column(column, justify="right")
    with Bars() as bars:
        for checked in calibrate_recipe(wanted, watcher=bars, **options):
            mu, tau = (f"{checked.calibration.fields[name]:.4g}" for name in ("mu", "tau"))
            table.add_row(str(checked.seed), mu, tau, _share(checked.calibration), _share(checked.unseen))
    out.print(table)
    out.print("in brackets: 95 % confidence interval (Wilson), were the samples independent")


def _share(share: "Calibration | Share") -> str:
    low, high = share.interval
    return f"{share.rate:.1%} of {share.samples} [{low:.1%}, {high:.1%}]"
