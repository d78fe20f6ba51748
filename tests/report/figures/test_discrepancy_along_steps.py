import pytest

from mithridate.report.detectors import detectors
from mithridate.report.figures.discrepancy_along_steps import step_lines
from mithridate.report.figures.scored import STREAM
from mithridate.report.figures.timeline import AFTER
from mithridate.report.rows import Row
from mithridate.report.scores import CLEAN, POISONED


def test_steps_meet_at_the_trigger(scored_rows: list[Row], attacked: Row, quiet: Row) -> None:
    info = next(info for info in detectors(scored_rows) if info.label == "d6")
    lines = step_lines(attacked, quiet, info)
    assert list(lines[POISONED]) == list(lines[STREAM]) == [-2, -1, 0, AFTER]
    assert lines[POISONED][AFTER] == pytest.approx((14.2, 13.2, 15.2))
    assert lines[CLEAN][0] == lines[STREAM][0] == pytest.approx((7, 6, 8))
    assert STREAM not in step_lines(attacked, None, info)
