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
from mithridate.core.settings import UNSET
from mithridate.data.catalogue import DatasetInfo

BUILD_KEYS = ("info", "seed")
"""What `build` passes on to the function, where it has parameters of these names."""


@dataclass(frozen=True)
class ModelFactory:
    """A function, or a class of modules, that makes a model from keyword arguments.

    Args:
        name: `package.module:function`.
        settings: The function's keyword arguments besides `info` (the description of the data set) and `seed`, which
            `build` passes if the signature names them.
    """

    name: str
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, values: Mapping[str, Any], *, where: str) -> "ModelFactory":
        """The factory of a recipe's table, its own defaults filled in where TOML can write them.

        Args:
            name: `package.module:function`; it can be imported.
            values: The table's other keys; `none` leaves a default of None.
            where: Begins the message.

        Raises:
            ConfigError: A key that the function does not take, or one that it needs and does not get.
        """
        where = f"{where} {name}"
        known = inspect.signature(_function(name)).parameters.values()
        takes_any = any(p.kind is p.VAR_KEYWORD for p in known)
        free = {
            p.name: p for p in known if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY} and p.name not in BUILD_KEYS
        }
        values = {k: v for k, v in values.items() if v != UNSET or k not in free or free[k].default is not None}
        for key in values:
            if key in BUILD_KEYS or (key not in free and not takes_any):
                raise ConfigError(f"{where}: unknown key '{key}': {nearest(key, free)}")
        for key, parameter in free.items():
            if parameter.default is parameter.empty and key not in values:
                raise ConfigError(f"{where}: {key} has no default; give it a value.")
        defaults = {key: p.default for key, p in free.items() if _toml_can_write(p.default)}
        return cls(name, {**defaults, **values})

    def __hash__(self) -> int:
        """The name's hash: settings may hold lists, which have none."""
        return hash(self.name)

    def recipe_table(self) -> dict[str, Any]:
        """The table of a recipe that builds it."""
        return {"name": self.name, **self.settings}

    def build(self, info: DatasetInfo, *, seed: int) -> nn.Module:
        """A fresh module; torch's default generator is seeded while the function runs.

        Args:
            info: The data set; passed if the function has a parameter of that name.
            seed: Decides the initial parameters; passed if the function has a parameter of that name.

        Raises:
            ConfigError: The function raises, or gives something else than a module.
        """
        function = _function(self.name)
        known = inspect.signature(function).parameters
        arguments = {key: value for key, value in (("info", info), ("seed", seed)) if key in known}
        try:
            with seeded_default(seed):
                module = function(**arguments, **self.settings)
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
    maker: Callable[..., Any] = attrgetter(function)(import_module(module))
    return maker


def _toml_can_write(value: object) -> bool:
    """Whether a value can stand in a recipe."""
    if isinstance(value, list):
        return all(_toml_can_write(item) for item in value)
    return isinstance(value, bool | int | float | str)
