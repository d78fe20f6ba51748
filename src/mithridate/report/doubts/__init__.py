"""The report doubts itself: what in the results is not trustworthy, rule by rule."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mithridate.report.doubts.doubt import Doubt, Severity
from mithridate.report.doubts.rules import RULES
from mithridate.report.rows import Row, groups
from mithridate.report.wording import counted


@dataclass(frozen=True)
class Examined:
    """What one rule found.

    Args:
        title: The rule in a few words.
        meaning: What the rule looks for.
        doubts: The gravest first; empty if there was nothing.
    """

    title: str
    meaning: str
    doubts: tuple[Doubt, ...]


def examine(rows: Sequence[Row]) -> list[Examined]:
    """Ask every rule about every group of rows that are compared.

    Args:
        rows: All rows of the report.

    Returns:
        One answer a rule, those with the gravest doubts first, those without doubts last; in each, the gravest doubt
        first.
    """
    compared = groups(rows)
    answers = []
    for rule in RULES:
        doubts = []
        for members in compared.values():
            where = f"{members[0].subject}: " if len(compared) > 1 else ""
            doubts += [replace(doubt, cell=where + doubt.cell) for doubt in rule(members)]
        doubts.sort(key=lambda doubt: doubt.severity.rank)
        answers.append(Examined(rule.title, rule.meaning, tuple(doubts)))
    return sorted(answers, key=lambda a: a.doubts[0].severity.rank if a.doubts else len(Severity))


def tally(answers: Sequence[Examined]) -> str:
    """How many doubts there are, in all and by severity."""
    severities = [doubt.severity for answer in answers for doubt in answer.doubts]
    counts = [(severity, severities.count(severity)) for severity in Severity]
    each = ", ".join(f"{count} {severity.value}" for severity, count in counts if count)
    return f"{counted(len(severities), 'doubt')}{f': {each}' if each else ''}."
