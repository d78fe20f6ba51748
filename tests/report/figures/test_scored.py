from mithridate.report.detectors import detectors
from mithridate.report.figures.scored import quantity
from mithridate.report.rows import Row


def test_axes_say_what_is_drawn(scored_rows: list[Row]) -> None:
    found = {info.label: quantity(info) for info in detectors(scored_rows)}
    assert found["d2"] == "discrepancy to epoch 2 (nats)"
    assert found["l6"] == "rise of loss since epoch 6 (nats)"
    assert (found["loss"], found["gda"]) == ("loss (nats)", "score")
