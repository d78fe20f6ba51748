"""Ranges: infinity is a value only of settings that say what it means, and NaN of none."""

import dataclasses
import importlib
import inspect
import math
import pkgutil
from typing import get_args, get_type_hints

import pytest

import mithridate
from mithridate.core.descriptions import described_fields
from mithridate.core.errors import ConfigError
from mithridate.core.settings import make


def holds_float(kind: object) -> bool:
    return kind is float or any(holds_float(part) for part in get_args(kind))


def float_fields() -> list[tuple[type, str]]:
    """Every field of every settings class of the package that takes a float."""
    trackers = ("mlflow_tracker", "prometheus_tracker", "tensorboard_tracker")
    extras = ("accelerated", "flower", "lightning", "trainer", *trackers)
    apart = ("mithridate.__main__", *(f"mithridate.guard.{name}" for name in extras))  # the first runs when imported
    names = [m.name for m in pkgutil.walk_packages(mithridate.__path__, "mithridate.")]
    modules = [importlib.import_module(n) for n in names if not n.startswith(apart)]
    classes = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and "__pydantic_validator__" in vars(value)
        and dataclasses.is_dataclass(value)
        and not inspect.isabstract(value)
    }
    return sorted(
        ((cls, f.name) for cls in classes for f in dataclasses.fields(cls) if holds_float(get_type_hints(cls)[f.name])),
        key=lambda pair: (pair[0].__module__, pair[0].__qualname__, pair[1]),
    )


def refused(cls: type, name: str, value: object) -> bool:
    try:
        make(cls, {name: value}, where="settings")
    except ConfigError as error:
        return f"{name} = {value!r}: " in str(error) or f"{name}.0 = " in str(error) or f"{name}.float = " in str(error)
    return False


def test_infinity_is_taken_where_the_description_says_what_it_means_and_nowhere_else() -> None:
    fields = float_fields()
    assert len(fields) > 60
    wrong = [
        f"{cls.__qualname__}.{name}"
        for cls, name in fields
        if refused(cls, name, math.inf) is ("`inf`" in described_fields(cls).get(name, ""))
    ]
    assert wrong == []


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_no_setting_takes_what_is_no_number_or_minus_infinity(value: float) -> None:
    assert [f"{cls.__qualname__}.{name}" for cls, name in float_fields() if not refused(cls, name, value)] == []
