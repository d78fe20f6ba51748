"""The kinds of components, what each derives from, and components by where they are: `package.module:Class`."""

import dataclasses
import importlib
import sys
from functools import reduce
from types import ModuleType
from typing import Any, Literal, get_args

from mithridate.core.errors import ConfigError, nearest

Kind = Literal["aggregator", "attack", "update_attack", "defence", "detector", "model", "monitor"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_BASES: dict[Kind, str] = {
    "aggregator": "mithridate.core.aggregator:Aggregator",
    "attack": "mithridate.core.attack:Attack",
    "update_attack": "mithridate.core.update_attack:UpdateAttack",
    "defence": "mithridate.core.defence:Defence",
    "detector": "mithridate.core.watch:Detector",
    "model": "mithridate.models:ModelSettings",
    "monitor": "mithridate.core.watch:Monitor",
}
"""Named by text, since these modules import this one."""


def check_kind(kind: str) -> None:
    """Refuse a kind that there is not; the message names the nearest.

    Raises:
        ConfigError: There is no such kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown kind of component '{kind}': {nearest(kind, KINDS)}")


def base_of(kind: Kind) -> type:
    """The class that components of a kind derive from."""
    module, _, name = _BASES[kind].partition(":")
    base: type = getattr(importlib.import_module(module), name)
    return base


def misfit(kind: Kind, value: object) -> str | None:
    """Why an object is not the class of a component; None if it is one.

    Args:
        kind: Which it should be. A model may also be made by any function.
        value: Whatever a module holds.

    Returns:
        The end of a sentence that begins with its name.
    """
    is_a = [other for other in KINDS if isinstance(value, type) and issubclass(value, base_of(other))]
    if is_a and kind not in is_a:
        return f"is of the kind '{is_a[0]}', not '{kind}'; name it there, or another class here."
    if kind == "model" and callable(value) and not dataclasses.is_dataclass(value):
        return None
    if kind not in is_a:
        return f"is no {kind}; name a dataclass that derives from mithridate's {base_of(kind).__name__}."
    if not dataclasses.is_dataclass(value):
        return "is no dataclass; decorate it with mithridate's `settings`."
    if lacking := sorted(getattr(value, "__abstractmethods__", ())):
        return f"is abstract: it lacks {', '.join(lacking)}; write them, or name another class."
    return None


def component_in(module: ModuleType, name: str, kind: Kind) -> Any:  # noqa: ANN401  (a class, or what makes a model)
    """The class of a component in a module.

    Args:
        module: Where it is.
        name: What it is called there; dots lead into classes.
        kind: Which it must be.

    Raises:
        ConfigError: The module has no such class (names the nearest that fits), or it is of another kind.
    """
    what = f"{kind} '{module.__name__}:{name}'"
    value = _member(module, name)
    if value is None:
        fitting = [key for key, other in vars(module).items() if key[0] != "_" and misfit(kind, other) is None]
        raise ConfigError(f"{what}: {module.__file__} has no {name}: {nearest(name, fitting)}")
    if problem := misfit(kind, value):
        raise ConfigError(f"{what}: {name} {problem}")
    return value


def place_of(cls: type) -> str | None:
    """`package.module:Class`, if that is where another process finds the class."""
    can_be_found = cls.__module__ != "__main__" and _member(sys.modules.get(cls.__module__), cls.__qualname__) is cls
    return f"{cls.__module__}:{cls.__qualname__}" if can_be_found else None


def _member(module: object, qualified_name: str) -> object:
    return reduce(lambda holder, part: getattr(holder, part, None), qualified_name.split("."), module)
