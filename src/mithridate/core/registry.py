"""Names for components: what a recipe, the command line and the docs' tables are built from.

A component is a frozen, keyword-only dataclass; its fields are its hyper-parameters and hold the only defaults. It is
known by the name that it is registered under, in this library, in an installed package or in a plug-in, or by where it
is: `package.module:Class`.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from mithridate.core import plugins
from mithridate.core.errors import ConfigError, nearest, shown
from mithridate.core.kind import KINDS, Kind, check_kind, component_in, place_of
from mithridate.core.settings import UNSET, defaults, fields_of, make, settings

__all__ = [
    "KINDS",
    "Entry",
    "Kind",
    "broken_packages",
    "build",
    "config_of",
    "defaults",
    "entries",
    "entry",
    "fields_of",
    "load_plugin",
    "make",
    "register",
    "retire",
    "settings",
]

_BUILT_IN = "mithridate"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One component that is known by name.

    Args:
        kind: Which sort.
        name: Its name in recipes.
        cls: Its settings class; of a model named by where it is, any function that makes one.
        presets: Named sets of field values; each replaces defaults, and fields given beside it win.
        origin: What another process must load to know the name: this library, an installed package, a plug-in; empty
            if the program itself registered it.
    """

    kind: Kind
    name: str
    cls: type[Any]
    presets: Mapping[str, Mapping[str, Any]]
    origin: str = ""

    @property
    def built_in(self) -> bool:
        """Whether it comes with this library."""
        return self.origin == _BUILT_IN

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
_retired: dict[Kind, dict[str, str]] = {kind: {} for kind in KINDS}


def register(
    kind: Kind, name: str, *, presets: Mapping[str, Mapping[str, Any]] | None = None
) -> Callable[[type[T]], type[T]]:
    """Give a settings class a name.

    Args:
        kind: Which sort of component.
        name: What recipes call it.
        presets: Named sets of field values.

    Raises:
        ConfigError: There is no such kind; the name is taken by another class; the class is no dataclass; or a field
            may be None and defaults to something else, so that a recipe, which leaves None out, could not tell the two
            apart.
    """
    check_kind(kind)

    def put(cls: type[T]) -> type[T]:
        built_in = cls.__module__.startswith(f"{_BUILT_IN}.")
        known = _entries[kind] if built_in else _library(kind)
        old = known.get(name)
        if old is not None and (old.cls.__module__, old.cls.__qualname__) != (cls.__module__, cls.__qualname__):
            by = old.origin or old.cls.__module__
            raise ConfigError(f"{kind} '{name}' is registered already, by {by}; choose another name.")
        if not dataclasses.is_dataclass(cls):
            raise ConfigError(f"{kind} '{name}': {cls.__name__} is no dataclass; put `@settings` below `@register`.")
        _check_optional(cls, f"{kind} '{name}'")
        known[name] = Entry(kind, name, cls, presets or {}, _BUILT_IN if built_in else "")
        return cls

    return put


def retire(kind: Kind, name: str, how: str) -> None:
    """Say how a recipe writes now what a component of this name did once.

    Args:
        kind: Which sort of component.
        name: What recipes called it.
        how: Ends the message "KIND 'NAME' is no more: ".
    """
    check_kind(kind)
    _retired[kind][name] = how


def entries(kind: Kind) -> dict[str, Entry]:
    """All components of a kind by name, sorted: this library's, those of installed packages and of loaded plug-ins.

    Installed packages that cannot be loaded are left out; `broken_packages` says which.

    Raises:
        ConfigError: There is no such kind.
    """
    check_kind(kind)
    broken_packages()
    return dict(sorted(_library(kind).items()))


def entry(kind: Kind, name: str) -> Entry:
    """The component of that name.

    Args:
        kind: Which sort.
        name: What it is registered under, or `package.module:Class`.

    Raises:
        ConfigError: There is none; the message names the nearest. A module that cannot be imported, a class that it
            has not, or one of another kind.
    """
    check_kind(kind)
    if ":" in name:
        return _named_by_place(kind, name)
    if name in _library(kind):
        return _entries[kind][name]
    known = entries(kind)
    if name in known:
        return known[name]
    if name in _retired[kind]:
        raise ConfigError(f"{kind} '{name}' is no more: {_retired[kind][name]}")
    raise ConfigError(" ".join([f"unknown {kind} '{name}': {nearest(name, known)}", *broken_packages()]))


def build(kind: Kind, config: Mapping[str, Any], *, where: str = "") -> Any:  # noqa: ANN401  (the registry is untyped)
    """A component from a table of a recipe.

    Args:
        kind: Which sort.
        config: `name`, optionally `preset` (`none` is no preset), and field values.
        where: Named in messages; the table's name by default.

    Raises:
        ConfigError: No name, unknown name, preset or key, or a value of the wrong type or range.
    """
    check_kind(kind)
    where = where or f"[{kind}]"
    values = dict(config)
    if "name" not in values:
        raise ConfigError(f"{where} has no `name`: say which {kind}. {nearest('', entries(kind))}")
    name = values.pop("name")
    if not isinstance(name, str):
        raise ConfigError(f"{where} name = {shown(name)}: give one name, as text. {nearest('', entries(kind))}")
    item = entry(kind, name)
    if not dataclasses.is_dataclass(item.cls):
        return importlib.import_module("mithridate.models.factory").ModelFactory.of(item.name, values, where=where)
    preset = str(values.pop("preset", UNSET))
    if preset != UNSET and preset not in item.presets:
        raise ConfigError(f"{where} {item.name}: unknown preset '{preset}': {nearest(preset, item.presets)}")
    start = item.presets.get(preset, {})
    return make(item.cls, {**start, **values}, where=f"{where} {item.name}")


def config_of(component: object) -> dict[str, Any]:
    """A component as the table that builds it: `name` and every field; one that is None is left out (TOML has none).

    The name is the registered one if this library, an installed package or a plug-in gives it, else
    `package.module:Class`, by which any process finds the class.

    Raises:
        ConfigError: The object's class is neither registered nor to be found in a module.
    """
    if hasattr(component, "recipe_table"):  # what a function made
        table: dict[str, Any] = component.recipe_table()
        return table
    cls = type(component)
    registered = _registered(cls)
    place = place_of(cls) if dataclasses.is_dataclass(cls) else None
    name = registered.name if registered and (registered.origin or not place) else place
    if not name:
        raise ConfigError(f"{cls.__name__} is not a registered component; decorate it with `register`.")
    return {"name": name, **fields_of(component)}


def load_plugin(plugin: str, *, folder: str | Path | None = None) -> str:
    """Import a plug-in, so that the components that it registers are known by name.

    Args:
        plugin: `package.module`, or the path of a .py file.
        folder: Where a relative path begins; the current directory by default.

    Returns:
        The plug-in as it is known from any folder: the module's name, or the file's absolute path.

    Raises:
        ConfigError: It cannot be imported, registers a name that exists, or registers nothing.
    """
    broken_packages()  # they come before whatever is added now
    plugin = plugins.absolute(plugin, Path(folder or Path.cwd()))
    module, has_any = _load(plugin, partial(plugins.module_of, plugin))
    if not has_any:
        raise ConfigError(
            f"the plug-in {plugin} ({module.__file__}) registers no component; decorate a class with `register`, or "
            "give the path of the file if another module of that name was meant."
        )
    return plugin


@cache
def broken_packages() -> Sequence[str]:
    """Load what installed packages offer, once; a message for each that cannot be loaded."""
    messages = []
    for point in plugins.offered():
        package = point.dist.name if point.dist else point.value
        version = point.dist.version if point.dist else ""
        try:
            _load(f"{package} {version}".strip(), partial(importlib.import_module, point.module))
        except Exception as error:  # whatever somebody else's code can raise
            messages.append(
                f"The components of the installed package {package} cannot be loaded ({plugins.reason(error)}); mend "
                f"it or take it out (pip uninstall {package})."
            )
    return tuple(messages)


def _load(origin: str, load: Callable[[], ModuleType]) -> tuple[ModuleType, bool]:
    """Import a module and note where its components come from; a failed import registers nothing.

    Returns:
        The module, and whether it has components.
    """
    for kind in KINDS:  # a name that is taken is the newcomer's mistake, so the library comes first
        _library(kind)
    before = {kind: dict(known) for kind, known in _entries.items()}
    try:
        module = load()
    except BaseException:
        _entries.update(before)
        raise
    has_any = False
    for kind, known in _entries.items():
        for name, item in known.items():
            inside = f"{item.cls.__module__}.".startswith(f"{module.__name__}.")
            if inside or before[kind].get(name) is not item:
                has_any = True
                known[name] = dataclasses.replace(item, origin=item.origin or origin)
    return module, has_any


def _library(kind: Kind) -> dict[str, Entry]:
    """The components of a kind, once the package of this library that holds them is imported."""
    importlib.import_module(f"mithridate.{kind}s")
    return _entries[kind]


def _named_by_place(kind: Kind, path: str) -> Entry:
    """What `package.module:Class` names."""
    what = f"{kind} '{path}'"
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *name.split("."))):
        raise ConfigError(f"{what}: write package.module:Class.")
    try:
        module, _ = _load("", partial(importlib.import_module, module_name))
    except Exception as error:  # whatever somebody else's code can raise
        raise ConfigError(
            f"{what}: the module {module_name} cannot be imported ({plugins.reason(error)}); mend it, or run where "
            "Python finds it."
        ) from error
    cls = component_in(module, name, kind)
    if isinstance(cls, type) and dataclasses.is_dataclass(cls):
        _check_optional(cls, what)
    registered = _registered(cls)
    return Entry(kind, path, cls, registered.presets if registered else {}, registered.origin if registered else "")


def _registered(cls: type) -> Entry | None:
    return next((item for known in _entries.values() for item in known.values() if item.cls is cls), None)


def _check_optional(cls: type, what: str) -> None:
    hints = get_type_hints(cls)
    for key, default in defaults(cls).items():
        if NoneType in get_args(hints[key]) and default is not None:
            raise ConfigError(f"{what}: {key} may be None, so its default must be None, not {default!r}.")
