"""Doubts about the model that learned: where it started, what it learned from, what broke it besides the attack."""

from collections.abc import Iterator, Sequence

from mithridate.report.doubts.doubt import ALL_CELLS, Doubt, Severity
from mithridate.report.doubts.rule import rule
from mithridate.report.doubts.selection import claiming_rows, runs_with, share_of_runs
from mithridate.report.rows import Row
from mithridate.report.steadiness import NEGLIGIBLE
from mithridate.report.wording import counted, points

BUFFER_SHARE = 0.5
"""From this share of the drop on, BatchNorm statistics explain it."""


@rule("Explained by BatchNorm statistics")
def buffers_explain(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for drops of which BatchNorm statistics alone explain half: buffers replaced, parameters as before."""
    for row in claiming_rows(rows):
        lost = row.difference("accuracy_before_trigger", "accuracy_after_buffers").mean
        drop = row.statistic("drop").mean
        if lost is not None and drop is not None and drop > NEGLIGIBLE and lost >= BUFFER_SHARE * drop:
            text = (
                f"replacing only the buffers (BatchNorm statistics) costs {points(lost)} of the {points(drop)} points; "
                "the poisoned update of the parameters is not what broke the model."
            )
            yield Doubt(Severity.SERIOUS, row.cell, text)


@rule("Diverged")
def diverged(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for runs whose loss became NaN: a collapse of training, which counts in the means."""
    for row in rows:
        if runs := row.with_status("diverged"):
            text = f"{share_of_runs(runs, row)} diverged; the accuracies as measured count in the means."
            yield Doubt(Severity.SERIOUS, row.cell, text)


@rule("Quarantined samples")
def quarantined(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for samples, or clients' updates, with NaN or infinite numbers: the model learned from fewer."""
    for row in rows:
        if runs := runs_with(row, "quarantined"):
            n = f"{sum(row.statistic('quarantined').values):g}"
            what = f"{counted(n, 'update')} of clients" if row.federated else counted(n, "sample")
            numbers = "entries" if row.federated else "pixels"
            text = f"{what} with NaN or infinite {numbers} kept from the model in {share_of_runs(runs, row)}."
            yield Doubt(Severity.NOTE, row.cell, text)


@rule("Unequal starts")
def starts_differ(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for cells that are compared although their mean start accuracies differ by more than one point."""
    starts = {row.cell: start for row in rows if (start := row.statistic("accuracy_start").mean) is not None}
    if not starts:
        return
    low, high = min(starts, key=starts.__getitem__), max(starts, key=starts.__getitem__)
    if starts[high] - starts[low] > NEGLIGIBLE:
        text = (
            f"start accuracies span {points(starts[low])} % ({low}) to {points(starts[high])} % ({high}): "
            "drops of unlike models are compared."
        )
        yield Doubt(Severity.CAUTION, ALL_CELLS, text)
