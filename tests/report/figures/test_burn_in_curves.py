from collections.abc import Callable
from typing import Any

import pytest

from mithridate.bench.store import Run
from mithridate.report.figures import FIGURES, figure_sections
from mithridate.report.figures.burn_in_curves import burn_in_curve, burn_in_curves, burn_in_lines
from mithridate.report.rows import rows

Make = Callable[..., Run]


def trained(make_run: Make, bound: float | None, *ends: float, seed: int = 0, **burn_in: Any) -> Run:
    """A run whose burn-in had accuracy 0.5, then `ends`."""
    how = {"epochs": 12, "norm": "l2", **({} if bound is None else {"clip_norm": bound}), **burn_in}
    curve = [{"epoch": i, "accuracy": a, "loss": 1.0} for i, a in enumerate((0.5, *ends), start=1)]
    return make_run("clean", seed=seed, config={"burn_in": how}, summary={"burn_in_curve": curve})


@pytest.fixture
def make(make_run: Callable[..., Run]) -> Callable[..., Run]:
    return lambda *args, **how: trained(lambda attack, **of: make_run(attack=attack, **of), *args, **how)


def test_a_line_a_bound_wide_ones_first_and_a_mean_over_seeds(make: Make) -> None:
    runs = [make(0.1, 0.6), make(10.0, 0.8), make(None, 0.9, seed=0), make(None, 0.8, seed=1), make(1.0, 0.7)]
    lines = burn_in_lines(rows(runs))
    assert list(lines) == ["clip_norm unset", "clip_norm 10.0", "clip_norm 1.0", "clip_norm 0.1"]
    assert lines["clip_norm unset"][2] == pytest.approx((85, 80, 90))
    assert lines["clip_norm 0.1"] == {1: pytest.approx((50, 50, 50)), 2: pytest.approx((60, 60, 60))}


def test_a_burn_in_that_several_runs_share_counts_once(make: Make) -> None:
    shared = [make(1.0, 0.9, seed=0)] * 5
    lines = burn_in_lines(rows([*shared, make(1.0, 0.6, seed=1), make(None, 0.9)]))
    assert lines["clip_norm 1.0"][2][0] == pytest.approx(75)


def test_norms_are_named_where_they_differ_and_what_changes_no_weight_never(make: Make) -> None:
    runs = [make(1.0, 0.9, evaluate_every=1), make(1.0, 0.8, norm="linf", evaluate_every=2)]
    unbounded = [make(None, 0.9, seed=seed, norm=norm) for seed, norm in enumerate(("l2", "linf"))]
    lines = burn_in_lines(rows([*runs, *unbounded]))
    assert set(lines) == {"norm l2, clip_norm 1.0", "norm linf, clip_norm 1.0", "clip_norm unset"}


def test_it_is_drawn_of_two_ways_at_least_and_says_where_they_end(make: Make, make_run: Make) -> None:
    drawing = burn_in_curves(rows([make(None, 0.7, 0.9), make(0.1, 0.55, 0.6), make_run()]))
    assert drawing is not None
    assert drawing.subject == "small_cnn on digits"
    assert "clip_norm unset: 90.0 percent after epoch 3." in drawing.alt
    assert "clip_norm 0.1: 60.0 percent after epoch 3." in drawing.alt
    assert burn_in_curves(rows([make(None, 0.9), make_run()])) is None


def test_epochs_that_gave_no_finite_number_are_left_out(make_run: Make) -> None:
    curve = [{"epoch": 1, "accuracy": None, "loss": None}, {"epoch": 2, "accuracy": 0.4, "loss": 1.0}]
    assert burn_in_curve(make_run(summary={"burn_in_curve": curve})) == {2: pytest.approx(40)}
    assert burn_in_curve(make_run(summary={"burn_in_curve": None})) == {}


def test_a_report_has_it_once_however_many_data_sets_its_rows_are_of(make: Make) -> None:
    found = rows([make(None, 0.9), make(0.1, 0.6), make(1.0, 0.8)])
    assert len({row.group for row in found}) == 3
    others = set(FIGURES) - {"burn_in_curves"}
    (section,) = (section for section in figure_sections(found, left_out=others) if section.id == "burn-in")
    assert len(section.drawings) == 1
    assert all(section.empty for section in figure_sections(found, left_out=set(FIGURES)))
