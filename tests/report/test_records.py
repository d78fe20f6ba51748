import csv
import io
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from mithridate.bench.store import Run, read_runs
from mithridate.report.records import METRICS, run_records, summary_records, to_csv
from mithridate.report.rows import Row, rows
from mithridate.report.tables.results import displayed

Make = Callable[..., Run]
MakeRow = Callable[..., Row]


def test_rows_equal_independent_means(demo_store: Path) -> None:
    runs = read_runs([demo_store])
    records = {(r["attack"], r["defence"]): r for r in csv.DictReader(io.StringIO(to_csv(summary_records(rows(runs)))))}
    assert len(records) == 10
    for (attack, defence), record in records.items():
        members = [r for r in runs if (r.summary["attack"], r.summary["defence"]) == (attack, defence)]
        assert int(record["runs"]) == len(members) == 3
        for metric in METRICS:
            values = [r.summary[metric] for r in members if r.summary[metric] is not None]
            assert int(record[f"{metric}_n"]) == len(values)
            assert float(record[f"{metric}_mean"]) == pytest.approx(statistics.mean(values))
            assert float(record[f"{metric}_std"]) == pytest.approx(statistics.stdev(values))
    assert records["accumulative", "clip"]["drop_n"] == "2"
    assert records["accumulative", "clip"]["halted"] == "1"
    assert records["pgd, loud", "none"]["diverged"] == "1"


def test_runs_csv_keeps_every_run(demo_store: Path) -> None:
    runs = read_runs([demo_store])
    records = {r["run"]: r for r in csv.DictReader(io.StringIO(to_csv(run_records(rows(runs)))))}
    assert len(records) == len(runs) == 30
    for run in runs:
        record = records[run.path.name]
        assert int(record["seed"]) == run.summary["seed"]
        assert record["status"] == run.summary["status"]
        drop = run.summary["drop"]
        assert record["drop"] == ("" if drop is None else repr(drop))


def test_single_run_has_no_spread(make_row: MakeRow) -> None:
    row = make_row(0.2)
    (record,) = summary_records([row])
    assert (record["drop_std"], record["drop_n"]) == (None, 1)
    assert "±" not in "".join(displayed(row, [row]).values())


def test_formulas_are_neutralised_and_numbers_stay(make_run: Make) -> None:
    made = rows([make_run(label=label, summary={"drop": -0.25}) for label in ("=1+1", "+x", "-y", "@z", " =w")])
    records = list(csv.DictReader(io.StringIO(to_csv(summary_records(made)))))
    assert sorted(r["attack"] for r in records) == ["'+x", "'-y", "'=1+1", "'=w", "'@z"]
    assert {r["drop_mean"] for r in records} == {"-0.25"}
