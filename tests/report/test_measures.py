import csv
import io
import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest

from mithridate.bench.store import Run
from mithridate.report.measures import QUANTITIES, Measures, measure_records, measures
from mithridate.report.records import to_csv
from mithridate.report.rows import Row, rows
from mithridate.report.tables.defences import defence_tables

Make = Callable[..., Run]
MakeRow = Callable[..., Row]


def of(measured: list[Measures], attack: str, defence: str) -> Measures:
    (one,) = [m for m in measured if (m.row.attack, m.row.defence) == (attack, defence)]
    return one


def test_what_is_measured_and_in_which_order(defended_rows: list[Row]) -> None:
    assert [(m.row.attack, m.row.defence) for m in measures(defended_rows)] == [
        ("clean-trigger", "none"),
        ("clean-trigger", "dsc"),
        ("clean-trigger", "gate"),
        ("accumulative", "none"),
        ("accumulative", "dsc"),
        ("accumulative", "gate"),
    ]


def test_nothing_is_measured_without_a_defence(make_row: MakeRow) -> None:
    assert measures([make_row(0.2), make_row(0.0, attack="clean")]) == []
    assert measures([]) == []
    assert len(measures([make_row(0.2, defence="clip")])) == 1
    assert len(measures([make_row(0.2), make_row(0.2, defence_label="none again")])) == 2


def test_a_clean_stream_without_a_phase_is_no_clean_oracle(make_row: MakeRow) -> None:
    short = make_row(0.0, attack="clean", accuracies=(0.98,), defence="clip")
    assert [m.row for m in measures([short, make_row(0.1, defence="clip")])] != [short]
    assert all(m.row.attacking for m in measures([short, make_row(0.1, defence="clip")]))


def test_the_clean_stream(defended_rows: list[Row]) -> None:
    measured = measures(defended_rows)
    dsc, gate = (of(measured, "clean-trigger", defence) for defence in ("dsc", "gate"))
    assert dsc.accuracy_after_trigger.values == pytest.approx((0.96, 0.94, 0.92))
    assert dsc.against_none.values == pytest.approx((-0.01, -0.02, -0.03))
    assert dsc.flagged_clean.values == pytest.approx((0.04, 0.05, 0.06))
    assert dsc.update_seconds.mean == pytest.approx(0.010)
    assert dsc.time_ratio.values == pytest.approx((10 / 4, 10 / 5, 10 / 6))
    assert dsc.attack_success.n == 0
    assert gate.refused.values == pytest.approx((0, 1 / 5, 2 / 5))  # four batches and the trigger step
    assert gate.against_none.values == pytest.approx((0, 0, 0))
    assert gate.flagged_clean.n == 0
    assert of(measured, "clean-trigger", "none").time_ratio.n == 0


def test_the_attack(defended_rows: list[Row]) -> None:
    measured = measures(defended_rows)
    none, dsc, gate = (of(measured, "accumulative", defence) for defence in ("none", "dsc", "gate"))
    assert dsc.attack_success.values == pytest.approx((0.3, 0.2, 0.1))
    assert dsc.against_none.values == pytest.approx((0.20, 0.21, 0.22))
    assert dsc.drop.values == pytest.approx((0.06, 0.05, 0.04))
    assert dsc.time_ratio.values == pytest.approx((3, 12 / 5, 2))
    assert dsc.quarantined.values == (0, 1, 2)
    assert gate.refused.values == pytest.approx((2 / 3,) * 3)
    assert (none.first_alarm_step.values, dsc.first_alarm_step.values) == ((3, 3, 3), ())
    assert gate.first_alarm_step.values == (3, 3)
    assert gate.alarmed.values == pytest.approx((0, 1 / 3, 1 / 3))


def test_comparisons_are_made_seed_by_seed(make_run: Make) -> None:
    none = [make_run(seed=seed, after=0.5 + 0.1 * seed, summary={"update_seconds": 1.0 + seed}) for seed in (0, 1, 2)]
    some = [make_run(seed=s, after=0.9, defence="clip", summary={"update_seconds": 6.0}) for s in (2, 7, 1)]
    one = of(measures(rows([*none, *some])), "accumulative", "clip")
    assert one.against_none.values == pytest.approx((0.9 - 0.7, 0.9 - 0.6))
    assert one.time_ratio.values == pytest.approx((2, 3))


def test_a_store_from_before_these_measures_is_read(make_run: Make) -> None:
    new = ("rolled_back", "quarantined", "flagged_clean", "flagged_poisoned", "update_seconds", "calibrations")
    runs = [make_run(defence=defence, attack=a) for defence in ("none", "clip") for a in ("clean", "pgd")]
    old = [replace(run, summary={k: v for k, v in run.summary.items() if k not in new}) for run in runs]
    measured = measures(rows(old))
    one = of(measured, "pgd", "clip")
    assert one.against_none.n == 1
    assert one.refused.n == one.time_ratio.n == one.quarantined.n == one.attack_success.n == 0
    for table in defence_tables(measured):
        assert "steps refused" not in table.head


def test_a_time_of_zero_gives_no_ratio(make_run: Make) -> None:
    runs = [make_run(summary={"update_seconds": 0.0}), make_run(defence="clip")]
    assert of(measures(rows(runs)), "accumulative", "clip").time_ratio.n == 0


def test_csv_has_every_measure(defended_rows: list[Row]) -> None:
    measured = measures(defended_rows)
    records = list(csv.DictReader(io.StringIO(to_csv(measure_records(measured)))))
    assert len(records) == len(measure_records(measured)) == 6
    assert {f"{name}_{what}" for name in QUANTITIES for what in ("mean", "std", "n")} < set(records[0])
    dsc = next(r for r in records if (r["attack"], r["defence"]) == ("accumulative", "dsc"))
    assert float(dsc["attack_success_mean"]) == pytest.approx(0.2)
    assert float(dsc["attack_success_std"]) == pytest.approx(0.1)
    assert float(dsc["time_ratio_mean"]) == pytest.approx(statistics.mean((3, 12 / 5, 2)))
    assert (dsc["flagged_clean_mean"], dsc["flagged_clean_n"], dsc["first_alarm_step_n"]) == ("", "0", "0")
