"""Trackers cannot stop a training: what one of them raises is said once, and the others hear of every step."""

import logging

import pytest

from mithridate.guard.record import StepRecord
from mithridate.guard.trackers import Trackers

STEP = StepRecord(attempt=1, step=0, verdict="admitted", seconds=0.01)


class Listener:
    def __init__(self) -> None:
        self.heard: list[StepRecord] = []
        self.closed = 0

    def note(self, record: StepRecord) -> None:
        self.heard.append(record)

    def close(self) -> None:
        self.closed += 1


class Broken:
    def note(self, record: StepRecord) -> None:
        raise ConnectionError("the server\nis gone.")

    def close(self) -> None:
        raise RuntimeError("still gone")


def test_one_that_raises_is_named_once_and_the_others_hear_everything(caplog: pytest.LogCaptureFixture) -> None:
    before, after = Listener(), Listener()
    trackers = Trackers([before, Broken(), after])
    with caplog.at_level(logging.WARNING, "mithridate"):
        for _ in range(3):
            trackers.note(STEP)
        trackers.close()
    assert before.heard == after.heard == [STEP] * 3
    assert (before.closed, after.closed) == (1, 1)
    (message,) = caplog.messages
    assert "Broken raised ConnectionError: the server is gone; training goes on" in message


def test_what_a_person_does_is_not_swallowed() -> None:
    class Interrupted(Listener):
        def note(self, record: StepRecord) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trackers([Interrupted()]).note(STEP)
