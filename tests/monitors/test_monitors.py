"""Monitors: each rule alarms when it should and is quiet when it should be."""

import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np
import pytest

from mithridate.core.errors import ConfigError
from mithridate.core.registry import build
from mithridate.core.watch import Monitor, Reading
from mithridate.monitors.accuracy_floor import AccuracyFloor
from mithridate.monitors.loss_amplification import LossAmplification


def of_accuracy(*accuracies: float) -> list[Reading]:
    return [Reading(i, a, 0.1, math.nan if i == 0 else 0.1) for i, a in enumerate(accuracies)]


def of_loss(*losses: float) -> list[Reading]:
    """The state before the stream has no batch."""
    return [Reading(i, 0.9, 0.1, loss) for i, loss in enumerate((math.nan, *losses))]


def alarms(monitor: Monitor, readings: Sequence[Reading]) -> list[bool]:
    """At which readings it rings."""
    return [monitor.alarm(readings[: i + 1]) is not None for i in range(len(readings))]


@pytest.mark.parametrize(
    ("monitor", "expected"),
    [
        (AccuracyFloor(), [False] * 5),
        (AccuracyFloor(floor=0.8), [False, False, True, True, False]),
        (AccuracyFloor(max_drop=0.05), [False, False, True, True, False]),
        (AccuracyFloor(max_drop=0.15), [False, False, False, True, False]),
        (AccuracyFloor(floor=0.75, max_drop=0.5), [False, False, False, True, False]),
        (AccuracyFloor(floor=0.1, max_drop=0.15), [False, False, False, True, False]),
        (AccuracyFloor(floor=0.9), [True] * 4 + [False]),
    ],
    ids=repr,
)
def test_accuracy_against_the_floor_and_the_start(monitor: Monitor, expected: list[bool]) -> None:
    assert alarms(monitor, of_accuracy(0.875, 0.9 - 0.05, 0.78, 0.7, 0.95)) == expected


def test_just_at_the_limit_there_is_no_alarm() -> None:
    assert alarms(AccuracyFloor(floor=0.5), of_accuracy(0.75, 0.5)) == [False, False]
    assert alarms(AccuracyFloor(max_drop=0.25), of_accuracy(0.75, 0.5)) == [False, False]
    assert alarms(AccuracyFloor(max_drop=0.0), of_accuracy(0.75, 0.75, 0.74, 0.8)) == [False, False, True, False]


def test_where_nothing_was_measured_there_is_no_alarm_of_accuracy() -> None:
    bad = Reading(2, 0.1, 9.0, 0.3)
    readings = [*of_accuracy(0.9, 0.85), Reading(2, None, None, 0.3)]
    for monitor in (AccuracyFloor(floor=0.8), AccuracyFloor(max_drop=0.1)):
        assert monitor.alarm(readings) is None
        assert monitor.alarm([*readings[:2], bad]) is not None


def test_what_the_accuracy_alarm_says() -> None:
    readings = of_accuracy(0.9, 0.65)
    assert AccuracyFloor(floor=0.8).alarm(readings) == "accuracy 65.0% below the floor of 80.0%"
    assert AccuracyFloor(max_drop=0.1).alarm(readings) == "accuracy 65.0%, 25.0 points below the start"


def test_loss_against_the_first_batch() -> None:
    monitor = LossAmplification(factor=2, slack=0)
    assert alarms(monitor, of_loss(0.5, 0.9, 1.0, 1.1, 0.4, 5.0)) == [False, False, False, False, True, False, True]


def test_slack_forgives_trifles() -> None:
    losses = of_loss(0.001, 0.1, 0.6)
    assert alarms(LossAmplification(factor=2, slack=0.5), losses) == [False, False, False, True]
    assert alarms(LossAmplification(factor=2, slack=0.0), losses) == [False, False, True, True]


def test_loss_against_the_median_of_a_window() -> None:
    losses = of_loss(0.1, 1.0, 1.0, 1.9, 2.1, 1.0, 4.1, 3.0)
    # Against the first: 0.1. Against the medians of the last three: 0.1, 0.55, 1.0, 1.0, 1.9, 1.9, 2.1.
    assert alarms(LossAmplification(factor=2, slack=0, window=3), losses) == [
        False,
        False,
        True,  # 1.0 > 2 * 0.1
        False,  # 1.0 <= 2 * 0.55
        False,  # 1.9 <= 2 * 1.0
        True,  # 2.1 > 2 * 1.0
        False,
        True,  # 4.1 > 2 * 1.9
        False,
    ]
    assert alarms(LossAmplification(factor=2, slack=0), losses) == [False, False] + [True] * 7


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_alarms_even_at_the_first_batch(value: float) -> None:
    monitor = LossAmplification()
    assert alarms(monitor, of_loss(value)) == [False, True]
    assert alarms(monitor, of_loss(0.5, value)) == [False, False, True]
    assert monitor.alarm(of_loss(value)) == "training loss is not finite"


def test_the_state_before_the_stream_is_no_batch() -> None:
    assert LossAmplification().alarm(of_loss()) is None
    assert LossAmplification(factor=2, slack=0).alarm([Reading(0, 0.9, 0.1, 99.0), Reading(1, 0.9, 0.1, 0.5)]) is None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "accuracy_floor", "floor": 1.5}, "floor = 1.5"),
        ({"name": "accuracy_floor", "max_drop": -0.1}, "max_drop = -0.1"),
        ({"name": "loss_amplification", "factor": 1.0}, "factor = 1.0"),
        ({"name": "loss_amplification", "slack": -1}, "slack = -1"),
        ({"name": "loss_amplification", "window": 0}, "window = 0"),
    ],
)
def test_settings_out_of_range_are_named(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("monitor", table)


class Counted(list[Reading]):
    """Counts how many readings are looked at one after the other."""

    looked_at = 0

    def __iter__(self) -> Iterator[Reading]:
        return self._each(super().__iter__())

    def __reversed__(self) -> Iterator[Reading]:
        return self._each(super().__reversed__())

    def _each(self, readings: Iterator[Reading]) -> Iterator[Reading]:
        for reading in readings:
            self.looked_at += 1
            yield reading


@pytest.mark.parametrize("window", [None, 1, 3], ids=str)
def test_the_loss_alarm_looks_at_no_more_readings_in_a_long_run_than_in_a_short_one(window: int | None) -> None:
    monitor = LossAmplification(window=window)
    counts = []
    for length in (10, 1000):
        readings = Counted(of_loss(*[0.1] * length))
        assert monitor.alarm(readings) is None
        counts.append(readings.looked_at)
    assert counts[0] == counts[1] <= (window or 0) + 2


@pytest.mark.parametrize("window", [None, 1, 4], ids=str)
def test_the_usual_loss_is_that_of_the_batches_which_count(window: int | None) -> None:
    losses_of = np.random.default_rng(0).exponential(size=60).tolist()
    readings = [Reading(i, 0.9, 0.1, None if i % 5 == 2 else math.nan if i == 0 else losses_of[i]) for i in range(60)]
    monitor = LossAmplification(factor=1.5, slack=0.0, window=window)
    rang = []
    for end in range(1, 61):
        losses = [r.batch_loss for r in readings[1:end] if r.batch_loss is not None]
        expected = False
        if readings[end - 1].batch_loss is not None and len(losses) > 1:
            before = losses[:-1]
            expected = losses[-1] > 1.5 * (median(before[-window:]) if window else before[0])
        rang.append(monitor.alarm(readings[:end]) is not None)
        assert rang[-1] == expected
    assert 0 < sum(rang) < 60
