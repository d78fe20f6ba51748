"""Which rows and runs a rule speaks of."""

from collections.abc import Iterable, Sequence

from mithridate.bench.store import Run
from mithridate.report.rows import Row, seeds
from mithridate.report.wording import counted, noun_of, number


def share_of_runs(some: Sequence[Run], row: Row) -> str:
    """How many of a row's runs these are, and which, in words: 1 of 3 runs (seed 2)."""
    return f"{len(some)} of {counted(len(row.runs), 'run')} ({noun_of(len(some), 'seed')} {seeds(some)})"


def runs_with(row: Row, metric: str) -> list[Run]:
    """The runs whose summary counts at least one of `metric`."""
    return [run for run in row.runs if number(run.summary.get(metric))]


def claiming_rows(rows: Iterable[Row]) -> list[Row]:
    """The rows of attacks that ought to break something: neither `clean` nor the noise."""
    return [row for row in rows if row.claims_drop]


def unopposed_rows(rows: Iterable[Row]) -> list[Row]:
    """Undefended attacks, and defended ones that were not run undefended: where both are, the defended one may fail."""
    claiming = claiming_rows(rows)
    bare = {row.attack for row in claiming if row.defence_name == "none"}
    return [row for row in claiming if row.defence_name == "none" or row.attack not in bare]
