"""What several commands take: the choices of their options, and options that are the same wherever they stand."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mithridate.core.errors import ConfigError

MOST_JOBS = MOST_THREADS = 1024
"""Beyond what is of use on any machine, and far below what would bring one down."""


class Device(StrEnum):
    """Where tensors live."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Engine(StrEnum):
    """Where runs are made."""

    local = "local"
    ray = "ray"


class Shelf(StrEnum):
    """What `list` can show."""

    attacks = "attacks"
    defences = "defences"
    detectors = "detectors"
    update_attacks = "update_attacks"
    aggregators = "aggregators"
    models = "models"
    datasets = "datasets"
    monitors = "monitors"


class PageForm(StrEnum):
    """How a report is shown."""

    html = "html"
    md = "md"
    csv = "csv"
    latex = "latex"


class Review(StrEnum):
    """What can be done with batches in quarantine."""

    list = "list"
    show = "show"
    release = "release"
    drop = "drop"


class ScaleName(StrEnum):
    """How large a reproduction is."""

    smoke = "smoke"
    small = "small"
    paper = "paper"


class Form(StrEnum):
    """How tables are printed."""

    table = "table"
    md = "md"
    csv = "csv"
    latex = "latex"


DeviceOption = Annotated[Device, typer.Option(help="Where to compute; `auto` takes CUDA if torch sees it.")]
ThreadsOption = Annotated[
    int,
    typer.Option(
        min=0,
        max=MOST_THREADS,
        help="CPU threads of torch in each process; 0 shares the cores that the command may use among its processes.",
    ),
]
JobsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_JOBS,
        help="Runs at a time, each in its own process; by default 1, or as many as Ray takes.",
    ),
]
EngineOption = Annotated[
    Engine, typer.Option(help="Where runs are made: on this machine, or on a Ray cluster that sees --out, too.")
]
DataRootOption = Annotated[
    Path | None,
    typer.Option(
        envvar="MITHRIDATE_DATA",
        help="A local mirror of the image sets, laid out as ROOT/HUB-ID/...parquet, used instead of the network.",
    ),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        envvar="MITHRIDATE_CACHE", help="Where decoded images and burn-ins are kept; the user's cache by default."
    ),
]
ChangesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="TABLE.KEY=VALUE",
        help=(
            "Change a setting: attack.eps=8/255 (every attack that has it), attack.LABEL.eps=0.1 (one), "
            "burn_in.seed=none (an optional one is unset), 'grid.run.lr=[0.1,0.01]' (values are crossed); repeatable."
        ),
    ),
]
PluginsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="MODULE|FILE.py",
        help=(
            "Load components from a module or a .py file; repeatable. Modules are also looked for in the current "
            "directory, after all that is installed, as they are for a NAME = package.module:Class of a recipe."
        ),
    ),
]
SeedsOption = Annotated[str | None, typer.Option(help="Seeds, such as 0,1,2, instead of the recipe's or the plan's.")]


def seeds_of(text: str | None) -> list[int] | None:
    """The numbers of `--seeds`.

    Args:
        text: As it was typed; None if it was not.

    Raises:
        ConfigError: It is no list of whole numbers.
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {text[:80]}: give whole numbers with commas, such as 0,1,2.") from None
