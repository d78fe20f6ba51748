import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from mithridate.bench.store import Run
from mithridate.report import build_report
from mithridate.report.measures import measures
from mithridate.report.rows import Row, rows, updates
from mithridate.report.tables.defences import defence_tables
from mithridate.report.tables.section import TableSection

Make = Callable[..., Run]
MakeRow = Callable[..., Row]


def column(table: TableSection, name: str) -> list[str]:
    (lines,) = table.rows.values()
    return [line[table.head.index(name)] for line in lines]


def test_tables_as_people_read_them(defended_rows: list[Row]) -> None:
    clean, attacked = defence_tables(measures(defended_rows))
    assert column(clean, "defence") == ["none", "dsc", "gate"]
    assert column(clean, "final accuracy (%)") == ["96.0 ± 1.0", "94.0 ± 2.0", "96.0 ± 1.0"]
    assert column(clean, "against none (points)") == ["—", "-2.0 ± 1.0", "0.0 ± 0.0"]
    assert column(clean, "clean samples corrected (%)") == ["—", "5.0 ± 1.0", "—"]
    assert column(clean, "steps refused") == ["0", "0", "3 of 15"]
    assert column(clean, "seconds a batch") == ["0.0050 ± 0.0010", "0.010 ± 0.000", "0.0060 ± 0.0000"]
    assert column(clean, "time / none") == ["—", "2.1 ± 0.4", "1.2 ± 0.3"]
    assert "stream" not in clean.head
    assert "false alarms" not in clean.head
    assert clean.note == "None in any row, so not shown: false alarms."
    assert column(attacked, "attack success (%)") == ["—", "20.0 ± 10.0", "—"]
    assert column(attacked, "first alarm (batch)") == ["3", "—", "3 (2 of 3)"]
    assert column(attacked, "steps refused") == ["0", "0", "6 of 9"]
    assert column(attacked, "quarantined") == ["0", "3", "0"]
    assert attacked.note == ""


def test_several_clean_streams_are_named(make_row: MakeRow) -> None:
    streams = [make_row(0.0, attack="clean", label=label, defence="clip") for label in ("short", "long")]
    clean, attacked = defence_tables(measures(streams))
    assert sorted(column(clean, "stream")) == ["long", "short"]
    assert clean.names == 2
    assert attacked.rows == {}


def test_the_report_has_them_as_files(defended_store: Path, tmp_path: Path) -> None:
    built = build_report([defended_store], tmp_path)
    assert built.files["measures.csv"].read_text(encoding="utf-8").count("\n") == 7
    text = built.files["measures.md"].read_text(encoding="utf-8")
    assert text.count("## What the defences") == 2
    assert "| accumulative | dsc | 96.0 ± 0.0 | 91.0 ± 1.0 | 5.0 ± 1.0 | +21.0 ± 1.0 | 20.0 ± 10.0 |" in text
    runs = csv.DictReader(io.StringIO(built.files["runs.csv"].read_text(encoding="utf-8")))
    flagged = [float(run["flagged_poisoned"]) for run in runs if run["flagged_poisoned"]]
    assert sorted(flagged) == pytest.approx([0.7, 0.8, 0.9])


def test_halted_runs_took_no_trigger_step(make_run: Make) -> None:
    halted = make_run(defence="gate", after=None, status="halted", summary={"rolled_back": 1})
    assert updates(halted) == 3
    assert updates(make_run()) == 4
    assert updates(make_run(summary={"steps": None})) == 0
    (one,) = measures(rows([halted]))
    assert one.refused.values == pytest.approx((1 / 3,))
    (_, table) = defence_tables([one])
    assert column(table, "n") == ["0 of 1"]
    assert column(table, "steps refused") == ["1 of 3"]


def test_measures_count_rounds(federated: Make) -> None:
    runs = [federated(attack, defence=d) for attack in ("clean", "accumulative") for d in ("none", "wide")]
    clean, attacked = defence_tables(measures(rows(runs)))
    assert "seconds a round" in clean.head
    assert "phase (rounds)" in attacked.head
