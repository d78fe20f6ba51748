"""Doubts whether an attack was tried as hard as it could be: by its own objective."""

from collections.abc import Iterator, Sequence

from mithridate.report.doubts.doubt import Doubt, Severity
from mithridate.report.doubts.rule import rule
from mithridate.report.doubts.selection import claiming_rows
from mithridate.report.rows import Row, step_noun
from mithridate.report.wording import counted, number


@rule("Own objective fell")
def objective_fell(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for attacks whose crafting mostly left the function that it climbs lower than it found it."""
    for row in claiming_rows(rows):
        ends = [
            (start, end)
            for run in row.runs
            for step in run.trace
            if (start := number(step.get("objective_start"))) is not None
            and (end := number(step.get("objective_end"))) is not None
        ]
        fell = sum(end < start for start, end in ends)
        if 2 * fell > len(ends):
            start, end = (sum(pair[i] for pair in ends) / len(ends) for i in (0, 1))
            text = (
                f"in {fell} of {counted(len(ends), step_noun([row]))} its objective ended below where it began (on "
                f'average {start:.4g} -> {end:.4g}): its steps overshoot, and a better ascent, `optimiser = "apgd"` or '
                "more `steps`, is another attack."
            )
            yield Doubt(Severity.SERIOUS, row.cell, text)
