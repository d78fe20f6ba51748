"""A model that any function makes: `name = "package.module:function"` in a recipe's [model]."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from typing import Any

from torch import nn

from mithridate.core.errors import ConfigError, nearest
from mithridate.core.seeding import seeded_default
from mithridate.data.catalogue import DatasetInfo

GIVEN = ("info", "seed")
"""Parameters that the caller of `build` fills in, where the function has them."""


@dataclass(frozen=True)
class ModelFactory:
    """A function, or a class of modules, that makes a model from keyword arguments.

    Args:
        name: `package.module:function`.
        settings: Its keyword arguments besides `info` (the description of the data set) and `seed`, which are passed if
            its signature names them.
    """

    name: str
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, values: Mapping[str, Any], *, where: str) -> "ModelFactory":
        """The factory of a recipe's table, its own defaults filled in where TOML can write them.

        Args:
            name: `package.module:function`; it can be imported.
            values: The table's other keys.
            where: Begins the message.

        Raises:
            ConfigError: A key that the function does not take, or one that it needs and does not get.
        """
        where = f"{where} {name}"
        known = inspect.signature(_function(name)).parameters.values()
        takes_any = any(p.kind is p.VAR_KEYWORD for p in known)
        free = {p.name: p for p in known if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY} and p.name not in GIVEN}
        for key in values:
            if key in GIVEN or (key not in free and not takes_any):
                raise ConfigError(f"{where}: unknown key '{key}': {nearest(key, free)}")
        for key, parameter in free.items():
            if parameter.default is parameter.empty and key not in values:
                raise ConfigError(f"{where}: {key} has no default; give it a value.")
        defaults = {key: p.default for key, p in free.items() if _is_plain(p.default)}
        return cls(name, {**defaults, **values})

    def __hash__(self) -> int:
        """Equal factories have equal hashes; their settings may have none."""
        return hash(self.name)

    def recipe_table(self) -> dict[str, Any]:
        """The table of a recipe that builds it."""
        return {"name": self.name, **self.settings}

    def build(self, info: DatasetInfo, *, seed: int) -> nn.Module:
        """A fresh module; torch's default generator is seeded while the function runs.

        Args:
            info: The data set; passed if the function has a parameter of that name.
            seed: Decides the initial parameters; passed likewise.

        Raises:
            ConfigError: The function raises, or gives something else than a module.
        """
        function = _function(self.name)
        known = inspect.signature(function).parameters
        given = {key: value for key, value in (("info", info), ("seed", seed)) if key in known}
        try:
            with seeded_default(seed):
                module = function(**given, **self.settings)
        except Exception as error:  # whatever somebody else's code can raise
            raise ConfigError(
                f"[model] {self.name} cannot make a model for {info.name} ({type(error).__name__}: {error}); change "
                "its settings, or mend it."
            ) from error
        if not isinstance(module, nn.Module):
            raise ConfigError(f"[model] {self.name} gives {type(module).__name__}; it must return a torch.nn.Module.")
        return module


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = attrgetter(function)(import_module(module))
    return found


def _is_plain(value: object) -> bool:
    """Whether TOML can write a value."""
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return isinstance(value, bool | int | float | str)
