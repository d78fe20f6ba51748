from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from mithridate.bench.store import Run
from mithridate.report.detectors import detectors, looking_back
from mithridate.report.figures.answers_moved import answers_moved, moved_lines
from mithridate.report.rows import rows
from mithridate.report.scores import ACCUMULATIVE, CLEAN, MOVED_NOW, MOVED_THEN, POISONED, mean_moved

TABLES = [{"name": "discrepancy", "label": f"d{epoch}", "epoch": epoch, "moved_answers": True} for epoch in (4, 8)]


def runs(make_run: Callable[..., Run], with_scores: Callable[..., Run], *, moved: bool = True) -> list[Run]:
    """Three seeds: poisoning moves the answers by 3 now and 1 then, epoch 4 lies 2 away from now, epoch 8 lies 1."""
    made = []
    for seed in range(3):
        said = {}
        for label, away in (("d4", 2.0), ("d8", 1.0)):
            kinds = {CLEAN: [-away - seed], POISONED: [-2 * away - seed]}
            distances = {MOVED_NOW: [3.0 + seed], MOVED_THEN: [1.0 + away + seed]} if moved else {}
            said[label] = {1: kinds | distances}
        run = with_scores(make_run(seed=seed, after=0.5), said, TABLES)
        of_poison = np.isin(run.scores["source"], ["received", MOVED_NOW, MOVED_THEN])
        config = {**run.config, "burn_in": {"epochs": 12, "checkpoints": [4, 8]}}
        made.append(replace(run, config=config, scores={**run.scores, "poisoned": of_poison}))
    return made


def test_each_line_is_the_mean_of_its_kind_by_interval(
    make_run: Callable[..., Run], with_scores: Callable[..., Run]
) -> None:
    (row,) = rows(runs(make_run, with_scores))
    (family,) = looking_back(detectors([row]), "discrepancy")
    lines = moved_lines(row, family, ACCUMULATIVE)
    assert {kind: {k: band[0] for k, band in line.items()} for kind, line in lines.items()} == {
        MOVED_NOW: {4: pytest.approx(4), 8: pytest.approx(4)},
        MOVED_THEN: {4: pytest.approx(3), 8: pytest.approx(4)},
        CLEAN: {4: pytest.approx(2), 8: pytest.approx(3)},
        POISONED: {4: pytest.approx(3), 8: pytest.approx(5)},
    }
    assert lines[MOVED_NOW][4][1:] == (3, 5)


def test_it_is_drawn_only_where_it_was_measured(make_run: Callable[..., Run], with_scores: Callable[..., Run]) -> None:
    drawing = answers_moved(rows(runs(make_run, with_scores)))
    assert drawing is not None
    assert "model then (\u03b1\u2032): 4 at k 8" not in drawing.alt
    assert "model now (\u03b1): 4 at k 4, 4 at k 8." in drawing.alt
    assert drawing.png[:4] == b"\x89PNG"
    without = runs(make_run, with_scores, moved=False)
    assert answers_moved(rows(without)) is None
    assert mean_moved(without[0], "d4", MOVED_NOW) is None
