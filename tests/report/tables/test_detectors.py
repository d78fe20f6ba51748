import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mithridate.bench.store import Run
from mithridate.report import build_report
from mithridate.report.rows import Row, rows
from mithridate.report.scores import METRICS, averaged, run_score_records, samples
from mithridate.report.tables.detectors import detector_tables
from mithridate.report.tables.section import TableSection
from mithridate.report.wording import MISSING

Make = Callable[..., Run]
Save = Callable[[Run], Run]
WithScores = Callable[..., Run]


def tables(found: list[Row]) -> list[TableSection]:
    return detector_tables(found, averaged(run_score_records(found)))


def test_tables_and_files_hold_what_was_measured(
    make_run: Make, save_run: Save, with_scores: WithScores, tmp_path: Path
) -> None:
    clean = list(np.linspace(1, 2, 100))
    said = {1: {"clean": clean, "poisoned": [0.0] * 50, "ood": [3.0]}, 4: {"clean": [1.0, 2.0], "poisoned": [1.5]}}
    runs = [with_scores(make_run(seed=s, folder=tmp_path / "store"), {"=cmd|x": said}) for s in (0, 1)]
    found = rows(runs)
    best, cells = tables(found)
    assert [list(line)[:5] for line in best.rows[found[0].subject]] == [
        ["=cmd|x", "accumulative", "1.00 ± 0.00", "100 ± 0", "100 ± 0"],
        ["=cmd|x", "trigger", "0.50 ± 0.00", MISSING, MISSING],
    ]
    assert "no finer than 50 %" in best.note
    assert [list(line)[2:] for line in cells.rows[found[0].subject]] == [
        ["accumulative phase", "1.00 ± 0.00"],
        ["trigger batch", "0.50 ± 0.00"],
    ]
    assert all(len(line) == len(t.head) for t in (best, cells) for lines in t.rows.values() for line in lines)
    for run in runs:
        save_run(run)
    paths = build_report([tmp_path / "store"], tmp_path / "out").files
    records = list(csv.DictReader(io.StringIO(paths["scores.csv"].read_text(encoding="utf-8"))))
    assert [r["phase"] for r in records] == ["accumulative", "trigger", "both"]
    assert {r["detector"] for r in records} == {"'=cmd|x"}
    assert all(f"{metric}_mean" in records[0] for metric in METRICS)
    assert len(list(csv.DictReader(io.StringIO(paths["scores_runs.csv"].read_text(encoding="utf-8"))))) == 6
    assert "=cmd\\|x" in paths["scores.md"].read_text(encoding="utf-8")


def test_nothing_scored_nothing_written(make_run: Make, save_run: Save, tmp_path: Path) -> None:
    assert tables(rows([make_run()])) == []
    assert not any(map(len, samples(make_run(), "gda")))
    save_run(make_run(folder=tmp_path / "store"))
    files = build_report([tmp_path / "store"], tmp_path / "out").files
    assert not [name for name in files if name.startswith("scores")]


def test_data_sets_are_told_apart(make_run: Make, with_scores: WithScores) -> None:
    said = {"gda": {4: {"clean": [1], "poisoned": [0]}}}
    found = rows([with_scores(make_run(dataset=name), said) for name in ("digits", "mnist")])
    best, _ = tables(found)
    assert list(best.rows) == ["small_cnn on digits", "small_cnn on mnist"]
    assert "(small_cnn on mnist)" in best.intro
