"""Settings: frozen, keyword-only dataclasses whose values are checked, and the messages when one is wrong."""

import dataclasses
import inspect
import math
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

import pydantic
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic.dataclasses import rebuild_dataclass
from pydantic_core import ArgsKwargs, ErrorDetails, PydanticUndefined

from mithridate.core.errors import ConfigError, nearest, shown

T = TypeVar("T")

UNSET = "none"
"""What a recipe and a `--set` write to unset a field that may be None, since TOML has no null."""

_NOTHING = frozenset({UNSET, "null", "nil"})
"""Text by which people mean nothing, in small letters."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, pydantic.Field))
def settings(cls: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only dataclass whose keys, types and ranges are checked when it is made.

    A value that is wrong raises `ConfigError`, from Python as from a recipe. Where a field takes a float, it also takes
    a fraction as text, such as "8/255"; where it may be None, "none" is None, unless that is one of its choices.
    Infinity is wrong, unless the field says `allow_inf_nan=True`, or has infinity for its default or its neutral value.
    """
    neutral = vars(cls).get("neutral", {})
    for name, kind in inspect.get_annotations(cls).items():
        if any(isinstance(value, float) and math.isinf(value) for value in (vars(cls).get(name), neutral.get(name))):
            cls.__annotations__[name] = Annotated[kind, pydantic.Field(allow_inf_nan=True)]
    config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)
    checked: Any = checked_dataclass(frozen=True, kw_only=True, config=config)(cls)
    rebuild_dataclass(checked)  # a type that is not known yet is an error now: later, pydantic would replace `__init__`

    def __init__(self: T, **values: Any) -> None:  # noqa: ANN401  (a field holds anything)
        _fill(self, values, where=type(self).__name__, initialised_by=checked)

    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    checked.__init__ = __init__
    decorated: type[T] = checked
    return decorated


def make(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """A settings object from plain values, with messages that a recipe's author understands.

    Args:
        cls: A settings class, or any dataclass; the types of a plain dataclass are not checked.
        values: By field.
        where: Begins the message, such as the recipe's table.

    Raises:
        ConfigError: Unknown key (names the nearest), missing key, wrong type or range.
    """
    instance = cls.__new__(cls)
    _fill(instance, values, where=where)
    return instance


def _fill(
    instance: Any,  # noqa: ANN401  (any dataclass)
    values: Mapping[str, Any],
    *,
    where: str,
    initialised_by: type | None = None,
) -> None:
    """Initialise a dataclass from values, by the class whose ``__init__`` was called."""
    cls, fields = type(instance), {f.name: f for f in dataclasses.fields(instance)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {shown(key)}: {nearest(key, fields)}")
        _check_numbers(values[key], where=f"{where}: {key}")
    values = _spelled_out(cls, values, where=where)
    if initialised_by is None:
        initialised_by = next(cls for cls in type(instance).__mro__ if "__init__" in vars(cls))
    validator = vars(initialised_by).get("__pydantic_validator__")
    try:
        if validator is not None:
            validator.validate_python(ArgsKwargs((), dict(values)), self_instance=instance)
            for key, value in values.items():  # pydantic makes 1 of true
                if isinstance(value, bool) and type(getattr(instance, key, value)) in {int, float}:
                    raise ConfigError(f"{where}: {key} = {str(value).lower()}: that is no switch; give a number.")
            return
        for key, field in fields.items():
            if key not in values and field.init and _default(field) is dataclasses.MISSING:
                raise ConfigError(f"{where}: {key} has no default; give it a value.")
        instance.__init__(**values)
    except pydantic.ValidationError as error:
        problems = "; ".join(_problem(e) for e in error.errors())
        raise ConfigError(f"{where}: {problems}.") from None
    except ValueError as error:  # from the `__post_init__` of a plain dataclass
        raise ConfigError(f"{where}: {error}") from error


def _spelled_out(cls: type, values: Mapping[str, Any], *, where: str) -> Mapping[str, Any]:
    """The same values, with fractions given as text as floats, and `UNSET` as None."""
    if not any("/" in text or text.lower() in _NOTHING for value in values.values() for text in _texts(value)):
        return values
    hints = get_type_hints(cls)
    read = dict(values)
    for key, value in values.items():
        leaves = set(_leaves(hints[key]))
        if value == UNSET and NoneType in leaves and UNSET not in leaves:
            read[key] = None
        elif isinstance(value, str) and value.lower() in _NOTHING and (_holds(cls, key) or not leaves & {str, value}):
            raise ConfigError(f"{where}: {key} = {value!r}: {_how_to_unset(cls, key, optional=NoneType in leaves)}.")
        elif float in leaves and str not in leaves:
            try:
                read[key] = [_number(item) for item in value] if isinstance(value, list | tuple) else _number(value)
            except (ValueError, ZeroDivisionError):
                raise ConfigError(
                    f"{where}: {key} = {shown(value)}: give a number, or a fraction of two such as '8/255'."
                ) from None
    return read


def _how_to_unset(cls: type, key: str, *, optional: bool) -> str:
    """What to write in place of text that means nothing."""
    if optional:
        return f"to unset it, write {UNSET}"
    if held := _holds(cls, key):
        return held
    default = defaults(cls)[key]
    or_default = "" if default is dataclasses.MISSING else f", or leave it out for its default, {default}"
    return f"it cannot be unset; give it a value{or_default}"


def _holds(cls: type, key: str) -> str:
    """What to write for an empty list or table; empty text if the field is none by default."""
    default = defaults(cls)[key]
    if isinstance(default, tuple | list):
        return "it is a list; for none of them, write []"
    return "it is a table; for none of them, write {}" if isinstance(default, Mapping) else ""


def _leaves(hint: object) -> Iterator[object]:
    """The types that a hint is put together from, and the choices of its literals."""
    parts = get_args(hint)
    if get_origin(hint) is Literal or not parts:
        yield from parts or (hint,)
        return
    for part in parts:
        yield from _leaves(part)


def _texts(value: object) -> list[str]:
    """The text that a value is, or the texts in a list."""
    return [item for item in (value if isinstance(value, list | tuple) else [value]) if isinstance(item, str)]


def _number(value: object) -> object:
    """A fraction that is given as text as a float; anything else as it is."""
    if not isinstance(value, str) or "/" not in value:
        return value
    above, _, below = value.partition("/")
    ratio = float(above) / float(below)
    if not math.isfinite(ratio):
        raise ValueError
    return ratio


def _check_numbers(value: object, *, where: str) -> None:
    """Refuse whole numbers that neither TOML nor arrays can hold; a float of that size is written with a point."""
    if isinstance(value, list | tuple):
        for item in value:
            _check_numbers(item, where=where)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{where} = {shown(value, 40)}: too large for a whole number of 64 bits; give a smaller one.")


_OF_KIND = {
    "tuple_type": "give a list in brackets, such as [1, 2]",
    "list_type": "give a list in brackets, such as [1, 2]",
    "dict_type": 'give a table, such as { key = "value" }',
    "mapping_type": 'give a table, such as { key = "value" }',
}
"""What to write, in the words of a recipe, where pydantic has those of Python."""


def _problem(e: ErrorDetails) -> str:
    place = ".".join(str(part) for part in e["loc"])
    if e["type"] == "missing":
        return f"{place} has no default; give it a value"
    message = _OF_KIND.get(e["type"], str(e["msg"]).removeprefix("Value error, "))
    return f"{place} = {shown(e['input'])}: {message[0].lower()}{message[1:]}" if place else message


def defaults(cls: type) -> dict[str, Any]:
    """Every field of a settings class with its default; `dataclasses.MISSING` where there is none."""
    return {f.name: _default(f) for f in dataclasses.fields(cls)}


def _default(field: "dataclasses.Field[Any]") -> Any:  # noqa: ANN401  (a field holds anything)
    if isinstance(field.default, pydantic.fields.FieldInfo):
        default = field.default.get_default(call_default_factory=True)
        return dataclasses.MISSING if default is PydanticUndefined else default
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def by_path(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a table and of the tables in it, by dotted path.

    Args:
        table: Its keys are text.
        prefix: What every path begins with.

    >>> by_path({"run": {"lr": 0.1, "seeds": [0]}, "title": ""})
    {'run.lr': 0.1, 'run.seeds': [0], 'title': ''}
    """
    values: dict[str, Any] = {}
    for key, value in table.items():
        values |= by_path(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values


def fields_of(settings_object: object) -> dict[str, Any]:
    """Field values of a settings object, without those that are None."""
    cls: type = type(settings_object)
    values = {f.name: getattr(settings_object, f.name) for f in dataclasses.fields(cls)}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items() if v is not None}
