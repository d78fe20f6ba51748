"""Doubts about what monitors and defences do where nothing is attacked."""

from collections.abc import Iterator, Sequence
from operator import sub

from mithridate.report.comparisons import undefended
from mithridate.report.doubts.doubt import NEGLIGIBLE, Doubt, Severity
from mithridate.report.doubts.rule import rule
from mithridate.report.doubts.selection import runs_with, share_of_runs
from mithridate.report.rows import Row, updates
from mithridate.report.statistic import Statistic, spread


@rule("False alarms")
def false_alarms(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for monitors that raise alarms although nothing is attacked: their alarms elsewhere mean less."""
    for row in rows:
        alarmed = [run for run in row.runs if run.summary.get("alarms")]
        if not row.attacking and alarmed:
            text = f"alarms without an attack in {share_of_runs(alarmed, row)}."
            yield Doubt(Severity.CAUTION, row.cell, text)


@rule("False vetoes")
def false_vetoes(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for defences that refuse steps although nothing is attacked: so many batches are not learned from."""
    for row in rows:
        refusing = runs_with(row, "rolled_back")
        if not row.attacking and refusing:
            refused, total = sum(row.statistic("rolled_back").values), sum(map(updates, row.runs))
            text = f"{refused:g} of {total} steps of a clean stream were refused, in {share_of_runs(refusing, row)}."
            yield Doubt(Severity.CAUTION, row.cell, text)


@rule("Costs accuracy on a clean stream")
def costs_on_clean(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for defences that end a clean stream more than one point below the undefended runs of the same seeds."""
    for row in rows:
        none = undefended(row, rows)
        if row.attacking or none is None:
            continue
        change = row.against(none, "accuracy_after_trigger", sub)
        if change.mean is not None and change.mean < -NEGLIGIBLE:
            cost = Statistic(tuple(-value for value in change.values))
            text = f"costs {spread(cost)} points (n = {cost.n}) of accuracy although nothing is attacked."
            yield Doubt(Severity.CAUTION, row.cell, text)
