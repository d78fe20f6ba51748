from collections.abc import Callable

import pytest

from mithridate.bench.store import Run
from mithridate.report.figures.clean_stream_accuracy import clean_lines, clean_stream_accuracy
from mithridate.report.rows import Row, rows

Make = Callable[..., Run]


def test_clean_stream_has_a_line_a_defence(scored_rows: list[Row], make_run: Make) -> None:
    lines = clean_lines([*scored_rows, *rows([make_run(attack="clean", label="short", accuracies=(0.98,), after=0.1)])])
    assert list(lines) == ["none", "clip"]
    assert {step: band[0] for step, band in lines["none"].items()} == pytest.approx(
        {0: 0.98, 1: 0.97, 2: 0.96, 3: 0.96, 4: 0.97}
    )
    assert clean_stream_accuracy(rows([make_run(attack="clean")])) is None
    unscored = rows([make_run(attack="clean", defence=defence) for defence in ("none", "clip")])
    assert clean_stream_accuracy(unscored) is not None
