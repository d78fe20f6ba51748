"""The numbers as files: one record a cell or a run, in full precision."""

import csv
import io
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from mithridate.report.rows import Row, seed
from mithridate.report.statistic import Statistic
from mithridate.report.wording import number, one_line, spreadsheet_safe

METRICS = (
    "accuracy_start",
    "accuracy_before_trigger",
    "accuracy_after_trigger",
    "accuracy_after_buffers",
    "drop",
    "steps",
    "alarms",
    "seconds",
)
"""The numbers of `summary.json` that are averaged over seeds; accuracies and the drop are fractions."""

RUN_METRICS = (
    *METRICS,
    "read_step",
    "read_accuracy",
    "read_samples",
    "rolled_back",
    "quarantined",
    "flagged_clean",
    "flagged_poisoned",
    "update_seconds",
)
"""The numbers of `summary.json` that `runs.csv` lists; older stores lack the last ones."""

Record = Mapping[str, str | float | int | None]


def means(statistics: Mapping[str, Statistic]) -> dict[str, float | int | None]:
    """Mean, standard deviation and n of each quantity, every one a column."""
    return {
        f"{name}_{what}": value
        for name, statistic in statistics.items()
        for what, value in (("mean", statistic.mean), ("std", statistic.std), ("n", statistic.n))
    }


def summary_records(rows: Sequence[Row]) -> list[Record]:
    """One record a cell: names, number of runs by outcome, and mean, std and n of every metric."""
    return [
        {
            **row.names,
            "runs": len(row.runs),
            **{status: len(row.with_status(status)) for status in ("diverged", "halted")},
            **means({metric: row.statistic(metric) for metric in METRICS}),
        }
        for row in rows
    ]


def run_records(rows: Sequence[Row]) -> list[Record]:
    """One record a run: names, outcome and every metric."""
    return [
        {
            "run": one_line(run.path.name),
            **row.names,
            "seed": seed(run),
            "status": one_line(run.summary.get("status", "")),
            "stopped_by": one_line(run.summary.get("stopped_by", "")),
            "first_alarm_step": number(run.summary.get("first_alarm_step")),
            **{metric: number(run.summary.get(metric)) for metric in RUN_METRICS},
        }
        for row in rows
        for run in row.runs
    ]


def as_files(name: str, records: Sequence[Record]) -> dict[str, str | bytes]:
    """Records as CSV and as Parquet, by the names of the files; nothing if there are no records.

    Args:
        name: Of the files, without ending.
        records: All with the same columns.
    """
    return {f"{name}.csv": to_csv(records), f"{name}.parquet": to_parquet(records)} if records else {}


def to_parquet(records: Sequence[Record]) -> bytes:
    """One record or more as Parquet: names as they are, numbers in full precision, null where there is none."""
    columns = {name: [record[name] for record in records] for name in records[0]}
    data = io.BytesIO()
    pq.write_table(pa.table({name: _array(values) for name, values in columns.items()}), data)
    return data.getvalue()


def _array(values: Sequence[str | float | int | None]) -> pa.Array:
    """A column of whole numbers, of numbers, or of text."""
    if any(isinstance(value, float) for value in values):
        return pa.array(values, pa.float64())
    return pa.array(values)


def to_csv(records: Sequence[Record]) -> str:
    """One record or more as CSV: full precision, nothing where there is no number, names that no spreadsheet evaluates.

    Args:
        records: All with the same columns.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({k: spreadsheet_safe(v) if isinstance(v, str) else v for k, v in record.items()})
    return text.getvalue()
