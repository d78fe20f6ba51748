import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mithridate.bench.store import Run
from mithridate.report.rows import rows
from mithridate.report.scores import (
    METRICS,
    Samples,
    curve,
    detectors,
    looking_back,
    mean,
    poisoned_phase,
    quality,
    reference,
    representatives,
    run_score_records,
    samples,
    score_records,
    score_report,
    strongest,
)
from mithridate.report.wording import MISSING

Make = Callable[..., Run]
Said = Mapping[int, Mapping[str, Sequence[float]]]
"""Scores by step and kind; `same` are received samples that nobody changed."""


def scored(run: Run, said: Mapping[str, Said], tables: Sequence[Mapping[str, Any]] = ()) -> Run:
    """The run with the scores of some detectors."""
    lines = [
        (step, {"poisoned": "received", "same": "received"}.get(kind, kind), detector, i, kind == "poisoned", value)
        for detector, steps in said.items()
        for step, kinds in steps.items()
        for kind, values in kinds.items()
        for i, value in enumerate(values)
    ]
    names = ("step", "source", "detector", "sample", "poisoned", "score")
    kinds = (np.int64, object, object, np.int64, np.bool_, np.float64)
    columns: dict[str, Any] = {
        name: np.array(column, dtype=kind)
        for name, column, kind in zip(names, zip(*lines, strict=True), kinds, strict=True)
    }
    known = list(tables) or [{"name": "gda", "label": label} for label in said]
    return replace(run, scores=columns, config={**run.config, "detector": known})


def array(*values: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array(values, dtype=np.float64)


@pytest.mark.parametrize(
    ("clean", "poisoned", "expected"),
    [
        ([1, 2, 3], [-1, 0], 1.0),
        ([1, 2, 3], [4, 5], 0.0),
        ([1, 2], [1, 2], 0.5),
        ([7, 7, 7], [7, 7], 0.5),
        ([0, 2], [1], 0.5),
        ([1, 2, 3, 4], [2, 0], (2.5 / 4 + 1) / 2),
        ([0.0, 1.0], [-np.inf], 1.0),
        ([-np.inf, 1.0], [-np.inf], 0.75),
        ([0.0, np.inf], [np.inf], 0.25),
    ],
)
def test_auroc_counts_pairs(clean: list[float], poisoned: list[float], expected: float) -> None:
    pairs = [1.0 if p < c else 0.5 if p == c else 0.0 for p in poisoned for c in clean]
    found = curve(array(*clean), array(*poisoned))
    assert found is not None
    assert found.auroc == pytest.approx(np.mean(pairs))
    assert found.auroc == pytest.approx(expected)


def test_there_is_no_rate_without_both_kinds() -> None:
    assert curve(array(), array(1)) is None
    assert curve(array(1), array()) is None


def test_true_positives_at_a_rate_of_false_ones_by_hand() -> None:
    clean = np.arange(100, dtype=np.float64)
    found = curve(clean, array(-1, 0.5, 0.5, 3.5, 4.5, 50))
    assert found is not None
    assert found.detected(0.01) == pytest.approx(3 / 6)  # threshold below 1: flags clean sample 0 alone
    assert found.detected(0.05) == pytest.approx(5 / 6)  # flags 0 to 4, and a poisoned 4.5 below the sixth


def test_ties_at_the_threshold_are_flagged_together_or_not_at_all() -> None:
    clean = np.concatenate([np.zeros(2), np.ones(98)])
    found = curve(clean, array(0, 0, -1, 5))
    assert found is not None
    assert found.detected(0.01) == 0.25  # at 0 two clean samples would go with it: 2 %
    assert found.detected(0.02) == 0.75


def test_few_samples_resolve_no_small_rate() -> None:
    fifty, twenty = curve(np.arange(50.0), array(-1)), curve(np.arange(20.0), array(-1))
    assert fifty is not None
    assert twenty is not None
    assert (fifty.detected(0.01), fifty.detected(0.05)) == (None, 1.0)
    assert twenty.detected(0.05) == 1.0


def test_rates_agree_with_a_plain_count() -> None:
    rng = np.random.default_rng(0)
    clean, poisoned = rng.integers(0, 60, 300).astype(np.float64), rng.integers(-10, 50, 200).astype(np.float64)
    found = curve(clean, poisoned)
    assert found is not None
    for rate in (0.01, 0.05):
        thresholds = [t for t in np.unique([*clean, *poisoned]) if np.mean(clean <= t) <= rate]
        assert found.detected(rate) == pytest.approx(max((np.mean(poisoned <= t) for t in thresholds), default=0))


def test_means_leave_out_what_is_not_finite(make_run: Make) -> None:
    assert mean(array(-np.inf, 1, 3)) == 2
    assert mean(array(-np.inf)) is None
    run = scored(make_run(), {"gda": {1: {"clean": [1, np.nan], "poisoned": [-np.inf, 0]}}})
    (info,) = detectors(rows([run]))
    found = quality(info, samples(run, "gda"))
    assert (found["score_clean"], found["score_poisoned"], found["not_finite"]) == (1.0, 0.0, 0.5)
    assert found["auroc"] == pytest.approx((0.5 + 1 + 0 + 1) / 4)  # -inf ties with NaN, which counts as -inf


def test_samples_by_phase_and_kind(make_run: Make) -> None:
    said = {1: {"clean": [1, 2], "poisoned": [3], "same": [2], "ood": [4]}, 4: {"clean": [5], "poisoned": [6]}}
    run = scored(make_run(), {"a": said, "b": {1: {"clean": [9]}}})
    assert [list(s) for s in samples(run, "a", "accumulative")] == [[1, 2], [3], [4]]
    assert [list(s) for s in samples(run, "a", "trigger")] == [[5], [6], []]
    assert [list(s) for s in samples(run, "a")] == [[1, 2, 5], [3, 6], [4]]
    assert [list(s) for s in samples(run, "b")] == [[9], [], []]
    assert [list(s) for s in samples(make_run(), "a")] == [[], [], []]


def test_interval_is_counted_from_the_end_of_the_burn_in(make_run: Make) -> None:
    tables: list[dict[str, Any]] = [
        {"name": "discrepancy", "label": "d2", "epoch": 2},
        {"name": "discrepancy", "label": "d11", "epoch": 11},
        {"name": "discrepancy", "label": "d5", "epoch": 5},
        {"name": "discrepancy", "label": "js", "epoch": 5, "divergence": "js"},
        {"name": "discrepancy", "label": "earliest"},
        {"name": "discrepancy", "label": "updates", "old": "back", "back": 3},
        {"name": "loss", "label": "loss"},
        {"name": "loss", "label": "l5", "epoch": 5},
    ]
    said = {t["label"]: {1: {"clean": [0.0]}} for t in tables} | {"stranger": {1: {"clean": [0.0]}}}
    run = scored(make_run(), said, tables)
    run = replace(run, config={**run.config, "burn_in": {"epochs": 12, "checkpoints": [5, 2, 11]}})
    found = {info.label: info for info in detectors(rows([run]))}
    assert {label: info.interval for label, info in found.items()} == {
        "d2": 10,
        "d11": 1,
        "d5": 7,
        "js": 7,
        "earliest": 10,
        "updates": None,
        "loss": None,
        "l5": 7,
        "stranger": None,
    }
    infos = list(found.values())
    families = [[info.label for info in family] for family in looking_back(infos, "discrepancy")]
    assert families == [["d11", "d5", "d2", "earliest"], ["js"]]
    half = reference(looking_back(infos, "discrepancy")[0])
    assert half is not None
    assert half.label == "d5"
    assert [info.label for info in representatives(infos)] == ["d11", "d5", "js", "updates", "loss", "l5", "stranger"]


def test_a_given_checkpoint_has_no_epochs(make_run: Make) -> None:
    run = scored(make_run(), {"d": {1: {"clean": [0.0]}}}, [{"name": "discrepancy", "label": "d", "epoch": 4}])
    run = replace(run, config={**run.config, "burn_in": {"epochs": 40, "checkpoint": "model.pt"}})
    assert [info.interval for info in detectors(rows([run]))] == [None]


def test_records_are_means_of_runs_and_never_pool(make_run: Make) -> None:
    far, none = {"clean": [0, 1], "poisoned": [-5, -6]}, {"clean": [100, 101], "poisoned": [102, 103]}
    runs = [scored(make_run(seed=0), {"gda": {1: far}}), scored(make_run(seed=1), {"gda": {1: none}})]
    other = scored(make_run(defence="clip"), {"gda": {1: {"clean": [0, 0], "poisoned": [0, 0]}}})
    records = {(r["defence"], r["phase"]): r for r in score_records(rows([*runs, other]))}
    assert set(records) == {("none", "accumulative"), ("none", "both"), ("clip", "accumulative"), ("clip", "both")}
    record = records["none", "accumulative"]
    assert record["auroc_mean"] == 0.5  # 1 and 0; pooled over the two runs it would be 0.75
    assert record["auroc_std"] == pytest.approx(np.std([1, 0], ddof=1))
    assert (record["auroc_n"], record["runs"], record["clean_samples"], record["finest_fpr"]) == (2, 2, 4, 0.5)
    assert record["tpr_at_5_mean"] is None
    assert records["clip", "both"]["auroc_mean"] == 0.5
    assert records["clip", "both"]["auroc_std"] is None
    singles = [r for r in run_score_records(rows([*runs, other])) if r["phase"] == "both"]
    assert [(r["seed"], r["defence"], r["auroc"]) for r in singles] == [
        (0, "none", 1),
        (1, "none", 0),
        (0, "clip", 0.5),
    ]


def test_ratio_is_of_discrepancies_alone(make_run: Make) -> None:
    said = {1: {"clean": [-0.1, -0.3], "poisoned": [-0.6, -0.6]}}
    tables: list[dict[str, Any]] = [{"name": "discrepancy", "label": "d", "epoch": 3}, {"name": "kd"}]
    records = score_records(rows([scored(make_run(), {"d": said, "kd": said}, tables)]))
    assert {r["detector"]: r["ratio_mean"] for r in records} == {"d": pytest.approx(3), "kd": None}
    never = scored(make_run(), {"d": {1: {"clean": [0.0], "poisoned": [-1.0]}}}, tables)
    assert score_records(rows([never]))[0]["ratio_mean"] is None


def test_controls_know_only_other_images(make_run: Make) -> None:
    said = {1: {"clean": [1, 2], "same": [1, 2], "ood": [-1, 0]}, 4: {"clean": [3], "same": [3], "ood": [-2]}}
    (row,) = rows([scored(make_run(attack="clean"), {"gda": said})])
    (record,) = [r for r in score_records([row]) if r["phase"] == "both"]
    assert (record["auroc_mean"], record["auroc_n"], record["auroc_ood_mean"]) == (None, 0, 1.0)
    assert poisoned_phase(row) is None
    assert strongest([row]) is None
    (table,) = score_report([row]).tables
    assert [list(line) for line in table.rows[row.subject]] == [["clean", "none", "other images", "1.00"]]


def test_the_strongest_is_undefended_and_no_control(make_run: Make) -> None:
    said = {"gda": {4: {"clean": [1], "poisoned": [0]}}}
    found = rows(
        [
            scored(make_run(label="weak", after=0.9), said),
            scored(make_run(label="strong", after=0.5), said),
            scored(make_run(label="late", after=None), said),
            scored(make_run(label="defended", defence="clip", after=0.1), said),
            scored(make_run(attack="noise", after=0.2), said),
            make_run(label="unscored", after=0.1),
        ]
    )
    row = strongest(found)
    assert row is not None
    assert (row.attack, poisoned_phase(row)) == ("strong", "trigger")


def test_report_writes_what_was_measured(make_run: Make) -> None:
    clean = list(np.linspace(1, 2, 100))
    said = {1: {"clean": clean, "poisoned": [0.0] * 50, "ood": [3.0]}, 4: {"clean": [1.0, 2.0], "poisoned": [1.5]}}
    found = rows([scored(make_run(seed=s), {"=cmd|x": said}) for s in (0, 1)])
    report = score_report(found)
    best, cells = report.tables
    assert [list(line)[:5] for line in best.rows[found[0].subject]] == [
        ["=cmd|x", "accumulative", "1.00 ± 0.00", "100 ± 0", "100 ± 0"],
        ["=cmd|x", "trigger", "0.50 ± 0.00", MISSING, MISSING],
    ]
    assert "no finer than 50 %" in best.note
    assert [list(line)[2:] for line in cells.rows[found[0].subject]] == [
        ["accumulative phase", "1.00 ± 0.00"],
        ["trigger batch", "0.50 ± 0.00"],
    ]
    assert all(
        len(line) == len(table.head) for table in report.tables for lines in table.rows.values() for line in lines
    )
    records = list(csv.DictReader(io.StringIO(report.files["scores.csv"])))
    assert [r["phase"] for r in records] == ["accumulative", "trigger", "both"]
    assert {r["detector"] for r in records} == {"'=cmd|x"}
    assert all(f"{metric}_mean" in records[0] for metric in METRICS)
    assert len(list(csv.DictReader(io.StringIO(report.files["scores_runs.csv"])))) == 6
    assert "=cmd\\|x" in report.files["scores.md"]


def test_nothing_scored_nothing_written(make_run: Make) -> None:
    report = score_report(rows([make_run()]))
    assert (list(report.tables), dict(report.files)) == ([], {})
    assert not any(map(len, Samples(*samples(make_run(), "gda"))))


def test_data_sets_are_told_apart(make_run: Make) -> None:
    said = {"gda": {4: {"clean": [1], "poisoned": [0]}}}
    found = rows([scored(make_run(dataset=name), said) for name in ("digits", "mnist")])
    best, _ = score_report(found).tables
    assert list(best.rows) == ["small_cnn on digits", "small_cnn on mnist"]
    assert "(small_cnn on mnist)" in best.intro
