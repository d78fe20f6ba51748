"""Doubts about what monitors and defences do where nothing is attacked."""

from collections.abc import Iterator, Sequence
from operator import sub

from mithridate.report.comparisons import undefended
from mithridate.report.doubts.doubt import Doubt, Severity
from mithridate.report.doubts.rule import rule
from mithridate.report.doubts.selection import claiming_rows, runs_with, share_of_runs
from mithridate.report.rows import Row, updates
from mithridate.report.statistic import Statistic, spread
from mithridate.report.steadiness import NEGLIGIBLE, clean_stream
from mithridate.report.wording import points

OFTEN = 0.05
"""Share of a clean stream's steps beyond which what they do is no rarity."""


@rule("A clean stream does it too")
def clean_falls_as_far(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for drops that single steps of a clean stream reach, too: more than one in twenty, or any of them."""
    for row in claiming_rows(rows):
        clean, drop = clean_stream(row, rows), row.statistic("drop").mean
        if clean is None or drop is None or drop <= 0:
            continue
        some, steps = clean.as_far(drop)
        if some:
            text = (
                f"{some} of {steps} steps of a clean stream cost {points(drop)} points or more, as the trigger does: "
                "the stream is not steady; lower its rate, or let that of the burn-in fall."
            )
            yield Doubt(Severity.SERIOUS if some / steps > OFTEN else Severity.CAUTION, row.cell, text)


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
