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
from typing import Any, Literal, TypeVar, dataclass_transform, get_args, get_type_hints

import pydantic
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic_core import PydanticUndefined

from mithridate.core.errors import ConfigError, nearest

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


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, pydantic.Field))
def settings(cls: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only dataclass whose types and ranges are checked when it is made."""
    config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=True, validate_default=True)
    made: type[T] = checked_dataclass(frozen=True, kw_only=True, config=config)(cls)  # type: ignore[assignment]  # pydantic's own type
    return made


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


def make(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """A settings object from plain values, with messages that a recipe's author understands.

    Raises:
        ConfigError: Unknown key (names the nearest), missing key, wrong type or range.
    """
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]  # settings
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key '{key}': {nearest(key, known)}")
    try:
        return cls(**values)
    except pydantic.ValidationError as error:
        problems = "; ".join(_problem(e) for e in error.errors())
        raise ConfigError(f"{where}: {problems}.") from None


def _problem(e: Any) -> str:  # noqa: ANN401  (pydantic's own error record)
    place = ".".join(str(part) for part in e["loc"])
    if e["type"] == "missing":
        return f"{place} has no default; give it a value"
    message = str(e["msg"]).removeprefix("Value error, ")
    return f"{place} = {e['input']!r}: {message[0].lower()}{message[1:]}" if place else message


def defaults(cls: type) -> dict[str, Any]:
    """Every field of a settings class with its default; `dataclasses.MISSING` where there is none."""
    return {f.name: _default(f) for f in dataclasses.fields(cls)}


def _default(field: "dataclasses.Field[Any]") -> Any:  # noqa: ANN401  (a field holds anything)
    if isinstance(field.default, pydantic.fields.FieldInfo):
        default = field.default.get_default(call_default_factory=True)
        return dataclasses.MISSING if default is PydanticUndefined else default
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


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


def fields_of(settings_object: object) -> dict[str, Any]:
    """Field values of a settings object, without those that are None."""
    values = {f.name: getattr(settings_object, f.name) for f in dataclasses.fields(settings_object)}  # type: ignore[arg-type]  # every settings class is a dataclass
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items() if v is not None}
