"""What is checked: a class, the kind and name that it goes by, and the settings in which it is tried."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from mithridate.core.aggregator import Aggregator
from mithridate.core.attack import Attack
from mithridate.core.defence import Defence
from mithridate.core.errors import ConfigError
from mithridate.core.registry import KINDS, Entry, Kind, entries, make
from mithridate.core.update_attack import UpdateAttack
from mithridate.core.watch import Detector, Monitor

T = TypeVar("T")

Check = Callable[[type], None]
"""Raises AssertionError if a class breaks the rule that the function is named after."""

BASES: Mapping[Kind, type] = {
    "aggregator": Aggregator,
    "attack": Attack,
    "update_attack": UpdateAttack,
    "defence": Defence,
    "detector": Detector,
    "monitor": Monitor,
}
"""What components derive from; a model is any settings class with `build`."""


@lru_cache(maxsize=256)
def entry_of(cls: type) -> Entry:
    """How a class is registered; one that is not goes by its base class and its own name.

    Args:
        cls: The class of a component.

    Raises:
        ConfigError: It is no component.
    """
    for kind in KINDS:
        for entry in entries(kind).values():
            if entry.cls is cls:
                return entry
    for kind, base in BASES.items():
        if issubclass(cls, base):
            return Entry(kind, cls.__name__, cls, {})
    if callable(getattr(cls, "build", None)):
        return Entry("model", cls.__name__, cls, {})
    bases = ", ".join(base.__name__ for base in BASES.values())
    raise ConfigError(f"{cls.__name__} is no component: derive it from one of {bases}, or give it `build` (a model).")


def made(cls: type, values: Mapping[str, Any]) -> Any:  # noqa: ANN401  (a component of any kind)
    """The component with some settings, as a recipe makes it."""
    return make(cls, values, where=entry_of(cls).name)


def fresh(component: T, **changes: object) -> T:
    """Another object with the same settings, but for the changes."""
    settings: Any = component  # every component is a dataclass
    other: T = dataclasses.replace(settings, **changes)
    return other


def fields_in(cls: type, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that a class has."""
    return {name: value for name, value in wanted.items() if name in entry_of(cls).fields}


def variants(cls: type, tables: Iterable[Mapping[str, Any]]) -> list[Any]:
    """The component in several settings, each once.

    A combination that the class refuses is left out, but not the first.

    Args:
        cls: Its class.
        tables: Field values, the most important ones first.
    """
    components = []
    for number, table in enumerate(tables):
        try:
            component = made(cls, table)
        except ConfigError:
            if number == 0:
                raise
            continue
        if component not in components:
            components.append(component)
    return components


def named_choices(cls: type) -> list[dict[str, str]]:
    """A table for every value of every field that takes one of some names."""
    hints = get_type_hints(cls)
    return [
        {name: choice}
        for name in entry_of(cls).fields
        if get_origin(hints[name]) is Literal
        for choice in get_args(hints[name])
    ]
