from typing import Any

import numpy as np
import pytest

from mithridate.report.roc import curve


def array(*values: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array(values, dtype=np.float64)


@pytest.mark.parametrize(
    ("clean", "poisoned", "expected"),
    [
        ([1, 2, 3], [-1, 0], 1.0),
        ([1, 2, 3], [4, 5], 0.0),
        ([1, 2], [1, 2], 0.5),
        ([7, 7, 7], [7, 7], 0.5),
        ([0, 2], [1], 0.5),
        ([1, 2, 3, 4], [2, 0], (2.5 / 4 + 1) / 2),
        ([0.0, 1.0], [-np.inf], 1.0),
        ([-np.inf, 1.0], [-np.inf], 0.75),
        ([0.0, np.inf], [np.inf], 0.25),
    ],
)
def test_auroc_counts_pairs(clean: list[float], poisoned: list[float], expected: float) -> None:
    pairs = [1.0 if p < c else 0.5 if p == c else 0.0 for p in poisoned for c in clean]
    found = curve(array(*clean), array(*poisoned))
    assert found is not None
    assert found.auroc == pytest.approx(np.mean(pairs))
    assert found.auroc == pytest.approx(expected)


def test_there_is_no_rate_without_both_kinds() -> None:
    assert curve(array(), array(1)) is None
    assert curve(array(1), array()) is None


def test_true_positives_at_a_rate_of_false_ones_by_hand() -> None:
    clean = np.arange(100, dtype=np.float64)
    found = curve(clean, array(-1, 0.5, 0.5, 3.5, 4.5, 50))
    assert found is not None
    assert found.detected(0.01) == pytest.approx(3 / 6)  # threshold below 1: flags clean sample 0 alone
    assert found.detected(0.05) == pytest.approx(5 / 6)  # flags 0 to 4, and a poisoned 4.5 below the sixth


def test_ties_at_the_threshold_are_flagged_together_or_not_at_all() -> None:
    clean = np.concatenate([np.zeros(2), np.ones(98)])
    found = curve(clean, array(0, 0, -1, 5))
    assert found is not None
    assert found.detected(0.01) == 0.25  # at 0 two clean samples would go with it: 2 %
    assert found.detected(0.02) == 0.75


def test_few_samples_resolve_no_small_rate() -> None:
    fifty, twenty = curve(np.arange(50.0), array(-1)), curve(np.arange(20.0), array(-1))
    assert fifty is not None
    assert twenty is not None
    assert (fifty.detected(0.01), fifty.detected(0.05)) == (None, 1.0)
    assert twenty.detected(0.05) == 1.0


def test_rates_agree_with_a_plain_count() -> None:
    rng = np.random.default_rng(0)
    clean, poisoned = rng.integers(0, 60, 300).astype(np.float64), rng.integers(-10, 50, 200).astype(np.float64)
    found = curve(clean, poisoned)
    assert found is not None
    for rate in (0.01, 0.05):
        thresholds = [t for t in np.unique([*clean, *poisoned]) if np.mean(clean <= t) <= rate]
        assert found.detected(rate) == pytest.approx(max((np.mean(poisoned <= t) for t in thresholds), default=0))
