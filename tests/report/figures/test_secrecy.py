from collections.abc import Callable
from dataclasses import replace

import pytest

from mithridate.bench.store import Run
from mithridate.report.figures.secrecy import AFTER, BEFORE, accumulative_lines, secrecy
from mithridate.report.rows import rows

Make = Callable[..., Run]


def test_points_join_lengths_and_keep_weights_apart(federated: Make) -> None:
    runs = [
        federated(
            lam=lam, label=f"lam{lam}", rounds=rounds, before=0.96 - 0.01 * rounds * lam, after=0.9 - lam * rounds
        )
        for lam in (0.05, 0.02)
        for rounds in (8, 2)
    ]
    lines = accumulative_lines(rows(runs))["none"]
    assert list(lines) == ["lam = 0.02", "lam = 0.05"]
    assert [row.mean_steps for row in lines["lam = 0.05"]] == [2, 8]
    longest = lines["lam = 0.05"][1]
    assert longest.statistic(BEFORE).mean == pytest.approx(0.956)
    assert longest.statistic(AFTER).mean == pytest.approx(0.5)


def test_other_settings_that_differ_name_the_line(federated: Make) -> None:
    runs = [federated(label=trigger, lam=0.02, trigger=trigger) for trigger in ("clean", "reversed")]
    lines = accumulative_lines(rows(runs))["none"]
    assert set(lines) == {"lam = 0.02, trigger = clean", "lam = 0.02, trigger = reversed"}


def test_runs_without_a_trigger_are_no_points(federated: Make) -> None:
    reached = federated(seed=1, lam=0.02, before=0.5)
    halted = replace(reached, summary={**reached.summary, "drop": None, "accuracy_after_trigger": None})
    ((row,),) = accumulative_lines(rows([federated(lam=0.02), halted]))["none"].values()
    assert (row.statistic(BEFORE).values, row.statistic(AFTER).values) == ((0.95,), (0.7,))
    assert secrecy(rows([halted])) is None


def test_secrecy_says_how_to_read_it(federated: Make) -> None:
    drawing = secrecy(rows([federated(lam=0.02), federated(lam=0.02, defence="wide", after=0.9)]))
    assert drawing is not None
    assert "towards the bottom right is worse" in drawing.caption
    assert "95.0 to 70.0 percent after 3 rounds" in drawing.alt
    assert drawing.png.startswith(b"\x89PNG")
