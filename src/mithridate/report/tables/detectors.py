"""The tables of detectors: what they see of the strongest attack, and in every cell."""

from collections.abc import Mapping, Sequence

from mithridate.report.detectors import detectors, representatives
from mithridate.report.records import Record
from mithridate.report.rows import Row, groups
from mithridate.report.scores import BOTH, KINDS, WHERE, strongest
from mithridate.report.tables.section import TableSection
from mithridate.report.wording import MISSING, listed, number, with_spread


def detector_tables(rows: Sequence[Row], records: Sequence[Record]) -> list[TableSection]:
    """Every detector against the strongest attack, and the representative ones in every cell; only those with rows.

    Args:
        rows: All rows of the report.
        records: Their scores, as `scores.averaged` gives them.
    """
    cells: dict[Cell, list[Record]] = {}
    for record in records:
        cells.setdefault(tuple(record[name] for name in rows[0].names), []).append(record)
    return [table for table in (_against_strongest(rows, cells), _everywhere(rows, cells)) if not table.empty]


Cell = tuple[object, ...]
"""What a row's `names` say, which is the same columns for all rows of a report."""


def _of(row: Row, cells: Mapping[Cell, Sequence[Record]]) -> Sequence[Record]:
    return cells.get(tuple(row.names.values()), ())


def _against_strongest(rows: Sequence[Row], cells: Mapping[Cell, Sequence[Record]]) -> TableSection:
    shown = [cell[0] for members in groups(rows).values() if (cell := strongest(members)) is not None]
    attacked = [
        (row.subject, record)
        for row in shown
        for phase in WHERE
        for record in _of(row, cells)
        if record["phase"] == phase and record["poisoned_samples"]
    ]
    finest = max((number(record["finest_fpr"]) or 0 for _, record in attacked), default=0)
    which = listed([f"{row.cell} ({row.subject})" if len(shown) > 1 else row.cell for row in shown])
    return TableSection(
        id="detectors",
        heading="Detectors against the strongest attack",
        intro=f"Poisoned samples of {which}, the undefended cell with the largest drop, against the clean twins of all "
        "samples of the same phase and run; mean ± standard deviation over seeds. AUROC: the chance that a poisoned "
        "sample is the more suspicious one (0.5: a coin; below: poisoned samples look the cleaner ones). TPR: share of "
        "the poisoned samples caught, in %, by the threshold that flags at most 1 or 5 % of the clean ones. Scores: "
        "means; lower is more suspicious.",
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
    ).filled([(subject, _cells(record)) for subject, record in attacked])


def _cells(record: Record) -> dict[str, str]:
    scores = {kind: record[f"score_{kind}_mean"] for kind in KINDS}
    return {
        "detector": str(record["detector"]),
        "phase": str(record["phase"]),
        "AUROC": _written(record, "auroc", 2),
        "TPR at 1 %": _written(record, "tpr_at_1", 0, 100),
        "TPR at 5 %": _written(record, "tpr_at_5", 0, 100),
        **{f"score: {KINDS[kind]}": MISSING if mean is None else f"{mean:.3g}" for kind, mean in scores.items()},
        "ratio": _written(record, "ratio", 1),
        "AUROC: other images": _written(record, "auroc_ood", 2),
        "n": str(record["runs"]),
    }


def _everywhere(rows: Sequence[Row], cells: Mapping[Cell, Sequence[Record]]) -> TableSection:
    """Poisoned samples of every cell, phase by phase; of cells without any, other images against the stream's."""
    shown = representatives(detectors(rows))
    lines: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        said = {(str(r["phase"]), str(r["detector"])): r for r in _of(row, cells)}
        shown_of = [(phase, "auroc", what) for phase, what in WHERE.items()]
        shown_of += [] if row.attacking else [(BOTH, "auroc_ood", "other images")]
        for phase, metric, what in shown_of:
            values = [_written(said.get((phase, info.label), {}), metric, 2) for info in shown]
            if set(values) - {MISSING}:
                lines.setdefault(row.subject, []).append((row.attack, row.defence, what, *values))
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
    mean, std = (number(record.get(f"{metric}_{what}")) for what in ("mean", "std"))
    return with_spread(mean, std, digits, scale=scale)
