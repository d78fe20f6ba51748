"""A view grants what was declared, and nothing else; parts of a component have notes of their own."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from mithridate.core.domain import PIXELS, Domain
from mithridate.core.errors import ThreatModelError
from mithridate.core.view import Need, View

PROPERTIES: dict[Need, Callable[[View], Any]] = {
    Need.MODEL: lambda view: view.model,
    Need.VALIDATION: lambda view: view.validation,
    Need.TRIGGER: lambda view: view.clean_trigger,
    Need.ACCURACY: lambda view: view.accuracy,
    Need.TRUSTED: lambda view: view.trusted,
    Need.HISTORY: lambda view: view.history,
    Need.TRAINING: lambda view: view.training,
    Need.SURROGATE: lambda view: view.surrogate,
}


@pytest.fixture
def available() -> dict[Need, Any]:
    return {need: object() for need in Need}


@pytest.mark.parametrize("need", list(Need))
def test_a_view_shows_what_was_declared_and_nothing_else(need: Need, available: dict[Need, Any]) -> None:
    assert set(PROPERTIES) == set(Need)
    view = View(step=1, available=available, granted=frozenset({need}), owner="the attack pgd")
    assert PROPERTIES[need](view) is available[need]
    for other in set(Need) - {need}:
        with pytest.raises(ThreatModelError, match=f"the attack pgd looked at the {other}.*`needs`"):
            PROPERTIES[other](view)


@pytest.mark.parametrize("need", list(Need))
def test_a_declared_need_that_nobody_supplies_is_named(need: Need, available: dict[Need, Any]) -> None:
    del available[need]
    with pytest.raises(ThreatModelError, match=f"the defence x needs the {need}, and .* none"):
        PROPERTIES[need](View(available=available, granted=frozenset({need}), owner="the defence x"))


def test_every_view_has_notes_of_its_own() -> None:
    View().memory["a"] = torch.zeros(1)
    assert View().memory == {}


def test_a_view_is_frozen_and_of_images_unless_the_loop_says_otherwise() -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(View(), "step", 3)  # noqa: B010  (mypy would see the assignment)
    assert View().domain is PIXELS
    assert View(domain=Domain(-3.0, 3.0)).domain.low == -3.0


def test_a_part_sees_what_it_declares_and_notes_of_its_own(available: dict[Need, Any]) -> None:
    memory = {"mine": torch.zeros(()), "1.theirs": torch.ones(())}
    domain = Domain(-1.0, 2.0)
    whole = View(5, memory, available, frozenset({Need.TRUSTED}), "the chain", domain)
    with whole.inside("1.", frozenset({Need.MODEL}), "its part") as part:
        assert (part.step, part.owner, part.domain) == (5, "its part", domain)
        assert part.memory.keys() == {"theirs"}
        assert part.model is available[Need.MODEL]
        with pytest.raises(ThreatModelError, match="its part looked at the trusted set"):
            _ = part.trusted
        del part.memory["theirs"]
        part.memory["new"] = torch.ones(())
    assert memory.keys() == {"mine", "1.new"}


def test_notes_of_a_part_come_back_though_it_raises() -> None:
    memory = {"1.a": torch.zeros(())}

    def fail() -> None:
        with View(memory=memory).inside("1.", frozenset(), "a part") as part:
            part.memory["b"] = torch.ones(())
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert memory.keys() == {"1.a", "1.b"}
