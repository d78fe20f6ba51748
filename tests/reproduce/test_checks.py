"""Claims: when runs bear them out, when they do not, and when they cannot tell."""

import math
from typing import Any

import pytest
from scipy import stats

from mithridate.core.errors import ConfigError
from mithridate.reproduce.checks import Check, Interval, Ruling
from tests.reproduce.made import run_of

NONE = {"defence": "none", "measure": "after"}
CLIP = {"defence": "clip", "measure": "after"}
AT = {"defence": "at", "measure": "after"}


def runs(**afters: list[float]) -> list[Any]:
    """Runs by defence, a seed each; percent."""
    return [run_of(s, value / 100, defence=d) for d, values in afters.items() for s, value in enumerate(values)]


CLEAR = runs(none=[60, 61, 62], clip=[70, 71.5, 72], at=[80, 81, 82.5])
NOISY = runs(none=[60, 61, 62], clip=[50, 90, 62], at=[61, 61, 62])
ONE = runs(none=[60], clip=[90], at=[95])


@pytest.mark.parametrize(
    ("check", "outcomes"),
    [
        ({"greater": [CLIP, NONE]}, ("holds", "not decided", "not decided")),
        ({"greater": [NONE, CLIP]}, ("does not hold", "not decided", "not decided")),
        ({"greater": [CLIP, NONE], "by": 20}, ("does not hold", "not decided", "not decided")),
        ({"increasing": [NONE, CLIP, AT]}, ("holds", "not decided", "not decided")),
        ({"increasing": [NONE, AT, CLIP]}, ("does not hold", "not decided", "not decided")),
        ({"ratio": [CLIP, NONE], "at_least": 1.1}, ("holds", "not decided", "not decided")),
        ({"ratio": [CLIP, NONE], "at_most": 1.1}, ("does not hold", "not decided", "not decided")),
        ({"within": NONE, "low": 50, "high": 70}, ("holds", "holds", "not decided")),
        ({"within": NONE, "high": 50}, ("does not hold", "does not hold", "not decided")),
        ({"close": [NONE, AT], "by": 3}, ("does not hold", "holds", "not decided")),
    ],
)
def test_a_claim_is_judged_by_its_whole_interval(check: dict[str, Any], outcomes: tuple[str, ...]) -> None:
    made = Check.of({"says": "so", **check}, where="here")
    assert tuple(made.verdict(of).outcome.value for of in (CLEAR, NOISY, ONE)) == outcomes
    assert made.verdict(runs(some=[1.0])).outcome is Ruling.ABSENT
    assert made.verdict([]).n == 0


@pytest.mark.parametrize(
    ("ends", "outcome"),
    [({}, "does not hold"), ({"by": 0}, "holds"), ({"by": 0.1}, "does not hold"), ({"by": -0.1}, "holds")],
)
def test_what_is_the_same_is_as_high_and_not_higher(ends: dict[str, float], outcome: str) -> None:
    same = runs(none=[60, 61, 62], clip=[60, 61, 62])
    for pair in ({"greater": [CLIP, NONE]}, {"increasing": [NONE, CLIP]}):
        assert Check.of({"says": "so", **pair, **ends}, where="").verdict(same).outcome.value == outcome


def test_the_interval_is_students() -> None:
    values = [1.0, 2.0, 4.0, 4.5]
    interval = Interval.of(values)
    low, high = stats.t.interval(0.95, 3, loc=interval.mean, scale=stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx((low, high))
    assert Interval.of([3.0]).low == -math.inf


def test_seeds_are_compared_with_themselves() -> None:
    """Ten points between seeds, one between defences: paired, the small difference shows."""
    found = Check.of({"says": "so", "greater": [CLIP, NONE]}, where="").verdict(
        runs(none=[50, 60, 70], clip=[51.1, 61, 70.9])
    )
    assert (found.outcome, found.n) == (Ruling.HOLDS, 3)
    assert found.intervals[0] is not None
    assert found.intervals[0].mean == pytest.approx(1.0)


def test_equal_numbers_are_not_more() -> None:
    same = runs(none=[60, 60], clip=[60, 60])
    assert Check.of({"says": "so", "greater": [CLIP, NONE]}, where="").verdict(same).outcome is Ruling.FAILS


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({"says": "so"}, "give one of"),
        ({"greater": [CLIP, NONE]}, "needs says"),
        ({"says": "so", "greater": [CLIP, NONE], "within": NONE}, "give one of"),
        ({"says": "so", "greater": [CLIP]}, "compares 2"),
        ({"says": "so", "greater": [CLIP, NONE], "bye": 3}, "'bye'.*by"),
        ({"says": "so", "greater": [CLIP, NONE], "by": "3"}, "give a number"),
        ({"says": "so", "close": [CLIP, NONE]}, "needs by"),
        ({"says": "so", "greater": [CLIP, {"defence": "none"}]}, "needs a measure"),
        ({"says": "so", "within": 3}, "give tables"),
    ],
)
def test_a_check_that_says_nothing_is_refused(check: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Check.of(check, where="here")
