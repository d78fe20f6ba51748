"""A clean stream beside every result: its range, its own falls, and what they make of a drop."""

from collections.abc import Callable, Sequence

import pytest

from mithridate.bench.store import Run
from mithridate.report.doubts import examine
from mithridate.report.findings import findings
from mithridate.report.rows import Row, rows
from mithridate.report.steadiness import clean_stream, quiet_limit
from mithridate.report.tables.results import displayed

MakeRun = Callable[..., Run]

STEADY = ((0.90, 0.91, 0.905, 0.90), (0.92, 0.92, 0.915, 0.92))
SHAKY = ((0.90, 0.93, 0.83, 0.90), (0.92, 0.80, 0.91, 0.92))
"""Clean accuracies of two seeds; the last one is the trigger step's, a clean batch more."""


def made(make_run: MakeRun, clean: Sequence[Sequence[float]], defence: str = "none") -> list[Row]:
    runs = [
        make_run(attack="clean", seed=s, accuracies=tuple(c[:-1]), after=c[-1], defence=defence)
        for s, c in enumerate(clean)
    ]
    runs += [make_run(attack="noise", seed=s, accuracies=(0.91, 0.91), after=0.91, eps=0.2) for s in range(2)]
    return rows([*runs, *(make_run(seed=s, accuracies=(0.91, 0.9, 0.89), after=0.80) for s in range(2))])


def attacked(of: Sequence[Row]) -> Row:
    (row,) = [row for row in of if row.claims_drop]
    return row


def doubts(of: Sequence[Row], title: str) -> list[str]:
    (answer,) = [answer for answer in examine(of) if answer.title == title]
    return [f"{doubt.severity.value}: {doubt.text}" for doubt in answer.doubts]


def test_the_range_and_the_falls_are_those_of_every_seed_and_step(make_run: MakeRun) -> None:
    of = made(make_run, SHAKY)
    clean = clean_stream(attacked(of), of)
    assert clean is not None
    assert (clean.low, clean.high) == (0.80, 0.93)
    assert clean.loss == pytest.approx((0.07 + 0.12) / 2)
    assert clean.as_far(0.10 - 1e-9) == (2, 6)
    shown = displayed(attacked(of), of)
    assert (shown["clean stream (%)"], shown["clean steps as bad"]) == ("80.0 to 93.0", "2 of 6 (33 %)")
    assert shown["mean along (%)"] == "86.3 ± 0.0"


def test_a_steady_stream_excuses_no_phase_and_takes_no_drop_away(make_run: MakeRun) -> None:
    of = made(make_run, STEADY)
    assert quiet_limit(attacked(of), of)[0] == pytest.approx(0.01)
    assert displayed(attacked(of), of)["clean steps as bad"] == "0 of 6 (0 %)"
    assert not doubts(of, "A clean stream does it too")
    assert "a clean stream loses up to 0.3 by itself" in doubts(of, "Lost before the trigger")[0]
    assert "quiet phase" not in findings(of)[0].headline


def test_a_shaky_stream_does_by_itself_what_the_trigger_does(make_run: MakeRun) -> None:
    of = made(make_run, SHAKY)
    (doubt,) = doubts(of, "A clean stream does it too")
    assert doubt.startswith("serious: 2 of 6 steps of a clean stream cost 9.0 points or more")
    assert not doubts(of, "Lost before the trigger")  # two points are within what the stream loses by itself
    assert "quiet phase" in findings(of)[0].headline


def test_a_clean_stream_under_another_defence_says_nothing(make_run: MakeRun) -> None:
    of = made(make_run, SHAKY, defence="clip")
    assert clean_stream(attacked(of), of) is None
    assert quiet_limit(attacked(of), of)[0] == pytest.approx(0.05)
    assert displayed(attacked(of), of)["clean steps as bad"] == "—"
