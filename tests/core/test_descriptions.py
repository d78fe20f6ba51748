"""What fields are is said once, and found through the classes that a component derives from."""

from dataclasses import dataclass, is_dataclass

import pytest

from mithridate.core.descriptions import described_fields
from mithridate.core.registry import KINDS, Kind, entries


@dataclass
class Base:
    """Has a radius.

    Args:
        eps: Radius of the ball, in pixel
            units: 8/255, say.
        steps: How many.

    Shape:
        eps: is no field here.
    """

    eps: float = 0.1
    steps: int = 3


@dataclass
class Derived(Base):
    """Says more of one field, and forgets its own.

    A line in the middle: with a colon.

    Args:
        steps: How many; 0 returns the start.

    Source:
        Nobody: ever.
    """

    forgotten: bool = False


@dataclass
class Silent(Derived):
    """Has nothing to add."""

    loud: bool = False


def test_the_nearest_class_speaks_and_each_field_has_one_paragraph() -> None:
    assert described_fields(Base) == {"eps": "Radius of the ball, in pixel units: 8/255, say.", "steps": "How many."}
    assert described_fields(Derived) == {
        "eps": "Radius of the ball, in pixel units: 8/255, say.",
        "steps": "How many; 0 returns the start.",
    }


def test_a_class_that_says_nothing_inherits_and_what_nobody_describes_is_left_out() -> None:
    assert described_fields(Silent) == described_fields(Derived)


def test_a_class_without_a_docstring_of_its_own_is_no_obstacle() -> None:
    @dataclass
    class Bare(Base):
        more: int = 0

    assert list(described_fields(Bare)) == ["eps", "steps"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_component_says_again_what_its_base_says(kind: Kind) -> None:
    for entry in entries(kind).values():
        said = " ".join((entry.cls.__doc__ or "").split())
        for base in entry.cls.__mro__[1:]:
            if is_dataclass(base):
                again = [name for name, text in described_fields(base).items() if f" {name}: {text}" in said]
                assert not again, f"{entry.cls.__name__} repeats what {base.__name__} says of {again}"
