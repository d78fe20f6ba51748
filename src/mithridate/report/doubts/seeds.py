"""Doubts about what a number rests on: runs that are taken together, their seeds, the samples they are tested on."""

from collections import Counter
from collections.abc import Iterator, Sequence

from mithridate.report.doubts.doubt import ALL_CELLS, Doubt, Severity
from mithridate.report.doubts.rule import rule
from mithridate.report.doubts.selection import runs_with, share_of_runs
from mithridate.report.rows import Row, seed, seeds
from mithridate.report.settings import config_table
from mithridate.report.steadiness import NEGLIGIBLE
from mithridate.report.wording import counted, listed, number, points

MIN_SEEDS = 3
"""Fewer different seeds than this say little about the spread."""


@rule("Shown apart")
def settings_apart(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for runs of the same labels that differ in more than the seed: they are shown apart, and are not pooled."""
    for key in rows[0].apart if rows else ():
        values = list(dict.fromkeys(row.apart[key] for row in rows))
        if len(values) > 1:
            text = f"runs of the same name differ in {key} ({' | '.join(values)}); each value has rows of its own."
            yield Doubt(Severity.NOTE, ALL_CELLS, text)


@rule("Same seed twice")
def duplicate_seeds(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for a seed that occurs twice in one cell: such runs are not independent, yet count in n."""
    for row in rows:
        twice = [str(s) for s, times in Counter(map(seed, row.runs)).items() if s is not None and times > 1]
        if twice:
            text = f"{len(row.runs)} runs, but seed {listed(twice)} more than once; n and ± are too favourable."
            yield Doubt(Severity.SERIOUS, row.cell, text)


@rule("Too few seeds")
def few_seeds(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for cells with fewer than 3 different seeds; with one seed there is no spread at all."""
    cells: dict[tuple[int, str], list[str]] = {}
    for row in rows:
        n = len({seed(run) for run in row.runs})
        if n < MIN_SEEDS:
            cells.setdefault((n, seeds(row.runs)), []).append(row.cell)
    for (n, which), few in cells.items():
        where = ALL_CELLS if len(few) == len(rows) > 1 else ", ".join(few)
        text = f"{counted(n, 'seed')} ({which}); at least {MIN_SEEDS} are needed to see a spread."
        yield Doubt(Severity.SERIOUS if n == 1 else Severity.CAUTION, where, text)


@rule("Few test samples")
def few_test_samples(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for test parts, or subsets read of them, so small that one sample is more than a point of accuracy."""
    runs = [run for row in rows for run in row.runs]
    whole = {number(config_table(run, "data").get("test")) for run in runs}
    subsets = {number(run.summary.get("read_samples")) for run in runs} - whole
    for what, sizes in (("measured", whole), ("read between start and trigger", subsets)):
        for size in sorted(size for size in sizes if size is not None and 0 < size * NEGLIGIBLE < 1):
            text = f"accuracy is {what} on {counted(int(size), 'sample')}: each is {points(1 / size)} points."
            yield Doubt(Severity.CAUTION, ALL_CELLS, text)


@rule("Class unread")
def class_unread(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for subsets of the test part without a sample of some class: what is read there knows nothing of it."""
    for row in rows:
        if runs := runs_with(row, "classes_unread"):
            most = max(int(number(run.summary.get("classes_unread")) or 0) for run in runs)
            text = (
                f"the subset that is measured between start and trigger lacks {counted(most, 'class')} of the test "
                f"part in {share_of_runs(runs, row)}; take a larger evaluate_size."
            )
            yield Doubt(Severity.CAUTION, row.cell, text)
