from collections.abc import Callable
from dataclasses import replace

import pytest

from mithridate.bench.store import Run
from mithridate.report.figures.drawing import over_seeds
from mithridate.report.figures.timeline import aligned

Make = Callable[..., Run]


def test_runs_of_any_length_meet_at_the_trigger(make_run: Make) -> None:
    long, short = make_run(accuracies=(0.9, 0.8, 0.7), after=0.5), make_run(accuracies=(0.6,), after=0.4)
    assert aligned(long, "accuracy") == {-2: 0.9, -1: 0.8, 0: 0.7, 1: 0.5}
    assert aligned(short, "accuracy") == {0: 0.6, 1: 0.4}
    assert over_seeds([aligned(long, "accuracy"), aligned(short, "accuracy")])[1] == pytest.approx((0.45, 0.4, 0.5))


def test_a_halted_run_ends_before_the_trigger(make_run: Make) -> None:
    assert aligned(make_run(accuracies=(0.9, 0.8), after=None, status="halted"), "accuracy") == {-1: 0.9, 0: 0.8}


def test_what_is_not_finite_is_left_out(make_run: Make) -> None:
    run = make_run(accuracies=(0.9, 0.8), after=0.1, status="diverged")
    assert max(aligned(run, "batch_loss")) == 0
    assert aligned(replace(run, trace=[]), "accuracy") == {}
