"""Changes of a recipe's tables before anything is made of them: one `--set`, or the many of its `[grid]`."""

import copy
import itertools
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mithridate.bench.surrogate import Surrogate
from mithridate.core import registry
from mithridate.core.errors import ConfigError, nearest
from mithridate.core.settings import UNSET, by_path

Table = dict[str, Any]

TABLES = (
    "data",
    "model",
    "burn_in",
    "surrogate",
    "attack",
    "defence",
    "detector",
    "monitor",
    "run",
    "clients",
    "federated",
)
"""The tables of a recipe; those that a burn-in depends on come first, and so vary slowest in a grid."""

ARRAYS = ("surrogate", "attack", "defence", "detector", "monitor")
"""The tables of which a recipe may have several."""

CROSSED = ("surrogate", "attack", "defence", "detector")
"""Those of which a grid makes several, each with its label, in the same runs' recipe."""

LONGEST_VALUE = 24
"""Letters of a value in a label; longer ones are numbered."""


DEEPEST = 32
"""Tables and lists within each other, at most."""


def check_depth(value: object, *, where: str) -> None:
    """Refuse what is nested deeper than any setting: what comes after goes through it by calling itself.

    Args:
        value: Of TOML.
        where: Named in the message.

    Raises:
        ConfigError: It is.
    """
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        parts = [part for part in level if isinstance(part, dict | list)]
        if not parts:
            return
        level = [item for part in parts for item in (part.values() if isinstance(part, dict) else part)]
    raise ConfigError(f"{where} is nested too deep: tables and lists may stand {DEEPEST} within each other.")


class _Field(NamedTuple):
    """A setting: of every component of the table that has it, or of the one that is called so."""

    table: str
    label: str
    key: str

    @classmethod
    def of(cls, path: str, *, where: str) -> "_Field":
        """The setting that `table.key` or `table.LABEL.key` names."""
        table, _, rest = path.strip().partition(".")
        label, _, key = rest.rpartition(".")
        if not table or not key:
            raise ConfigError(f"{where}: write table.key, such as attack.eps.")
        if table not in TABLES:
            raise ConfigError(f"{where}: unknown table '{table}': {nearest(table, TABLES)}")
        if label and table not in ARRAYS:
            raise ConfigError(f"{where}: [{table}] has no parts; write {table}.{key}.")
        return cls(table, label, key)

    def meets(self, other: "_Field") -> bool:
        """Whether one could change what the other does."""
        labels = {self.label, other.label}
        return (self.table, self.key) == (other.table, other.key) and (len(labels) == 1 or "" in labels)


def label_of(table: Mapping[str, Any]) -> object:
    """What a component is called: its label, its name, or the class of `package.module:Class`; text if all is well."""
    name = table.get("name", "")
    return table.get("label", name.rpartition(":")[2] if isinstance(name, str) else name)


def apply_change(tables: Table, change: str) -> None:
    """Apply one `--set`: `table.key=value`, or `attack.LABEL.key=value` for one of several.

    Without a label, every component of the recipe's table that has the key is changed. Values are TOML; what is not
    TOML is taken as text. `table.key=none` unsets an optional setting, `table=none` takes the whole table out, and
    `grid.table.key=[...]` crosses the values: in each of several grids that has the setting, in all if none has.

    Args:
        tables: The recipe's tables; changed in place.
        change: Such as `attack.eps=0.1`.

    Raises:
        ConfigError: No `=`, no such table, label or key; or the recipe's grid crosses the setting.
    """
    path, equals, text = change.partition("=")
    path, text, where = path.strip(), text.strip(), f"--set {change}"
    value = toml_value(text)
    check_depth(value, where=where)
    if equals and value == UNSET and path in (*TABLES, "grid"):
        tables.pop(path, None)
        return
    if equals and path in TABLES:
        how = _one_by_one(tables.get(path), path, value)
        raise ConfigError(f"{where}: [{path}] is a table, and --set changes one setting of it. {how}")
    if equals and text[:1] in ("{", "[") and value == text:
        example = '{ name = "krum" }' if text[0] == "{" else '["a", "b"]'
        raise ConfigError(
            f"{where}: {text[:80]} is no TOML; text inside needs quotes, which the shell takes away unless all of it "
            f"is quoted, as in --set '{path}={example}'."
        )
    if equals and path.startswith("grid."):
        setting, grids = path.removeprefix("grid."), _grids(tables) or [{}]
        for grid in [grid for grid in grids if setting in grid] or grids:
            grid[setting] = value
        tables["grid"] = grids
        return
    table, _, rest = path.partition(".")
    if not equals or not table or not rest.rpartition(".")[2]:
        raise ConfigError(f"{where}: write table.key=value, such as attack.eps=0.1.")
    field = _Field.of(path, where=where)
    for crossed, values in (item for grid in _grids(tables) for item in grid.items()):
        if field.meets(_Field.of(crossed, where="[grid]")):
            example = f"'grid.{crossed}=[...]'" if isinstance(values, list) else f"grid.{crossed}=..."
            raise ConfigError(
                f"{where}: the recipe's grid has {crossed}; change that by --set {example}, or take the grid out by "
                "--set grid=none."
            )
    for target in _targets(tables, field, where=where):
        target[field.key] = value


def _one_by_one(now: object, table: str, value: object) -> str:
    """What to write in place of a whole table.

    Args:
        now: What the recipe has there: a table, several, or nothing.
        table: What it is called.
        value: What it was to become.
    """
    labels = [label_of(part) for part in now if isinstance(part, dict)] if isinstance(now, list) else []
    start = f"{table}.{labels[0]}" if len(labels) > 1 else table
    keys = list(map(str, value)) if isinstance(value, dict) and all(map(str.isidentifier, value)) else []
    if not keys and isinstance(value, str) and value.isidentifier() and table in {*CROSSED, "model"} - {"surrogate"}:
        example = f"{start}.name={value}"
    else:
        example = " --set ".join(f"{start}.{key}=..." for key in keys[:4] or ["KEY"])
    return f"Write --set {example}, change the recipe's file, or take the table out by --set {table}={UNSET}."


class LargeGridError(ConfigError):
    """A grid has so many runs that somebody may have made a mistake; if not, `most` says so."""


def check_size(tables: Mapping[str, Any], most: int) -> None:
    """Refuse a grid of too many runs, before anything is made of it.

    Args:
        tables: The recipe's tables; not changed.
        most: Runs at most.

    Raises:
        LargeGridError: There are more, or may be.
        ConfigError: The grid crosses a setting that is not there.
    """
    size = 0
    for grid in _grids(tables) or [{}]:
        copied = copy.deepcopy(dict(tables))
        fields = {_Field.of(path, where="[grid]"): value for path, value in grid.items()}
        lengths = {field: len(value) for field, value in fields.items() if isinstance(value, list)}
        runs = math.prod(length for field, length in lengths.items() if field.table not in CROSSED)
        for kind in ("attack", "defence", "surrogate"):
            of_kind = {field: value for field, value in fields.items() if field.table == kind}
            runs *= sum(
                math.prod(lengths.get(field, 1) for field in reaching)
                for _, reaching in _reached(copied, kind, of_kind)
            )
        loop = tables.get("federated" if "federated" in tables else "run", {})
        size += runs * math.prod(len(v) for v in (loop.get("seeds"), loop.get("rule")) if isinstance(v, list))
    if size > most:
        runs_in_all = f"{size:,}" if size < 10**12 else "more than 10**12"
        raise LargeGridError(
            f"the recipe's grid has {runs_in_all} runs: attacks, defences, seeds and all values crossed. If that is "
            "meant, say --yes (in Python: most=None)."
        )


def expanded(tables: Table) -> Iterator[tuple[str, Table]]:
    """The variants of a recipe with a grid: what each is called, and its tables, without a grid.

    `[grid]` has lists of values by setting, written as in `--set`: every value of each is crossed with every value of
    the others. `[[grid]]`, several of them, are done one after the other. A value that is no list is set, and named
    nowhere. Values of attacks, defences, surrogates and detectors make several of these, with the value in their
    labels; those of all other tables make variants.

    Args:
        tables: The recipe's tables; not changed.

    Raises:
        ConfigError: A setting that is not there, or an empty list.
    """
    base = {key: value for key, value in tables.items() if key != "grid"}
    for grid in _grids(tables) or [{}]:
        fields = {_Field.of(path, where="[grid]"): value for path, value in grid.items()}
        for field, value in fields.items():
            if value == []:
                raise ConfigError(f"[grid] {'.'.join(filter(None, field))} = []: give some values.")
            if field.key in {"seeds", "label"}:
                raise ConfigError(
                    f"[grid] {field.table}.{field.key}: seeds are crossed as they are, labels are no setting."
                )
        for label, variant in _variants(base, fields):
            for kind in CROSSED:
                of_kind = {field: value for field, value in fields.items() if field.table == kind}
                if of_kind:
                    _multiply(variant, kind, of_kind)
            yield label, variant


def _grids(tables: Mapping[str, Any]) -> list[Table]:
    """The grids of a recipe, each by path, however its keys are nested."""
    grids = tables.get("grid", [])
    return [by_path(grid) for grid in (grids if isinstance(grids, list) else [grids])]


def _variants(base: Table, fields: Mapping[_Field, Any]) -> Iterator[tuple[str, Table]]:
    """Every combination of the values of tables that a recipe has once."""
    chosen = sorted((f for f in fields if f.table not in CROSSED), key=lambda f: TABLES.index(f.table))
    for values in itertools.product(*(_named_values(field, fields[field], chosen) for field in chosen)):
        tables = copy.deepcopy(base)
        for field, (_, value) in zip(chosen, values, strict=True):
            for target in _targets(tables, field, where="[grid]"):
                target[field.key] = copy.deepcopy(value)
        yield "+".join(name for name, _ in values if name), tables


def _multiply(tables: Table, kind: str, fields: Mapping[_Field, Any]) -> None:
    """Put a copy for every combination of values in place of each component that has the fields."""
    made: list[Table] = []
    for table, chosen in _reached(tables, kind, fields):
        for values in itertools.product(*(_named_values(field, fields[field], chosen) for field in chosen)):
            changes = {field.key: copy.deepcopy(value) for field, (_, value) in zip(chosen, values, strict=True)}
            names = [name for name, _ in values if name]
            base = "" if "name" in changes and "label" not in table else label_of(table)
            label = "+".join(filter(None, [base if isinstance(base, str) else "", *names]))
            made.append({**table, **changes, **({"label": label} if names else {})})
    tables[kind] = made


def _reached(tables: Table, kind: str, fields: Iterable[_Field]) -> list[tuple[Table, list[_Field]]]:
    """Each component of a kind, with the fields that are said of it."""
    reached: dict[int, dict[str, _Field]] = {}
    for field in sorted(fields, key=lambda f: bool(f.label)):  # what is said of one wins over what is said of all
        for target in _targets(tables, field, where="[grid]"):
            reached.setdefault(id(target), {})[field.key] = field
    return [(table, list(reached.get(id(table), {}).values())) for table in _parts(tables, kind)]


def _named_values(field: _Field, value: object, beside: Sequence[_Field]) -> list[tuple[str, Any]]:
    """The values of a field in a grid, each with what labels call it; no name for the value that is merely set."""
    if not isinstance(value, list):
        return [("", value)]
    unique = sum(other.key == field.key for other in beside) == 1
    start = "" if field.key == "name" else f"{field.key if unique else f'{field.table}.{field.key}'}-"
    names = [_slug(item) for item in value]
    folded = [name.lower() for name in names]  # where a file system does not tell them apart, nor do labels
    return [
        (start + (name if name and folded.count(name.lower()) == 1 else "-".join(filter(None, [name, str(i)]))), item)
        for i, (name, item) in enumerate(zip(names, value, strict=True), start=1)
    ]


def _slug(value: object) -> str:
    """A value in letters that a label may have; empty if it is too long for that."""
    match value:
        case Mapping():
            slug = _slug(label_of(value))
        case list():
            slug = "-".join(map(_slug, value)) or "empty"
        case bool():
            slug = str(value).lower()
        case float():
            slug = f"{value:g}"
        case _:
            slug = re.sub(r"[^A-Za-z0-9._+-]+", "-", str(value).rpartition(":")[2])
    return slug if len(slug) <= LONGEST_VALUE else ""


def _parts(tables: Table, table: str) -> list[Table]:
    """The tables of that name, of which there may be several."""
    contents = tables.setdefault(table, {"name": "none"} if table == "defence" else {})
    return contents if isinstance(contents, list) else [contents]


def _targets(tables: Table, field: _Field, *, where: str) -> list[Table]:
    """The tables that hold a setting."""
    table, label, key = field
    if table not in ARRAYS:
        return [tables.setdefault(table, {})]
    parts = _parts(tables, table)
    if label:
        labels = {called: t for t in parts if isinstance(called := label_of(t), str)}
        if label not in labels:
            raise ConfigError(f"{where}: no {table} '{label}' in the recipe: {nearest(label, labels)}")
        return [labels[label]]
    if len(parts) == 1:
        return parts
    kind = "update_attack" if table == "attack" and "federated" in tables else table
    fitting = [t for t in parts if key in _keys(kind, t)]
    if not fitting:
        known = set().union(*(_keys(kind, t) for t in parts))
        raise ConfigError(f"{where}: no {table} of the recipe has '{key}': {nearest(key, known)}")
    return fitting


def _keys(kind: Any, table: Table) -> set[str]:  # noqa: ANN401  (one of ARRAYS, checked by the caller)
    if kind == "surrogate":
        return set(registry.defaults(Surrogate))
    name = table.get("name", "")
    return set(registry.entry(kind, name).fields) if isinstance(name, str) else set()


def toml_value(text: str) -> object:
    """A value as TOML, or as the text that it is."""
    try:
        values = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # no TOML, a number of too many digits, or nested too deep
        return text
    return values["value"] if len(values) == 1 else text
