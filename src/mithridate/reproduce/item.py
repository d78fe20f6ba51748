"""One table or figure of a paper: its recipe at three scales, how its cells are found in our runs, and its claims."""

import copy
import csv
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Literal, get_args

from mithridate.bench.changes import TABLES, apply_change
from mithridate.bench.inheritance import merged
from mithridate.bench.recipe import Recipe, make_recipe
from mithridate.core.errors import ConfigError, nearest, shown
from mithridate.reproduce.checks import Check
from mithridate.reproduce.quantities import check_measure
from mithridate.reproduce.selection import Selection

Scale = Literal["smoke", "small", "paper"]
"""`smoke`: scikit-learn's digits, in seconds; `small`: real images and a narrow model, for two CPU cores; `paper`: the
full protocol."""

SCALES: Sequence[Scale] = get_args(Scale)

PACKAGE = files("mithridate.reproduce")
"""Where items, bases and published numbers lie."""

DEEPEST = 8
"""Bases above each other, at most."""

_KEYS = ("title", "source", "claim", "extends", "recipe", *SCALES, "table", "figure", "check", "cost", "also", "where")
SERIES = ("x", "y", "line", "where", "title", "unit")
_OF_RECIPE = (*TABLES, "grid", "plugins")


@dataclass(frozen=True)
class PublishedCell:
    """One printed number.

    Args:
        keys: What it stands under, by key column.
        measure: What it is.
        value: The number as printed; None where the paper prints none.
        std: What stands behind its plus-minus sign.
    """

    keys: Mapping[str, str]
    measure: str
    value: float | None
    std: float | None


@dataclass(frozen=True)
class PaperTable:
    """The layout of a published table, and which of our runs each of its cells is.

    Args:
        cells: The printed numbers, in the paper's order.
        rows: Keys that go down.
        columns: Keys that go across; `measure` is one of them, or of `rows`.
        choices: By key and printed value, what of our runs it is.
    """

    cells: Sequence[PublishedCell]
    rows: Sequence[str]
    columns: Sequence[str]
    choices: Mapping[str, Mapping[str, Selection]]

    def selection(self, cell: PublishedCell) -> Selection | None:
        """Which of our runs a printed number is about; None if the item says of none."""
        chosen = Selection()
        for key, value in {**cell.keys, "measure": cell.measure}.items():
            if key not in self.choices:
                continue
            if value not in self.choices[key]:
                return None
            chosen = chosen.joined(self.choices[key][value])
        return chosen if chosen.measure else None


@dataclass(frozen=True)
class Series:
    """A measure against a setting or another measure, a line a label or setting.

    Args:
        x: Path of a setting, or a measure.
        y: Measures; of several, each has its own lines.
        line: `attack`, `defence`, `variant` or the path of a setting; empty for a single line.
        where: Which runs.
        title: Of the panel.
        unit: What goes up, in words; unset: the measure's.
    """

    x: str
    y: Sequence[str]
    line: str = ""
    where: Selection = field(default_factory=Selection)
    title: str = ""
    unit: str = ""


@dataclass(frozen=True)
class Item:
    """A published table or figure, reproduced.

    Args:
        name: Such as `zhu2023-table1`.
        title: What it shows.
        source: Paper and place.
        claim: What the paper says it shows, in a line.
        tables: A recipe's tables by scale.
        table: How a table is laid out; None for a figure without one.
        draw: Figures of a report that redraw it, by name.
        series: Lines that redraw it.
        checks: The claims.
        cost: Seconds of processor time on two shared cores that it took us, by scale.
        also: Items whose runs it shows besides its own.
        where: Which runs the table and the claims are about; figures show all.
    """

    name: str
    title: str
    source: str
    claim: str
    tables: Mapping[Scale, Mapping[str, Any]]
    table: PaperTable | None
    draw: Sequence[str]
    series: Sequence[Series]
    checks: Sequence[Check]
    cost: Mapping[str, float]
    also: Sequence["Item"] = ()
    where: Selection = field(default_factory=Selection)

    @property
    def parts(self) -> "Sequence[Item]":
        """The items whose runs it shows: itself, if it has a recipe, and others."""
        return [*([self] if any(self.tables.values()) else []), *self.also]

    def recipe(self, scale: Scale, changes: Sequence[str] = ()) -> Recipe:
        """What is run at a scale.

        Args:
            scale: At which size.
            changes: Settings that are to differ, as `bench.changes.apply_change` takes them.

        Raises:
            ConfigError: The item is not described at that scale, or its recipe or a change is wrong.
        """
        tables = copy.deepcopy(dict(self.tables[scale]))
        but = f" ({', '.join(changes)})" if changes else ""
        try:
            for change in changes:
                apply_change(tables, change)
            return make_recipe({**tables, "title": f"{self.source}, {scale} scale{but}: {self.title}"})
        except ConfigError as error:
            raise ConfigError(f"{self.name} at scale {scale}: {error}") from None


def item_names(folder: Traversable = PACKAGE) -> list[str]:
    """All items, papers in the order of their names, tables before figures, by number.

    Args:
        folder: Where `items/` lies.
    """
    names = [
        path.name.removesuffix(".toml") for path in folder.joinpath("items").iterdir() if path.name[-5:] == ".toml"
    ]

    def order(name: str) -> tuple[object, ...]:
        paper, _, what = name.partition("-")
        kind = what.rstrip("0123456789")
        return paper, {"table": 0, "figure": 1}.get(kind, 2), int(what[len(kind) :] or 0), name

    return sorted(names, key=order)


def read_item(name: str, folder: Traversable = PACKAGE) -> Item:
    """An item by name.

    Args:
        name: Such as `pang2021-figure3`.
        folder: Where `items/`, `bases/` and `published/` lie.

    Raises:
        ConfigError: There is none of that name (the nearest is named), or a file is wrong.
    """
    names = item_names(folder)
    if name not in names:
        raise ConfigError(f"there is no table or figure '{name[:80]}': {nearest(name, names)}")
    tables = _toml(folder, f"items/{name}.toml")
    if unknown := next((key for key in tables if key not in _KEYS), None):
        raise ConfigError(f"items/{name}.toml: unknown key '{unknown}': {nearest(unknown, _KEYS)}")
    for key in ("title", "source", "claim"):
        if not isinstance(tables.get(key), str):
            raise ConfigError(f"items/{name}.toml has no {key}.")
    figure = tables.get("figure", {})
    series = figure.get("series", [])
    return Item(
        name=name,
        title=tables["title"],
        source=tables["source"],
        claim=tables["claim"],
        tables={scale: _recipe_tables(tables, scale, folder, f"items/{name}.toml") for scale in SCALES},
        table=_paper_table(tables["table"], folder, f"items/{name}.toml") if "table" in tables else None,
        draw=tuple(figure.get("draw", [])),
        series=[_series(s, f"items/{name}.toml") for s in (series if isinstance(series, list) else [series])],
        checks=[Check.of(check, where=f"items/{name}.toml") for check in tables.get("check", [])],
        cost=tables.get("cost", {}),
        also=[read_item(other, folder) for other in tables.get("also", [])],
        where=Selection.of(tables.get("where", {}), where=f"items/{name}.toml: [where]"),
    )


def _recipe_tables(
    tables: Mapping[str, Any], scale: Scale, folder: Traversable, where: str, depth: int = 0
) -> dict[str, Any]:
    """What all scales share and what this one differs in, over the same of the base."""
    if depth > DEEPEST:
        raise ConfigError(f"{where}: bases that extend each other more than {DEEPEST} deep, or in a circle.")
    result: dict[str, Any] = {}
    base = tables.get("extends")
    if base is not None:
        place = f"bases/{base}.toml"
        if not isinstance(base, str) or not folder.joinpath(place).is_file():
            known = [path.name.removesuffix(".toml") for path in folder.joinpath("bases").iterdir()]
            raise ConfigError(f"{where}: there is no base {shown(base)}: {nearest(str(base), known)}")
        result = _recipe_tables(_toml(folder, place), scale, folder, place, depth + 1)
    for part in ("recipe", scale):
        over = tables.get(part, {})
        if unknown := next((key for key in over if key not in _OF_RECIPE), None):
            raise ConfigError(f"{where}: [{part}] has '{unknown}': {nearest(unknown, _OF_RECIPE)}")
        result = merged(result, over)
    return result


def _toml(folder: Traversable, place: str) -> dict[str, Any]:
    try:
        return tomllib.loads(folder.joinpath(place).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{place} is not readable TOML: {str(error)[:200]}.") from None


def _series(table: Mapping[str, Any], where: str) -> Series:
    values = dict(table)
    if unknown := next((key for key in values if key not in SERIES), None):
        raise ConfigError(f"{where}: series has '{unknown}'; it takes {', '.join(SERIES)}.")
    if not {"x", "y"} <= values.keys():
        raise ConfigError(f"{where}: series needs x and y.")
    several = values["y"] if isinstance(values["y"], list) else [values["y"]]
    for measure in several:
        check_measure(measure)
    return Series(**{**values, "y": several, "where": Selection.of(values.get("where", {}), where=where)})


def _paper_table(table: Mapping[str, Any], folder: Traversable, where: str) -> PaperTable:
    known = ("published", "rows", "columns", "cells")
    if unknown := next((key for key in table if key not in known), None):
        raise ConfigError(f"{where}: [table] has '{unknown}': {nearest(unknown, known)}")
    rows, columns = table["rows"], table["columns"]
    choices = {
        key: {
            value: Selection.of(choice, where=f"{where}: [table.cells.{key}] {value}") for value, choice in of.items()
        }
        for key, of in table.get("cells", {}).items()
    }
    keys = {*rows, *columns}
    if unknown := next((key for key in choices if key not in keys | {"measure"}), None):
        raise ConfigError(f"{where}: [table.cells.{unknown}] is no row or column: {nearest(unknown, keys)}")
    return PaperTable(read_published(folder, table["published"], keys - {"measure"}), rows, columns, choices)


def read_published(folder: Traversable, name: str, keys: set[str]) -> list[PublishedCell]:
    """The printed numbers of a table.

    Args:
        folder: Where `published/` lies.
        name: Of the CSV file.
        keys: Columns that it must have, beside `measure`, `value` and `std`.

    Raises:
        ConfigError: A column is missing, or a number is none.
    """
    place = f"published/{name}"
    try:
        lines = folder.joinpath(place).read_text(encoding="utf-8").splitlines()
    except OSError:
        raise ConfigError(f"there is no {place}; give the paper's numbers in it.") from None
    reader = csv.DictReader(line for line in lines if not line.startswith("#"))
    wanted = keys | {"measure", "value", "std"}
    if missing := sorted(wanted - set(reader.fieldnames or ())):
        raise ConfigError(f"{place} has no column {', '.join(missing)}; it has {', '.join(reader.fieldnames or ())}.")
    cells = []
    for number, row in enumerate(reader, start=2):
        try:
            value, std = (float(row[key]) if row[key].strip() else None for key in ("value", "std"))
        except (ValueError, AttributeError):
            raise ConfigError(f"{place}, line {number}: value and std are numbers, or empty.") from None
        cells.append(PublishedCell({key: row[key] for key in row if key in keys}, row["measure"], value, std))
    return cells
