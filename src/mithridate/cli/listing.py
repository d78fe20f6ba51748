"""What `mithridate list` prints: a line for each component, or all that one says of itself."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, is_dataclass

from rich.table import Table
from rich.text import Text

from mithridate.cli.terminal import out
from mithridate.core.kind import Kind
from mithridate.core.names import built_in
from mithridate.core.registry import entries, entry, load_plugin

DATASETS = "datasets"
"""What is listed besides components."""

NAME_WIDTH = 18
"""Room for a name; a longer one is shown whole."""

LEAST_ROOM = 30
"""Characters of a first line that are shown on the narrowest terminal."""


def list_names(kinds: Sequence[Kind], *, datasets: bool, plugins: Sequence[str], more: bool) -> None:
    """A line for each component: its name, and as much of its first line as the terminal has room for.

    Those of plug-ins stand apart, under the name of the package or file that they come from.

    Args:
        kinds: Which kinds of components.
        datasets: Whether data sets follow.
        plugins: Plug-ins to load before.
        more: Whether installed packages or plug-ins offer components; only then is everything imported.

    Raises:
        ConfigError: A plug-in cannot be loaded.
    """
    for plugin in plugins:
        load_plugin(plugin)
    for kind in kinds:
        _print_lines(f"{kind}s", built_in(kind))
        if more:
            known = [item for item in entries(kind).values() if not item.built_in]
            for origin in dict.fromkeys(item.origin or item.cls.__module__ for item in known):
                lines = {i.name: i.summary for i in known if origin == (i.origin or i.cls.__module__)}
                _print_lines(f"{kind}s, plug-in: {origin}", lines)
    if datasets:
        from mithridate.data.catalogue import DATASETS as KNOWN
        from mithridate.data.settings import OWN

        _print_lines(DATASETS, {name: info.summary for name, info in KNOWN.items()})
        _print_lines(f"{DATASETS}, your own", OWN)
    out.print("all that one says of itself: mithridate list KIND NAME", markup=False, highlight=False)


def _print_lines(heading: str, lines: Mapping[str, str]) -> None:
    out.print(Text(heading, style="bold"), soft_wrap=True)
    for name, line in lines.items():
        start = f"  {name:<{NAME_WIDTH}}  "
        room = max(out.width - len(start), LEAST_ROOM)
        out.print(Text(start + textwrap.shorten(line, room, placeholder="...")), soft_wrap=True)


def list_component(kind: Kind, name: str, *, plugins: Sequence[str]) -> None:
    """All that a component says of itself: what it is, its fields with their defaults, its presets and its source.

    Args:
        kind: Which sort.
        name: What it is registered under, or `package.module:Class`.
        plugins: Plug-ins to load before.

    Raises:
        ConfigError: There is none, and the message names the nearest; or a plug-in cannot be loaded.
    """
    import inspect

    from mithridate.core.descriptions import described_fields

    for plugin in plugins:
        load_plugin(plugin)
    item = entry(kind, name)
    out.print(Text.assemble((name, "bold"), f" ({kind})"), soft_wrap=True)
    prose = (inspect.getdoc(item.cls) or "").partition("\nArgs:\n")[0].partition("\nSource:\n")[0]
    for paragraph in prose.split("\n\n"):
        out.print(Text(" ".join(paragraph.split())))
    if is_dataclass(item.cls):
        _print_fields(item.fields, described_fields(item.cls))
    for preset, values in item.presets.items():
        out.print(Text(f"preset {preset}: {', '.join(f'{key} = {v}' for key, v in values.items()) or 'the defaults'}"))
    if item.source:
        out.print(Text(f"source: {item.source}"))
    if not item.built_in:
        out.print(Text(f"plug-in: {item.origin or item.cls.__module__}"), soft_wrap=True)


def list_dataset(name: str) -> None:
    """What is known of a data set, and the settings of `[data]` with their defaults.

    Args:
        name: One of the known sets, or how own data lie.

    Raises:
        ConfigError: There is none; the message names the nearest.
    """
    from mithridate.core.descriptions import described_fields
    from mithridate.core.registry import defaults
    from mithridate.data.catalogue import dataset_info
    from mithridate.data.settings import OWN, StreamSettings

    out.print(Text.assemble((name, "bold"), " (data set)"), soft_wrap=True)
    if name in OWN:
        out.print(Text(OWN[name]))
    else:
        info = dataset_info(name)
        rows = ", ".join(f"{split} {count:,}" for split, count in info.splits.items())
        out.print(Text(info.summary))
        out.print(Text(f"images: {'x'.join(map(str, info.shape))}, {len(info.classes)} classes; {rows}"))
        out.print(Text(f"hub id: {info.hub_id or 'none, it comes with scikit-learn'}"))
        out.print(Text(f"source: {info.source}"))
    out.print(Text("settings of [data]; sizes that are unset are chosen by data set:"))
    _print_fields(defaults(StreamSettings), described_fields(StreamSettings))


def _print_fields(fields: Mapping[str, object], words: Mapping[str, str]) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(2):
        table.add_column(overflow="fold")
    for key, value in fields.items():
        table.add_row(Text(f"  {key} = {_shown(value)}"), Text(words.get(key, "")))
    out.print(table)


def _shown(value: object) -> str:
    return "required" if value is MISSING else "unset" if value is None else str(value)
