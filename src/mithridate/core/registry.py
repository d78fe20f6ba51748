"""Names for components: what a recipe, the command line and the docs' tables are built from.

A component is a frozen, keyword-only dataclass; its fields are its hyper-parameters and hold the only defaults. Writing
one file with a registered class is all that it takes to appear everywhere.
"""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from mithridate.core.errors import ConfigError, nearest
from mithridate.core.settings import defaults, fields_of, make, settings

__all__ = [
    "KINDS",
    "Entry",
    "Kind",
    "build",
    "config_of",
    "defaults",
    "entries",
    "entry",
    "fields_of",
    "make",
    "register",
    "settings",
]

Kind = Literal["aggregator", "attack", "update_attack", "defence", "detector", "model", "monitor"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_PACKAGES: dict[Kind, str] = {kind: f"{kind}s" for kind in KINDS}

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One registered component.

    Args:
        kind: Which sort.
        name: Its name in recipes.
        cls: Its settings class.
        presets: Named sets of field values; each replaces defaults, and fields given beside it win.
    """

    kind: Kind
    name: str
    cls: type
    presets: Mapping[str, Mapping[str, Any]]

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.cls) or "").partition("\n")[0]

    @property
    def source(self) -> str:
        """The docstring's `Source:` paragraph on one line, or an empty string."""
        _, _, rest = (inspect.getdoc(self.cls) or "").partition("Source:\n")
        return " ".join(line.strip() for line in rest.partition("\n\n")[0].splitlines())

    @property
    def fields(self) -> dict[str, Any]:
        """Every field with its default; `dataclasses.MISSING` for one that has none."""
        return defaults(self.cls)


_entries: dict[Kind, dict[str, Entry]] = {kind: {} for kind in KINDS}


def register(
    kind: Kind, name: str, *, presets: Mapping[str, Mapping[str, Any]] | None = None
) -> Callable[[type[T]], type[T]]:
    """Give a settings class a name.

    Args:
        kind: Which sort of component.
        name: What recipes call it.
        presets: Named sets of field values.

    Raises:
        ConfigError: The name is taken by another class; or a field may be None and defaults to something else, so that
            a recipe, which leaves None out, could not tell the two apart.
    """

    def put(cls: type[T]) -> type[T]:
        old = _entries[kind].get(name)
        if old is not None and (old.cls.__module__, old.cls.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"{kind} '{name}' is registered already, by {old.cls.__module__}; choose another name.")
        made = Entry(kind, name, cls, presets or {})
        hints = get_type_hints(cls)
        for key, default in made.fields.items():
            if NoneType in get_args(hints[key]) and default is not None:
                raise ConfigError(f"{kind} '{name}': {key} may be None, so its default must be None, not {default!r}.")
        _entries[kind][name] = made
        return cls

    return put


def entries(kind: Kind) -> dict[str, Entry]:
    """All components of a kind by name, sorted; imports the package that holds them."""
    package = importlib.import_module(f"mithridate.{_PACKAGES[kind]}")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_entries[kind].items()))


def entry(kind: Kind, name: str) -> Entry:
    """The component of that name.

    Raises:
        ConfigError: There is none; the message names the nearest.
    """
    known = entries(kind)
    if name not in known:
        raise ConfigError(f"unknown {kind} '{name}': {nearest(name, known)}")
    return known[name]


def build(kind: Kind, config: Mapping[str, Any], *, where: str = "") -> Any:  # noqa: ANN401  (the registry is untyped)
    """A component from a table of a recipe.

    Args:
        kind: Which sort.
        config: `name`, optionally `preset`, and field values.
        where: Named in messages; the table's name by default.

    Raises:
        ConfigError: No name, unknown name, preset or key, or a value of the wrong type or range.
    """
    where = where or f"[{kind}]"
    values = dict(config)
    if "name" not in values:
        raise ConfigError(f"{where} has no `name`: say which {kind}. {nearest('', entries(kind))}")
    found = entry(kind, str(values.pop("name")))
    preset = values.pop("preset", None)
    if preset is not None and preset not in found.presets:
        raise ConfigError(f"{where} {found.name}: unknown preset '{preset}': {nearest(str(preset), found.presets)}")
    start = found.presets[preset] if preset is not None else {}
    return make(found.cls, {**start, **values}, where=f"{where} {found.name}")


def config_of(component: object) -> dict[str, Any]:
    """A component as the table that builds it: `name` and every field; one that is None is left out (TOML has none).

    Raises:
        ConfigError: The object's class is not registered.
    """
    for known in _entries.values():
        for item in known.values():
            if type(component) is item.cls:
                return {"name": item.name, **fields_of(component)}
    raise ConfigError(f"{type(component).__name__} is not a registered component; decorate it with `register`.")
