"""Doubts about the software and hardware that runs were made with."""

from collections.abc import Iterator, Mapping, Sequence

from mithridate.report.doubts.doubt import ALL_CELLS, Doubt, Severity
from mithridate.report.doubts.rule import rule
from mithridate.report.doubts.selection import share_of_runs
from mithridate.report.rows import Row
from mithridate.report.settings import flattened, shared, varying
from mithridate.report.wording import listed, one_line

NOT_OF_THE_MACHINE = ("cpus", "burn_in", "surrogate", "resumed")
"""The entries of `environment.json` that are no difference between machines: how many cores there are, and what was
another within one run, of which there is a rule of its own."""


@rule("Unequal machines")
def versions_mixed(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for different versions or devices behind results that are compared."""
    runs = [run for row in rows for run in row.runs]
    tables = [
        flattened({key: value for key, value in run.environment.items() if key not in NOT_OF_THE_MACHINE})
        for run in runs
    ]
    if mixed := varying(tables, shared(tables)):
        text = "; ".join(f"{key}: {values}" for key, values in mixed.items())
        yield Doubt(Severity.CAUTION, ALL_CELLS, f"the runs were made with unlike software or hardware: {text}.")


@rule("Made in two places")
def made_in_two_places(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for runs whose burn-in, surrogate or first part was made by other software, threads or hardware."""
    for what, key in (
        ("started from a burn-in", "burn_in"),
        ("crafted on a surrogate", "surrogate"),
        ("went on with a part", "resumed"),
    ):
        changed = {id(run): _changed_environment(run.environment.get(key)) for row in rows for run in row.runs}
        for row in rows:
            some = [run for run in row.runs if changed[id(run)]]
            if some:
                names = listed(list(dict.fromkeys(name for run in some for name in changed[id(run)])))
                text = (
                    f"{share_of_runs(some, row)} {what} of another environment ({names}): their bits are of no one "
                    "machine."
                )
                yield Doubt(Severity.CAUTION, row.cell, text)


def _changed_environment(entry: object) -> list[str]:
    """What differed, as `key: here, there`."""
    tables = entry if isinstance(entry, list) else [entry]
    return [
        f"{one_line(key)}: {one_line(value)}"
        for table in tables
        if isinstance(table, Mapping)
        for key, value in table.items()
        if key != "after_step"
    ]
