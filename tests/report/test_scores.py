from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mithridate.bench.store import Run
from mithridate.report.detectors import detectors
from mithridate.report.rows import rows
from mithridate.report.scores import (
    averaged,
    finite_mean,
    poisoned_phase,
    quality,
    run_score_records,
    samples,
    strongest,
)
from mithridate.report.tables.detectors import detector_tables

Make = Callable[..., Run]
WithScores = Callable[..., Run]


def test_means_leave_out_what_is_not_finite(make_run: Make, with_scores: WithScores) -> None:
    assert finite_mean(np.array([-np.inf, 1, 3])) == 2
    assert finite_mean(np.array([-np.inf])) is None
    run = with_scores(make_run(), {"gda": {1: {"clean": [1, np.nan], "poisoned": [-np.inf, 0]}}})
    (info,) = detectors(rows([run]))
    found = quality(info, samples(run, "gda"))
    assert (found["score_clean"], found["score_poisoned"], found["not_finite"]) == (1.0, 0.0, 0.5)
    assert found["auroc"] == pytest.approx((0.5 + 1 + 0 + 1) / 4)  # -inf ties with NaN, which counts as -inf


def test_samples_by_phase_and_kind(make_run: Make, with_scores: WithScores) -> None:
    said = {1: {"clean": [1, 2], "poisoned": [3], "same": [2], "ood": [4]}, 4: {"clean": [5], "poisoned": [6]}}
    run = with_scores(make_run(), {"a": said, "b": {1: {"clean": [9]}}})
    assert [list(s) for s in samples(run, "a", "accumulative")] == [[1, 2], [3], [4]]
    assert [list(s) for s in samples(run, "a", "trigger")] == [[5], [6], []]
    assert [list(s) for s in samples(run, "a")] == [[1, 2, 5], [3, 6], [4]]
    assert [list(s) for s in samples(run, "b")] == [[9], [], []]
    assert [list(s) for s in samples(make_run(), "a")] == [[], [], []]


def test_records_are_means_of_runs_and_never_pool(make_run: Make, with_scores: WithScores) -> None:
    far, none = {"clean": [0, 1], "poisoned": [-5, -6]}, {"clean": [100, 101], "poisoned": [102, 103]}
    runs = [with_scores(make_run(seed=0), {"gda": {1: far}}), with_scores(make_run(seed=1), {"gda": {1: none}})]
    other = with_scores(make_run(defence="clip"), {"gda": {1: {"clean": [0, 0], "poisoned": [0, 0]}}})
    records = {(r["defence"], r["phase"]): r for r in averaged(run_score_records(rows([*runs, other])))}
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


def test_ratio_is_of_discrepancies_alone(make_run: Make, with_scores: WithScores) -> None:
    said = {1: {"clean": [-0.1, -0.3], "poisoned": [-0.6, -0.6]}}
    tables: list[dict[str, Any]] = [{"name": "discrepancy", "label": "d", "epoch": 3}, {"name": "kd"}]
    records = averaged(run_score_records(rows([with_scores(make_run(), {"d": said, "kd": said}, tables)])))
    assert {r["detector"]: r["ratio_mean"] for r in records} == {"d": pytest.approx(3), "kd": None}
    never = with_scores(make_run(), {"d": {1: {"clean": [0.0], "poisoned": [-1.0]}}}, tables)
    assert averaged(run_score_records(rows([never])))[0]["ratio_mean"] is None


def test_controls_know_only_other_images(make_run: Make, with_scores: WithScores) -> None:
    said = {1: {"clean": [1, 2], "same": [1, 2], "ood": [-1, 0]}, 4: {"clean": [3], "same": [3], "ood": [-2]}}
    (row,) = rows([with_scores(make_run(attack="clean"), {"gda": said})])
    (record,) = [r for r in averaged(run_score_records([row])) if r["phase"] == "both"]
    assert (record["auroc_mean"], record["auroc_n"], record["auroc_ood_mean"]) == (None, 0, 1.0)
    assert poisoned_phase(row) is None
    assert strongest([row]) is None
    (table,) = detector_tables([row], averaged(run_score_records([row])))
    assert [list(line) for line in table.rows[row.subject]] == [["clean", "none", "other images", "1.00"]]


def test_the_strongest_is_undefended_and_no_control(make_run: Make, with_scores: WithScores) -> None:
    said = {"gda": {4: {"clean": [1], "poisoned": [0]}}}
    found = rows(
        [
            with_scores(make_run(label="weak", after=0.9), said),
            with_scores(make_run(label="strong", after=0.5), said),
            with_scores(make_run(label="late", after=None), said),
            with_scores(make_run(label="defended", defence="clip", after=0.1), said),
            with_scores(make_run(attack="noise", after=0.2), said),
            make_run(label="unscored", after=0.1),
        ]
    )
    best = strongest(found)
    assert best is not None
    assert (best[0].attack, best[1]) == ("strong", "trigger")
