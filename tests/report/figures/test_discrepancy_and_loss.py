import pytest

from mithridate.report.detectors import detectors, looking_back
from mithridate.report.figures.discrepancy_and_loss import loss_points
from mithridate.report.rows import Row
from mithridate.report.scores import ACCUMULATIVE, CLEAN, POISONED


def test_loss_points_pair_epochs(attacked: Row) -> None:
    (family,), (losses,) = (looking_back(detectors([attacked]), name) for name in ("discrepancy", "loss"))
    points = loss_points(attacked, family, losses, ACCUMULATIVE)
    assert {epoch: pytest.approx(point) for epoch, point in points[CLEAN].items()} == {
        10: (0.2, 3.0),
        6: (0.6, 7.0),
        2: (1.0, 11.0),
    }
    assert points[POISONED][2] == pytest.approx((1.0, 23.0))
    assert list(loss_points(attacked, family, losses[:1], ACCUMULATIVE)[CLEAN]) == [10]
