"""What holds for settings of every kind, on the smallest kind: who breaks a rule fails its check, and no other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from pydantic import Field

from mithridate.core.registry import settings
from mithridate.core.watch import Monitor, Reading
from mithridate.testing import check_component


class Quiet(Monitor):
    def alarm(self, readings: Sequence[Reading]) -> str | None:
        return None


@settings
class Good(Quiet):
    """Never says anything.

    Args:
        floor: Of nothing, >= 0.

    Source:
        These tests.
    """

    floor: Annotated[float, Field(ge=0)] = 0.0


@settings
class Derived(Good):
    """Says what it adds, and no more.

    Args:
        more: Of nothing.

    Source:
        These tests.
    """

    more: bool = False


@settings
class HasNoDefault(Quiet):
    """Cannot be made without arguments.

    Args:
        floor: Of nothing.

    Source:
        These tests.
    """

    floor: float


@dataclass(kw_only=True)
class CanBeChanged(Quiet):
    """Is not frozen.

    Args:
        floor: Of nothing.

    Source:
        These tests.
    """

    floor: float = 0.0

    def __hash__(self) -> int:
        return hash(self.floor)


@dataclass(frozen=True)
class TakesPositions(Quiet):
    """Takes values by position.

    Args:
        floor: Of nothing.

    Source:
        These tests.
    """

    floor: float = 0.0


class IsNoDataclass(Quiet):
    """Has no fields.

    Source:
        These tests.
    """


@settings
class ChangesItsTable(Good):
    """Comes back from its table as something else.

    Source:
        These tests.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "floor", self.floor + 1)


@settings
class HasNoHash(Good):
    """Equal ones have other hashes.

    Source:
        These tests.
    """

    def __hash__(self) -> int:
        return id(self)


@settings
class CannotBeWritten(Good):
    """Has a field that no recipe can hold.

    Args:
        parts: Whatever.

    Source:
        These tests.
    """

    parts: Any = frozenset({1})


@settings
class SaysNothingOfAField(Good):
    """Has a field without a word.

    Source:
        These tests.
    """

    more: bool = False


@settings
class NamesNoSource(Good):
    """Comes from nowhere."""


class HasNoFirstLine(Good):
    """

    Source:
        These tests.
    """


BROKEN: dict[type, set[str]] = {
    CanBeChanged: {"defaults"},
    TakesPositions: {"defaults"},
    ChangesItsTable: {"round_trip"},
    HasNoHash: {"round_trip"},
    SaysNothingOfAField: {"described"},
    NamesNoSource: {"described"},
    HasNoFirstLine: {"described"},
}


@pytest.mark.parametrize("cls", [Good, Derived])
def test_what_they_are_made_of_passes(cls: type, failing: Callable[..., set[str]]) -> None:
    assert failing("monitor", cls) == set()


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_who_breaks_a_rule_fails_its_check_and_no_other(cls: type, failing: Callable[..., set[str]]) -> None:
    assert failing("monitor", cls) == BROKEN[cls]


@pytest.mark.parametrize(
    ("cls", "told"),
    [
        (HasNoDefault, "check_defaults: HasNoDefault cannot be made without arguments"),
        (IsNoDataclass, "check_defaults: IsNoDataclass is no dataclass"),
        (CannotBeWritten, "check_round_trip: TypeError"),
    ],
)
def test_what_no_check_can_work_with_is_told_all_the_same(cls: type, told: str) -> None:
    with pytest.raises(AssertionError, match=told):
        check_component(cls)
