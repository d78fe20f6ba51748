from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mithridate.bench.store import Run
from mithridate.report.detectors import detectors
from mithridate.report.figures.budgets import budget_lines, variants
from mithridate.report.rows import Row, rows
from mithridate.report.scores import CLEAN, POISONED

Make = Callable[..., Run]


def test_budgets_of_an_attack_make_one_line(scored_rows: list[Row]) -> None:
    found = variants(scored_rows)
    assert {name: list(by_eps) for name, by_eps in found.items()} == {"vanilla": [0.1, 0.2], "accumulative": [0.1, 0.2]}
    assert {row.defence for by_eps in found.values() for row in by_eps.values()} == {"none"}
    info = next(info for info in detectors(scored_rows) if info.label == "d2")
    lines = budget_lines(found["vanilla"], info)
    assert lines[POISONED][0.1] == pytest.approx((22, 21, 23))
    assert lines[POISONED][0.2] == pytest.approx((23, 22, 24))
    assert lines[CLEAN][0.1] == lines[CLEAN][0.2] == pytest.approx((11, 10, 12))


def test_attacks_that_differ_in_more_than_eps_are_told_apart(make_run: Make, scored: Callable[..., Run]) -> None:
    def made(eps: float, **settings: Any) -> Run:
        run = scored(make_run(label=f"a-{eps}-{len(settings)}-{settings.get('lam')}", eps=eps))
        return replace(run, config={**run.config, "attack": {**run.config["attack"], **settings}})

    scaled = variants(rows([made(0.1, step_size=0.02), made(0.2, step_size=0.04)]))
    assert [list(by_eps) for by_eps in scaled.values()] == [[0.1, 0.2]]
    apart = variants(rows([made(0.1, lam=1.0), made(0.2, lam=1.0), made(0.2, lam=0.5)]))
    assert {name: list(by_eps) for name, by_eps in apart.items()} == {
        "accumulative (lam 1.0)": [0.1, 0.2],
        "accumulative (lam 0.5)": [0.2],
    }
