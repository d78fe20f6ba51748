# ruff: noqa: RUF001  (cells are written with a multiplication sign)

import csv
import io
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mithridate.bench.store import Run, read_runs
from mithridate.report.rows import (
    METRICS,
    Row,
    Statistic,
    displayed,
    flattened,
    groups,
    rows,
    run_records,
    settings,
    shared,
    summary_records,
    to_csv,
    to_markdown,
    varying,
)

Make = Callable[..., Run]
MakeRow = Callable[..., Row]


def test_statistic_counts_what_is_there() -> None:
    assert (Statistic(()).mean, Statistic(()).std, Statistic(()).n) == (None, None, 0)
    assert (Statistic((0.25,)).mean, Statistic((0.25,)).std) == (0.25, None)
    values = (0.1, 0.4, 0.35)
    assert Statistic(values).mean == pytest.approx(statistics.mean(values))
    assert Statistic(values).std == pytest.approx(statistics.stdev(values))


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


def test_rows_come_with_controls_first(demo_store: Path) -> None:
    cells = [row.cell.split(" ")[0] for row in rows(read_runs([demo_store]))]
    assert cells == ["clean", "noise", "vanilla", "pgd,", "accumulative"] * 2


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
    assert "±" not in "".join(displayed(row))


def test_halted_cell_shows_how_many_have_a_drop(make_run: Make) -> None:
    halted = make_run(seed=1, after=None, status="halted")
    (row,) = rows([make_run(seed=0), halted])
    assert "1 of 2" in displayed(row)
    (alone,) = rows([halted])
    assert displayed(alone)[4:6] == ("—", "—")
    assert "0 of 1" in displayed(alone)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "0.5", True])
def test_values_that_are_no_numbers_are_left_out(make_run: Make, bad: object) -> None:
    (row,) = rows([make_run(seed=0), make_run(seed=1, summary={"drop": bad})])
    assert row.statistic("drop").n == 1


def test_formulas_are_neutralised_and_numbers_stay(make_run: Make) -> None:
    made = rows([make_run(label=label, summary={"drop": -0.25}) for label in ("=1+1", "+x", "-y", "@z", " =w")])
    records = list(csv.DictReader(io.StringIO(to_csv(summary_records(made)))))
    assert sorted(r["attack"] for r in records) == ["'+x", "'-y", "'=1+1", "'=w", "'@z"]
    assert {r["drop_mean"] for r in records} == {"-0.25"}


def test_markdown_is_one_table(demo_store: Path) -> None:
    made = rows(read_runs([demo_store]))
    lines = to_markdown(made).splitlines()
    assert len(lines) == 2 + len(made)
    assert {line.count("|") for line in lines} == {11}
    for line, row in zip(lines[2:], made, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        drop = row.statistic("drop")
        assert drop.mean is not None
        assert drop.std is not None
        assert cells[0] == row.attack
        assert cells[5] == f"{100 * drop.mean:.1f} ± {100 * drop.std:.1f}".replace("-0.0", "0.0")


def test_markdown_escapes_names(make_run: Make) -> None:
    text = to_markdown(rows([make_run(label="a|b\n<script>`x`[y](z)")]))
    assert len(text.splitlines()) == 3
    assert "a\\|b &lt;script&gt;\\`x\\`\\[y\\](z)" in text


def test_groups_get_columns_of_their_own(make_run: Make) -> None:
    made = rows([make_run(), make_run(dataset="mnist")])
    assert list(groups(made)) == [("digits", "small_cnn"), ("mnist", "small_cnn")]
    assert to_markdown(made).startswith("| data set | model | attack |")


def test_names_fall_back_to_the_settings(make_run: Make) -> None:
    run = make_run(label="strong")
    bare = {key: value for key, value in run.summary.items() if key not in {"attack", "defence", "dataset", "model"}}
    (row,) = rows([replace(run, summary=bare)])
    assert (row.dataset, row.model, row.attack, row.defence) == ("digits", "small_cnn", "strong", "none")
    assert row.attack_name == "accumulative"
    (unknown,) = rows([replace(run, summary={}, config={})])
    assert unknown.cell == "unknown × unknown"


def test_settings_leave_out_what_names_the_run(make_run: Make) -> None:
    assert settings(make_run(seed=0)) == settings(make_run(seed=1))
    assert settings(make_run())["attack.eps"] == "0.2"


def test_shared_and_varying_split_the_settings() -> None:
    tables = [flattened({"a": {"x": 1, "y": [1, 2]}, "b": "s"}), flattened({"a": {"x": 2, "y": [1, 2]}})]
    assert shared(tables) == {"a.y": "[1, 2]"}
    assert varying(tables, shared(tables)) == {"a.x": "1 | 2", "b": "s | unset"}
