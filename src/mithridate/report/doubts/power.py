"""Doubts about the attacker's power: whether attacks that are compared were allowed the same, and kept to it."""

from collections.abc import Iterator, Sequence

from mithridate.report.comparisons import BUDGET_KEYS, FEDERATED_BUDGET_KEYS, budget
from mithridate.report.doubts.doubt import ALL_CELLS, Doubt, Severity
from mithridate.report.doubts.rule import rule
from mithridate.report.rows import Row
from mithridate.report.settings import flattened
from mithridate.report.wording import listed, number

ROUNDING = 1e-4
"""How far beyond its eps a pixel may lie by rounding in single precision, or in half."""


@rule("Unequal budgets")
def budgets_differ(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for attacks with different budgets (eps, norm, poison ratio, the trigger's length) side by side."""
    for key in dict.fromkeys((*BUDGET_KEYS, *FEDERATED_BUDGET_KEYS)):
        cells: dict[str, list[str]] = {}
        for row in rows:
            for value in budget(row).get(key, ()) if row.attacking else ():
                cells.setdefault(value, []).append(row.attack)
        if len(cells) > 1:
            each = "; ".join(f"{value}: {', '.join(dict.fromkeys(attacks))}" for value, attacks in cells.items())
            yield Doubt(Severity.CAUTION, ALL_CELLS, f"{key} differs ({each}); a larger budget breaks more.")


@rule("Left its ball")
def left_its_ball(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for attacks that moved a pixel further than their eps, as the released trigger does, whose ball drifts."""
    for row in rows:
        eps = number(row.attack_settings.get("eps"))
        moved = [c for run in row.runs for step in run.trace if (c := number(step.get("poison_linf"))) is not None]
        if row.attacking and eps is not None and moved and max(moved) > eps * (1 + ROUNDING) + ROUNDING:
            text = (
                f"a pixel was moved by {max(moved):.3g}, and eps is {eps:.3g}: no attack that keeps to it is its like."
            )
            yield Doubt(Severity.CAUTION, row.cell, text)


@rule("Power over the optimiser")
def power_over_optimiser(rows: Sequence[Row]) -> Iterator[Doubt]:
    """Looks for attacks that set the victim's momentum: power over the optimiser, which data alone does not give."""
    for row in rows:
        momenta = {flattened(run.config).get("attack.weight_momentum") for run in row.runs} - {None}
        if row.attacking and momenta:
            values = listed(sorted(map(str, momenta)))
            text = f"the attack sets the victim's momentum to {values} in the accumulative phase."
            yield Doubt(Severity.NOTE, row.cell, text)
