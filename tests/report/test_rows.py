# ruff: noqa: RUF001  (cells are written with a multiplication sign)

import operator
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mithridate.bench.store import Run, read_runs
from mithridate.report.rows import Row, rows
from mithridate.report.tables.results import displayed

Make = Callable[..., Run]
MakeRow = Callable[..., Row]


def test_rows_come_with_controls_first(demo_store: Path) -> None:
    cells = [row.cell.split(" ")[0] for row in rows(read_runs([demo_store]))]
    assert cells == ["clean", "noise", "vanilla", "pgd,", "accumulative"] * 2


def test_halted_cell_shows_how_many_have_a_drop(make_run: Make) -> None:
    halted = make_run(seed=1, after=None, status="halted")
    (row,) = rows([make_run(seed=0), halted])
    assert displayed(row, [row])["n"] == "1 of 2"
    (alone,) = rows([halted])
    assert [displayed(alone, [alone])[name] for name in ("after trigger (%)", "drop (points)", "n")] == [
        "—",
        "—",
        "0 of 1",
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "0.5", True])
def test_values_that_are_no_numbers_are_left_out(make_run: Make, bad: object) -> None:
    (row,) = rows([make_run(seed=0), make_run(seed=1, summary={"drop": bad})])
    assert row.statistic("drop").n == 1


def test_names_fall_back_to_the_settings(make_run: Make) -> None:
    run = make_run(label="strong")
    bare = {key: value for key, value in run.summary.items() if key not in {"attack", "defence", "dataset", "model"}}
    (row,) = rows([replace(run, summary=bare)])
    assert (row.dataset, row.model, row.attack, row.defence) == ("digits", "small_cnn", "strong", "none")
    assert row.attack_name == "accumulative"
    (unknown,) = rows([replace(run, summary={}, config={})])
    assert unknown.cell == "unknown × unknown"


def test_against_leaves_out_what_one_side_lacks(make_run: Make) -> None:
    (ours,) = rows([make_run(seed=0), make_run(seed=1, after=None)])
    (theirs,) = rows([make_run(seed=1, defence="clip"), make_run(seed=0, defence="clip", after=0.5)])
    assert ours.against(theirs, "accuracy_after_trigger", operator.sub).values == pytest.approx((0.26,))


def test_federations_of_several_lengths_are_told_apart(federated: Make) -> None:
    assert {row.attack for row in rows([federated(rounds=3), federated(rounds=8)])} == {
        "accumulative, 3 rounds",
        "accumulative, 8 rounds",
    }
    assert {row.attack for row in rows([federated(rounds=3), federated(rounds=3, seed=1)])} == {"accumulative"}
