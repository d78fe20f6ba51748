import statistics

import pytest

from mithridate.report.statistic import Statistic


def test_statistic_counts_what_is_there() -> None:
    assert (Statistic(()).mean, Statistic(()).std, Statistic(()).n) == (None, None, 0)
    assert (Statistic((0.25,)).mean, Statistic((0.25,)).std) == (0.25, None)
    values = (0.1, 0.4, 0.35)
    assert Statistic(values).mean == pytest.approx(statistics.mean(values))
    assert Statistic(values).std == pytest.approx(statistics.stdev(values))
