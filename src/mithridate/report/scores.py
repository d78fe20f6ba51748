"""What detectors said of every sample: from `scores.parquet` to rates and means over seeds.

Poisoned samples, as the learner received them, stand against clean ones: the batches before anyone poisoned them.
Scores of different runs are never pooled here, so neither another defence nor another seed enters a rate.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from mithridate.bench.store import Run
from mithridate.report.detectors import DetectorInfo, detectors
from mithridate.report.records import Record, means
from mithridate.report.roc import Scores, curve
from mithridate.report.rows import Row, seed
from mithridate.report.statistic import Statistic
from mithridate.report.wording import number, one_line

CLEAN, POISONED, OOD = "clean", "poisoned", "ood"
"""The three kinds of samples: before poisoning; changed, as received; of another image set."""

MOVED_NOW, MOVED_THEN = "moved_now", "moved_then"
"""Not scores, but how far poisoning moved the answers of the current, and of the old model."""

KINDS = {CLEAN: "clean", POISONED: "poisoned", OOD: "other images"}
"""The kinds of samples in words."""

ACCUMULATIVE, TRIGGER, BOTH = "accumulative", "trigger", "both"
PHASES = (ACCUMULATIVE, TRIGGER, BOTH)

WHERE = {ACCUMULATIVE: "accumulative phase", TRIGGER: "trigger batch"}
"""The phases in words."""

METRICS = (
    "auroc",
    "tpr_at_1",
    "tpr_at_5",
    "auroc_ood",
    "score_clean",
    "score_poisoned",
    "score_ood",
    "ratio",
    "not_finite",
)
"""The quantities that are averaged over seeds. `auroc`, `tpr_at_1`, `tpr_at_5`: poisoned against clean, fractions;
`auroc_ood`: other images against clean; `score_*`: means of the finite scores; `ratio`: mean discrepancy of poisoned
samples over that of clean ones, for discrepancy detectors; `not_finite`: share of samples without a finite score."""


class ScoredSamples(NamedTuple):
    """Scores by kind of sample; lower is more suspicious.

    Args:
        clean: Scores of the batches before poisoning.
        poisoned: Scores of the received samples that had been changed.
        ood: Scores of another image set.
    """

    clean: Scores
    poisoned: Scores
    ood: Scores


def samples(run: Run, key: str, phase: str = BOTH) -> ScoredSamples:
    """What one detector said in one phase of one run.

    Args:
        run: The run.
        key: What the store calls the detector.
        phase: `accumulative`, `trigger` or `both`.

    Returns:
        Empty arrays where there is nothing; NaN counts as -inf.
    """
    return samples_of(run, key, _steps_of(run, phase))


def _steps_of(run: Run, phase: str) -> list[int]:
    phases = {ACCUMULATIVE, TRIGGER} if phase == BOTH else {phase}
    return [int(step["step"]) for step in run.trace if step["phase"] in phases]


def samples_of(run: Run, key: str, steps: Sequence[int]) -> ScoredSamples:
    """What one detector said in some steps of one run; empty arrays where there is nothing, NaN counts as -inf."""
    if not run.scores:
        return ScoredSamples(*(np.empty(0) for _ in ScoredSamples._fields))
    columns = run.scores
    scores = np.where(np.isnan(columns["score"]), -np.inf, columns["score"]).astype(np.float64)
    mask = np.isin(columns["step"], steps) & (columns["detector"] == key)
    source = columns["source"]
    return ScoredSamples(
        clean=scores[mask & (source == "clean")],
        poisoned=scores[mask & (source == "received") & columns["poisoned"].astype(bool)],
        ood=scores[mask & (source == "ood")],
    )


def mean_moved(run: Run, key: str, which: str, phase: str = BOTH) -> float | None:
    """How far poisoning moved the answers to the samples that it changed, on the mean.

    Args:
        run: The run.
        key: What the store calls the detector, a discrepancy with `moved_answers`.
        which: `moved_now`: those of the current model; `moved_then`: those of the detector's old model.
        phase: `accumulative`, `trigger` or `both`.

    Returns:
        None if the run did not store it.
    """
    if not run.scores:
        return None
    columns, steps = run.scores, _steps_of(run, phase)
    mask = np.isin(columns["step"], steps) & (columns["detector"] == key) & (columns["source"] == which)
    return finite_mean(columns["score"][mask & columns["poisoned"].astype(bool)])


def finite_mean(scores: Scores) -> float | None:
    """Mean of the finite scores; None if there is none."""
    finite = scores[np.isfinite(scores)]
    return float(finite.mean()) if len(finite) else None


def strongest(rows: Sequence[Row]) -> tuple[Row, str] | None:
    """The undefended cell with the largest mean drop among those whose poisoned samples were scored; no control.

    Args:
        rows: Rows of one data set and model.

    Returns:
        The cell, of equal ones the first, and its `poisoned_phase`; None if there is none.
    """
    scored = [
        (row, phase)
        for row in rows
        if row.defence_name == "none" and row.claims_drop and (phase := poisoned_phase(row)) is not None
    ]

    def drop(cell: tuple[Row, str]) -> float:
        mean = cell[0].statistic("drop").mean
        return -np.inf if mean is None else mean

    return max(scored, key=drop, default=None)


def poisoned_phase(row: Row) -> str | None:
    """Where an attack's poisoned samples are looked at: in its accumulative phase, or in the trigger if that is all.

    Returns:
        None if no poisoned sample was scored.
    """
    for phase in (ACCUMULATIVE, TRIGGER):
        for run in row.runs:
            steps = [step["step"] for step in run.trace if step["phase"] == phase]
            if run.scores and (np.isin(run.scores["step"], steps) & run.scores["poisoned"].astype(bool)).any():
                return phase
    return None


def quality(info: DetectorInfo, scores: ScoredSamples) -> dict[str, float | None]:
    """Every one of `METRICS` for one detector's scores.

    Args:
        info: The detector.
        scores: Scores of one run and phase.
    """
    clean, poisoned = finite_mean(scores.clean), finite_mean(scores.poisoned)
    roc, roc_ood = curve(scores.clean, scores.poisoned), curve(scores.clean, scores.ood)
    every = np.concatenate(scores)
    return {
        "auroc": roc.auroc if roc else None,
        "tpr_at_1": roc.detected(0.01) if roc else None,
        "tpr_at_5": roc.detected(0.05) if roc else None,
        "auroc_ood": roc_ood.auroc if roc_ood else None,
        "score_clean": clean,
        "score_poisoned": poisoned,
        "score_ood": finite_mean(scores.ood),
        "ratio": poisoned / clean if info.is_discrepancy and clean and poisoned is not None else None,
        "not_finite": float(np.mean(~np.isfinite(every))) if len(every) else None,
    }


def run_score_records(rows: Sequence[Row]) -> list[Record]:
    """One record a run, detector and phase: names, numbers of samples and every metric.

    `finest_fpr` is the smallest false-positive rate above zero that the clean samples can show.
    """
    return [
        {
            **row.names,
            "detector": info.label,
            "component": info.name,
            "epoch": info.epoch,
            "interval": info.interval,
            "phase": phase,
            "run": one_line(run.path.name),
            "seed": seed(run),
            **{f"{kind}_samples": len(part) for kind, part in scores._asdict().items()},
            "finest_fpr": 1 / len(scores.clean) if len(scores.clean) else None,
            **quality(info, scores),
        }
        for row in rows
        for info in detectors([row])
        for phase in PHASES
        for run in row.runs
        if any(map(len, scores := samples(run, info.key, phase)))
    ]


def averaged(records: Sequence[Record]) -> list[Record]:
    """Records of single runs as one record a cell, detector and phase: numbers of samples, mean, std and n of metrics.

    `finest_fpr` is the smallest false-positive rate above zero that every run's clean samples can show.

    Args:
        records: As `run_score_records` makes them; the columns before `run` name what a record is about.
    """
    cells: dict[tuple[object, ...], list[Record]] = {}
    names = tuple(takewhile(lambda column: column != "run", records[0] if records else ()))
    for record in records:
        cells.setdefault(tuple(record[name] for name in names), []).append(record)
    return [_average(members, names) for members in cells.values()]


def _average(members: Sequence[Record], names: Sequence[str]) -> Record:
    def known(key: str) -> tuple[float, ...]:
        values = (number(value) for record in members if not isinstance(value := record[key], str))
        return tuple(value for value in values if value is not None)

    return {
        **{name: members[0][name] for name in names},
        "runs": len(members),
        **{f"{kind}_samples": int(sum(known(f"{kind}_samples"))) for kind in ScoredSamples._fields},
        "finest_fpr": max(known("finest_fpr"), default=None),
        **means({metric: Statistic(known(metric)) for metric in METRICS}),
    }
