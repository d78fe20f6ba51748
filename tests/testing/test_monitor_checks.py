"""The checks of monitors: a monitor that breaks one rule fails the check of that rule, and no other."""

import random
from collections.abc import Callable, Sequence
from typing import ClassVar

import pytest

from mithridate.core.watch import Reading
from mithridate.monitors.loss_amplification import LossAmplification


class DrawsFromRandom(LossAmplification):
    def alarm(self, readings: Sequence[Reading]) -> str | None:
        random.random()  # noqa: S311  (the fault)
        return super().alarm(readings)


class RemembersOnItself(LossAmplification):
    def alarm(self, readings: Sequence[Reading]) -> str | None:
        object.__setattr__(self, "alarms", getattr(self, "alarms", 0) + 1)
        return super().alarm(readings)


class CountsItsAlarms(LossAmplification):
    told: ClassVar[list[str]] = []

    def alarm(self, readings: Sequence[Reading]) -> str | None:
        text = super().alarm(readings)
        if text:
            self.told.append(text)
        return f"{text}, number {len(self.told)}" if text else None


class ShortensReadings(LossAmplification):
    def alarm(self, readings: Sequence[Reading]) -> str | None:
        text = super().alarm(readings)
        assert isinstance(readings, list)
        del readings[1:-1]
        return text


class SaysYes(LossAmplification):
    def alarm(self, readings: Sequence[Reading]) -> str | None:
        return super().alarm(readings) is not None or None  # type: ignore[return-value]  # the fault


class SaysNothingAsAText(LossAmplification):
    def alarm(self, readings: Sequence[Reading]) -> str | None:
        return super().alarm(readings) or ""


class NeedsTwoReadings(LossAmplification):
    def alarm(self, readings: Sequence[Reading]) -> str | None:
        return super().alarm(readings) if readings[1] else None


class CannotTakeNaN(LossAmplification):
    def alarm(self, readings: Sequence[Reading]) -> str | None:
        for number in (readings[-1].accuracy, readings[len(readings) // 2].loss):
            if number is not None:
                round(number)
        return super().alarm(readings)


class NeedsALoss(LossAmplification):
    def alarm(self, readings: Sequence[Reading]) -> str | None:
        assert readings[-1].batch_loss is None or readings[-1].batch_loss >= 0 or len(readings) < 3
        return super().alarm(readings) if len(readings) < 9 else f"{readings[-1].batch_loss:.2f}"


BROKEN: dict[type, set[str]] = {
    DrawsFromRandom: {"draws_from_no_global_generator"},
    RemembersOnItself: {"keeps_state_in_notes"},
    CountsItsAlarms: {"keeps_state_in_notes", "repeats"},
    ShortensReadings: {"leaves_inputs_alone"},
    SaysYes: {"says_a_text_or_nothing"},
    SaysNothingAsAText: {"says_a_text_or_nothing"},
    NeedsTwoReadings: {"runs"},
    CannotTakeNaN: {"runs"},
    NeedsALoss: {"runs"},
}


def test_what_they_are_made_of_passes(failing: Callable[..., set[str]]) -> None:
    assert failing("monitor", LossAmplification) == set()


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_who_breaks_a_rule_fails_its_check_and_no_other(cls: type, failing: Callable[..., set[str]]) -> None:
    assert failing("monitor", cls) == BROKEN[cls]
