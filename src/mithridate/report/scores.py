"""What detectors made of every sample: from `scores.parquet` to rates, means over seeds, CSV and tables.

Poisoned samples, as the learner received them, stand against clean ones: the batches before anyone poisoned them.
Scores of different runs are never pooled here, so neither another defence nor another seed enters a rate.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mithridate.bench.store import Run
from mithridate.report.page import TableSection
from mithridate.report.rows import Record, Row, Statistic, flattened, groups, seed, to_csv
from mithridate.report.wording import MISSING, decimal, listed, number, plain

CLEAN, POISONED, OOD = "clean", "poisoned", "ood"
"""The three kinds of samples: before poisoning; changed, as received; of another image set."""

ACCUMULATIVE, TRIGGER, BOTH = "accumulative", "trigger", "both"
PHASES = (ACCUMULATIVE, TRIGGER, BOTH)

NAMES = ("dataset", "model", "attack", "defence", "detector", "component", "epoch", "interval", "phase")
"""What a record is about; `interval` is the backtracking interval k in epochs."""

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
"""What is averaged over seeds. `auroc`, `tpr_at_1`, `tpr_at_5`: poisoned against clean, fractions; `auroc_ood`: other
images against clean; `score_*`: means of the finite scores; `ratio`: mean discrepancy of poisoned samples over that of
clean ones, of discrepancy detectors only; `not_finite`: share of samples without a finite score."""

Scores = NDArray[np.float64]


class Samples(NamedTuple):
    """Scores by kind of sample; lower is more suspicious.

    Args:
        clean: Of the batches before poisoning.
        poisoned: Of the received samples that had been changed.
        ood: Of another image set.
    """

    clean: Scores
    poisoned: Scores
    ood: Scores


@dataclass(frozen=True)
class DetectorInfo:
    """A detector as a run's settings describe it.

    Args:
        key: What the store calls it.
        label: The same, cleaned for display.
        name: The component's name; the label if the settings do not know it.
        epoch: The burn-in epoch that it looks back at; None if it does not, or looks back in updates.
        interval: Epochs from there to the end of the burn-in: the backtracking interval k. None without an epoch.
        family: Its name and settings but the epoch: detectors that differ in nothing else share it.
        divergence: The distance that it measures with; empty if none.
    """

    key: str
    label: str
    name: str
    epoch: int | None
    interval: int | None
    family: str
    divergence: str

    @property
    def is_discrepancy(self) -> bool:
        """Whether its score is minus the Memorization Discrepancy."""
        return self.name == "discrepancy"

    @property
    def is_loss(self) -> bool:
        """Whether its score is minus a cross-entropy, or a difference of two."""
        return self.name == "loss"


def detectors(rows: Sequence[Row]) -> list[DetectorInfo]:
    """The detectors that scored anything, each once, in the order of the recipes."""
    found: dict[str, DetectorInfo] = {}
    for row in rows:
        for run in row.runs:
            for info in _detectors_of(run):
                found.setdefault(info.key, info)
    return list(found.values())


def representatives(found: Sequence[DetectorInfo]) -> list[DetectorInfo]:
    """Of detectors that differ only in their epoch, the latest ("static") and the one nearest to half the burn-in.

    Half the burn-in is where the released code of Zhu et al. looks back to (epoch 20 of 40).

    Args:
        found: All detectors.

    Returns:
        In the same order; detectors without an epoch are all kept.
    """
    kept: set[str] = {info.key for info in found if info.interval is None}
    for family in _families(_dated(found)):
        kept |= {info.key for info in (family[0], reference(family)) if info is not None}
    return [info for info in found if info.key in kept]


def reference(family: Sequence[DetectorInfo]) -> DetectorInfo | None:
    """The detector that looks back about half the burn-in; of two equally near, the one that looks further back."""

    def distance(info: DetectorInfo) -> tuple[float, int]:
        epoch, interval = info.epoch or 0, info.interval or 0
        return abs(epoch - (epoch + interval) / 2), epoch

    return min(_dated(family), key=distance, default=None)


def looking_back(found: Sequence[DetectorInfo], name: str) -> list[list[DetectorInfo]]:
    """Detectors with an epoch, those that differ in nothing else together, the longest interval last.

    Args:
        found: All detectors.
        name: Of the component: `discrepancy` or `loss`.
    """
    return _families([info for info in _dated(found) if info.name == name])


def samples(run: Run, key: str, phase: str = BOTH) -> Samples:
    """What one detector said in one phase of one run.

    Args:
        run: The run.
        key: Of the detector.
        phase: `accumulative`, `trigger` or `both`.

    Returns:
        Empty arrays where there is nothing; NaN counts as -inf.
    """
    meant = {ACCUMULATIVE, TRIGGER} if phase == BOTH else {phase}
    return samples_of(run, key, [int(step["step"]) for step in run.trace if step["phase"] in meant])


def samples_of(run: Run, key: str, steps: Sequence[int]) -> Samples:
    """The same of some steps."""
    if not run.scores:
        return Samples(*(np.empty(0) for _ in Samples._fields))
    columns = run.scores
    scores = np.where(np.isnan(columns["score"]), -np.inf, columns["score"]).astype(np.float64)
    meant = np.isin(columns["step"], steps) & (columns["detector"] == key)
    source = columns["source"]
    return Samples(
        clean=scores[meant & (source == "clean")],
        poisoned=scores[meant & (source == "received") & columns["poisoned"].astype(bool)],
        ood=scores[meant & (source == "ood")],
    )


class Curve(NamedTuple):
    """What a threshold on the score can do, from flagging nothing to flagging everything (a ROC curve).

    Args:
        false: Share of clean samples flagged, ascending.
        true: Share of suspects flagged.
        n_clean: How many clean samples there are.
    """

    false: Scores
    true: Scores
    n_clean: int

    @property
    def auroc(self) -> float:
        """Chance that a suspect scores below a clean sample, ties counted half: 1 is perfect, 0.5 a coin."""
        from sklearn.metrics import auc

        return float(auc(self.false, self.true))

    def detected(self, rate: float) -> float | None:
        """Share of suspects flagged by the best threshold that flags at most `rate` of the clean samples.

        Args:
            rate: False-positive rate, in (0, 1).

        Returns:
            None if one clean sample is already more than `rate` of them: so few cannot resolve it.
        """
        if finest_rate(self.n_clean) > rate:
            return None
        return float(self.true[self.false <= rate + 1e-12].max())


def curve(clean: Scores, suspects: Scores) -> Curve | None:
    """How well thresholds part two kinds of samples; None if either is missing.

    Args:
        clean: Scores of the negatives; infinite ones keep their place in the order.
        suspects: Scores of the positives, expected to be lower.
    """
    if not (len(clean) and len(suspects)):
        return None
    from sklearn.metrics import roc_curve

    _, ranks = np.unique(np.concatenate([clean, suspects]), return_inverse=True)
    labels = np.repeat([0, 1], [len(clean), len(suspects)])
    false, true, _ = roc_curve(labels, -ranks.astype(np.int64), drop_intermediate=False)
    return Curve(false, true, len(clean))


def finest_rate(n: int) -> float:
    """The smallest false-positive rate above zero that `n` clean samples can show."""
    return 1 / n


def mean(scores: Scores) -> float | None:
    """Mean of the finite scores; None if there is none."""
    finite = scores[np.isfinite(scores)]
    return float(finite.mean()) if len(finite) else None


def quality(info: DetectorInfo, found: Samples) -> dict[str, float | None]:
    """Every one of `METRICS` for one detector's scores.

    Args:
        info: The detector.
        found: Scores of one run and phase.
    """
    clean, poisoned = mean(found.clean), mean(found.poisoned)
    caught, foreign = curve(found.clean, found.poisoned), curve(found.clean, found.ood)
    every = np.concatenate(found)
    return {
        "auroc": caught.auroc if caught else None,
        "tpr_at_1": caught.detected(0.01) if caught else None,
        "tpr_at_5": caught.detected(0.05) if caught else None,
        "auroc_ood": foreign.auroc if foreign else None,
        "score_clean": clean,
        "score_poisoned": poisoned,
        "score_ood": mean(found.ood),
        "ratio": poisoned / clean if info.is_discrepancy and clean and poisoned is not None else None,
        "not_finite": float(np.mean(~np.isfinite(every))) if len(every) else None,
    }


def run_score_records(rows: Sequence[Row]) -> list[Record]:
    """One record a run, detector and phase: names, numbers of samples and every metric.

    `finest_fpr` is the smallest false-positive rate above zero that the clean samples can show.
    """
    records: list[Record] = []
    for row in rows:
        for info in detectors([row]):
            for phase in PHASES:
                for run in row.runs:
                    found = samples(run, info.key, phase)
                    if any(map(len, found)):
                        records.append(
                            {
                                **_names(row, info, phase),
                                "run": plain(run.path.name),
                                "seed": seed(run),
                                **{f"{kind}_samples": len(scores) for kind, scores in found._asdict().items()},
                                "finest_fpr": finest_rate(len(found.clean)) if len(found.clean) else None,
                                **quality(info, found),
                            }
                        )
    return records


def score_records(rows: Sequence[Row]) -> list[Record]:
    """One record a cell, detector and phase: names, numbers of samples in all its runs, mean, std and n of each metric.

    `finest_fpr` is the smallest false-positive rate above zero that every run's clean samples can show.
    """
    return averaged(run_score_records(rows))


def averaged(records: Sequence[Record]) -> list[Record]:
    """Records of single runs as records of cells."""
    cells: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        cells.setdefault(tuple(record[name] for name in NAMES), []).append(record)
    return [_average(members) for members in cells.values()]


def _average(members: Sequence[Record]) -> Record:
    def known(key: str) -> tuple[float, ...]:
        values = (number(value) for record in members if not isinstance(value := record[key], str))
        return tuple(value for value in values if value is not None)

    record: dict[str, str | float | int | None] = {name: members[0][name] for name in NAMES}
    record |= {"runs": len(members)}
    record |= {f"{kind}_samples": int(sum(known(f"{kind}_samples"))) for kind in Samples._fields}
    record |= {"finest_fpr": max(known("finest_fpr"), default=None)}
    for metric in METRICS:
        statistic = Statistic(known(metric))
        record |= {f"{metric}_mean": statistic.mean, f"{metric}_std": statistic.std, f"{metric}_n": statistic.n}
    return record


def strongest(rows: Sequence[Row]) -> Row | None:
    """The undefended cell with the largest mean drop among those whose poisoned samples were scored; no control.

    Args:
        rows: Rows of one data set and model.

    Returns:
        None if there is none; of equal ones the first.
    """
    able = [
        row
        for row in rows
        if row.defence_name == "none" and row.attacking and not row.is_noise and poisoned_phase(row) is not None
    ]
    return max(able, key=_drop, default=None)


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


@dataclass(frozen=True)
class ScoreReport:
    """What is written about detectors, without figures.

    Args:
        tables: For the page.
        files: Text by file name.
    """

    tables: Sequence[TableSection]
    files: Mapping[str, str]


def score_report(rows: Sequence[Row]) -> ScoreReport:
    """Tables and files; none if no detector scored anything.

    Files: `scores.csv` (one record a cell), `scores_runs.csv` (one a run), `scores.md` (the tables of the page).

    Args:
        rows: All rows.
    """
    single = run_score_records(rows)
    if not single:
        return ScoreReport((), {})
    records = averaged(single)
    tables = _tables(rows, records)
    files = {"scores.csv": to_csv(records), "scores_runs.csv": to_csv(single)}
    if tables:
        files["scores.md"] = "\n".join(map(_markdown, tables))
    return ScoreReport(tables, files)


def _detectors_of(run: Run) -> Iterator[DetectorInfo]:
    """What its scores name, in the order of its settings; detectors that those do not know come last."""
    tables = run.config.get("detector", [])
    known = {str(t.get("label", t.get("name"))): t for t in (tables if isinstance(tables, list) else [tables])}
    scored = dict.fromkeys(map(str, run.scores["detector"])) if run.scores else {}
    for key in [*(key for key in known if key in scored), *(key for key in scored if key not in known)]:
        table = known.get(key, {"name": key})
        epoch, last = _epoch(run, table), _burn_in(run).get("epochs")
        yield DetectorInfo(
            key=key,
            label=plain(key),
            name=plain(table["name"]),
            epoch=epoch,
            interval=last - epoch if isinstance(last, int) and epoch is not None else None,
            family=str(sorted(flattened({k: v for k, v in table.items() if k not in {"label", "epoch"}}).items())),
            divergence=plain(table.get("divergence", "")),
        )


def _epoch(run: Run, table: Mapping[str, Any]) -> int | None:
    """The epoch that a detector looks back at; a discrepancy without one looks at the earliest that was kept."""
    burn_in = _burn_in(run)
    if table.get("old") == "back" or "checkpoint" in burn_in:
        return None
    epoch = table.get("epoch")
    if epoch is None and table.get("name") == "discrepancy":
        epoch = min((*burn_in.get("checkpoints", ()), burn_in.get("epochs", 0)))
    return epoch if isinstance(epoch, int) else None


def _burn_in(run: Run) -> Mapping[str, Any]:
    table = run.config.get("burn_in", {})
    return table if isinstance(table, Mapping) else {}


def _families(found: Sequence[DetectorInfo]) -> list[list[DetectorInfo]]:
    families: dict[str, list[DetectorInfo]] = {}
    for info in found:
        families.setdefault(info.family, []).append(info)
    return [sorted(family, key=lambda info: info.interval or 0) for family in families.values()]


def _dated(found: Sequence[DetectorInfo]) -> list[DetectorInfo]:
    return [info for info in found if info.interval is not None]


def _names(row: Row, info: DetectorInfo, phase: str) -> dict[str, str | int | None]:
    return dict(
        zip(
            NAMES,
            (*row.group, row.attack, row.defence, info.label, info.name, info.epoch, info.interval, phase),
            strict=True,
        )
    )


def _drop(row: Row) -> float:
    drop = row.statistic("drop").mean
    return -np.inf if drop is None else drop


def _tables(rows: Sequence[Row], records: Sequence[Record]) -> list[TableSection]:
    return [table for table in (_against_strongest(rows, records), _everywhere(rows, records)) if table is not None]


def _of(row: Row, records: Sequence[Record]) -> list[Record]:
    where = (*row.group, row.attack, row.defence)
    return [record for record in records if tuple(record[name] for name in NAMES[:4]) == where]


def _against_strongest(rows: Sequence[Row], records: Sequence[Record]) -> TableSection | None:
    shown = [row for members in groups(rows).values() if (row := strongest(members)) is not None]
    lines: dict[str, list[tuple[str, ...]]] = {}
    finest = 0.0
    for row in shown:
        for phase in (ACCUMULATIVE, TRIGGER):
            for record in _of(row, records):
                if record["phase"] == phase and record["poisoned_samples"]:
                    lines.setdefault(row.subject, []).append(_line(record))
                    finest = max(finest, float(record["finest_fpr"] or 0))
    if not lines:
        return None
    which = listed([f"{row.cell} ({row.subject})" if len(shown) > 1 else row.cell for row in shown])
    return TableSection(
        id="detectors",
        heading="Detectors against the strongest attack",
        intro=f"Poisoned samples of {which}, the undefended cell with the largest drop, against the clean twins of all "
        "samples of the same phase and run; mean ± standard deviation over seeds. AUROC: the chance that a poisoned "
        "sample is the more suspicious one (0.5: a coin; below: poisoned samples look the cleaner ones). TPR: share of "
        "the poisoned samples caught, in %, by the threshold that flags at most 1 or 5 % of the clean ones. Scores: "
        "means; lower is more suspicious.",
        head=(
            "detector",
            "phase",
            "AUROC",
            "TPR at 1 %",
            "TPR at 5 %",
            "score: clean",
            "score: poisoned",
            "score: other images",
            "ratio",
            "AUROC: other images",
            "n",
        ),
        rows=lines,
        note="Thresholds are set on the very clean samples that false alarms are counted on, which flatters: a "
        "deployed one is set on others. Ratio: mean discrepancy of the poisoned samples over that of the clean ones, "
        "run by run."
        + (
            f" Rates are missing where a run has too few clean samples to resolve them (here no finer than "
            f"{100 * finest:.2g} %)."
            if finest > 0.01
            else ""
        ),
        line=1,
        bold=2,
    )


def _line(record: Record) -> tuple[str, ...]:
    return (
        str(record["detector"]),
        str(record["phase"]),
        _written(record, "auroc", 2),
        _written(record, "tpr_at_1", 0, 100),
        _written(record, "tpr_at_5", 0, 100),
        *(_significant(record[f"score_{kind}_mean"]) for kind in Samples._fields),
        _written(record, "ratio", 1),
        _written(record, "auroc_ood", 2),
        str(record["runs"]),
    )


def _everywhere(rows: Sequence[Row], records: Sequence[Record]) -> TableSection | None:
    """Poisoned samples of every cell, phase by phase; of cells without any, other images against the stream's."""
    shown = representatives(detectors(rows))
    lines: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        cells = {(str(r["phase"]), str(r["detector"])): r for r in _of(row, records)}
        for phase, metric, what in (
            (ACCUMULATIVE, "auroc", "accumulative phase"),
            (TRIGGER, "auroc", "trigger batch"),
            *(() if row.attacking else ((BOTH, "auroc_ood", "other images"),)),
        ):
            values = [_written(cells.get((phase, info.label), {}), metric, 2) for info in shown]
            if set(values) - {MISSING}:
                lines.setdefault(row.subject, []).append((row.attack, row.defence, what, *values))
    if not lines:
        return None
    return TableSection(
        id="detectors-cells",
        heading="Detectors in every cell",
        intro="AUROC of poisoned samples against the clean twins of all samples of the same phase and run, mean ± "
        "standard deviation over seeds; without an attack, of other images against the stream's.",
        head=("attack", "defence", "what", *(info.label for info in shown)),
        rows=lines,
        note="Of detectors that differ only in the epoch they look back at: the latest, and the one nearest to half "
        "the burn-in; scores.csv has all.",
        names=3,
        line=1,
    )


def _written(record: Record, metric: str, digits: int, scale: float = 1) -> str:
    middle, spread = record.get(f"{metric}_mean"), record.get(f"{metric}_std")
    if middle is None:
        return MISSING
    return decimal(scale * float(middle), digits) + (
        "" if spread is None else f" ± {decimal(scale * float(spread), digits)}"
    )


def _significant(value: str | float | None) -> str:
    return MISSING if value is None else f"{float(value):.3g}"


def _markdown(table: TableSection) -> str:
    note = f"\n{table.note}\n" if table.note else ""
    return f"## {table.heading}\n\n{table.intro}\n\n{table.markdown()}{note}"
