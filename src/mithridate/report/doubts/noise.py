"""Doubts whether an attack did more than chance would have: against random noise, and against zero."""

from collections.abc import Iterator, Sequence

from mithridate.report.comparisons import noise_bar, noise_of
from mithridate.report.doubts.doubt import Doubt, Severity
from mithridate.report.doubts.rule import rule
from mithridate.report.doubts.selection import claiming_rows, unopposed_rows
from mithridate.report.rows import Row, step_noun
from mithridate.report.statistic import spread
from mithridate.report.wording import listed, noun_of


@rule("No better than noise")
def no_better_than_noise(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for attacks whose mean drop is not above the mean plus one std of random noise under the same defence."""
    for row in unopposed_rows(rows):
        drop, noise, bar = row.statistic("drop"), noise_of(row, rows), noise_bar(row, rows)
        if drop.mean is not None and noise is not None and bar is not None and drop.mean <= bar:
            text = f"drop {spread(drop)} points, noise {spread(noise.statistic('drop'))} points: no better than noise."
            yield Doubt(Severity.SERIOUS, row.cell, text)


@rule("Includes zero")
def includes_zero(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for attacks whose drop, mean ± std over seeds, includes zero."""
    for row in unopposed_rows(rows):
        drop = row.statistic("drop")
        if drop.mean is not None and drop.std is not None and drop.mean - drop.std <= 0 <= drop.mean + drop.std:
            text = f"drop {spread(drop)} points (n = {drop.n}) includes zero: no effect that these seeds can show."
            yield Doubt(Severity.CAUTION, row.cell, text)


@rule("No noise baseline")
def no_noise_baseline(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for defences under which no random noise was run: nothing says that the attack is more than that."""
    without: dict[str, list[str]] = {}
    claiming = claiming_rows(rows)
    for defence in dict.fromkeys(row.defence for row in claiming):
        attacks = [row for row in claiming if row.defence == defence]
        if noise_of(attacks[0], rows) is None:
            without.setdefault(listed([row.attack for row in attacks]), []).append(defence)
    equal = "as many hostile clients" if step_noun(rows) == "round" else "the same eps"
    for names, defences in without.items():
        text = f"no noise baseline for {names}; add the attack noise with {equal}."
        yield Doubt(Severity.CAUTION, f"{noun_of(len(defences), 'defence')} {listed(defences)}", text)
