"""Recipe files that say only what differs from others: `extends = "base.toml"`, or a list, the last one winning."""

import copy
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mithridate.bench.changes import Table
from mithridate.core.errors import ConfigError, shown
from mithridate.core.files import path_of
from mithridate.core.settings import UNSET

EXTENDS, PLUGINS = "extends", "plugins"

LARGEST = 2**22
"""Bytes of a recipe at most."""

DEEPEST = 8
"""Files at most from a recipe to the base of its bases."""

MOST = 64
"""Files at most that a recipe is put together from; one that several name counts each time."""


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Table:
    """What a recipe says over another: table by table and key by key, where both have a table; else what `over` says.

    Tables within tables are merged alike. An array of tables, and any other list, takes the place of what `base` has
    there; only `plugins` add up. `monitor = "none"` takes a whole table of the base out.

    Args:
        base: Tables of the recipe that is extended; not changed.
        over: Tables of the one that extends it; not changed.

    >>> merged({"run": {"steps": 20, "lr": 0.1}, "grid": {"run.lr": [1, 2]}}, {"run": {"lr": 0.2}, "grid": "none"})
    {'run': {'steps': 20, 'lr': 0.2}}
    """
    taken_out = {key for key, value in over.items() if value == UNSET and isinstance(base.get(key), dict | list)}
    tables = _merged(
        {key: value for key, value in base.items() if key not in taken_out},
        {key: value for key, value in over.items() if key not in taken_out},
    )
    plugins = [*base.get(PLUGINS, []), *over.get(PLUGINS, [])]
    return tables | ({PLUGINS: plugins} if plugins else {})


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Table:
    tables = copy.deepcopy(dict(base))
    for key, value in over.items():
        below = base.get(key)
        tables[key] = (
            _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else copy.deepcopy(value)
        )
    return tables


def inherited(path: Path, placed: Callable[[Table, Path], Table]) -> Table:
    """The tables of a recipe file, merged over those of the files that it extends.

    Args:
        path: The file.
        placed: Checks the tables of one file, and roots their paths at its folder, before they are merged.

    Raises:
        ConfigError: A file is missing, no TOML, extends itself, or extends too many others.
    """
    left = MOST

    def tables_of(file: Path, above: tuple[Path, ...]) -> Table:
        nonlocal left
        left -= 1
        if left < 0 or len(above) > DEEPEST:
            raise ConfigError(
                f"{path} extends too much: {DEEPEST} files above each other and {MOST} in all, at most; write some of "
                "them together."
            )
        tables = read_toml(file, asked_by=above[-1] if above else None)
        bases = _bases(tables.pop(EXTENDS, []), file)
        chain = (*above, file.resolve())
        result: Table = {}
        for base in bases:
            if base.resolve() in chain:
                raise ConfigError(f"{file} extends {base}, which extends it: take {EXTENDS} out of one of the two.")
            result = merged(result, tables_of(base, chain))
        return merged(result, placed(tables, file.parent))

    return tables_of(path, ())


def _bases(value: object, file: Path) -> list[Path]:
    names = value if isinstance(value, list) else [value]
    texts = [name for name in names if isinstance(name, str) and name]
    if len(texts) < len(names):
        raise ConfigError(f"{file}: {EXTENDS} = {shown(value)}: give the path of a recipe, or a list of paths.")
    return [file.parent / path_of(name) for name in texts]


def read_toml(path: Path, *, asked_by: Path | None = None) -> Table:
    """The tables of a file, whatever an editor put before them.

    Args:
        path: The file.
        asked_by: The recipe that extends it, if one does.

    Raises:
        ConfigError: It is missing, too large, or no TOML.
    """
    advice = f"mend {EXTENDS} in {asked_by}" if asked_by else "give the path of a .toml file"
    try:
        with path.open("rb") as handle:
            content = handle.read(LARGEST + 1)
    except FileNotFoundError:
        raise ConfigError(f"there is no recipe {path}; {advice}.") from None
    except OSError as error:
        raise ConfigError(f"{path} is not readable ({error.strerror}); {advice}.") from None
    if len(content) > LARGEST:
        raise ConfigError(f"{path} is larger than {LARGEST:,} bytes, and no recipe; {advice}.")
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except ValueError as error:  # no TOML, no UTF-8, or a number of too many digits
        raise ConfigError(f"{path} is not readable TOML: {str(error)[:200]}.") from None
    except RecursionError:
        raise ConfigError(f"{path} is not readable TOML: it is nested too deep.") from None
