import pytest

from mithridate.report.detectors import detectors, looking_back
from mithridate.report.figures.discrepancy_by_interval import interval_lines
from mithridate.report.rows import Row
from mithridate.report.scores import ACCUMULATIVE, CLEAN, OOD, POISONED


def test_discrepancy_rises_with_the_interval_as_made(attacked: Row) -> None:
    (family,) = looking_back(detectors([attacked]), "discrepancy")
    lines = interval_lines(attacked, family, ACCUMULATIVE)
    assert list(lines[CLEAN]) == [2, 6, 10]
    for k in (2, 6, 10):
        assert lines[CLEAN][k] == pytest.approx((k + 1, k, k + 2))
        assert lines[POISONED][k] == pytest.approx((2.2 * k + 1, 2.2 * k, 2.2 * k + 2))
        assert lines[OOD][k] == pytest.approx((0.5 * k + 1, 0.5 * k, 0.5 * k + 2))
