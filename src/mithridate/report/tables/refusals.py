"""What a guard refused: why and how often, step by step, and what lies in quarantine."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from mithridate.guard.entry import Quarantined
from mithridate.guard.step_log import Logged
from mithridate.report.tables.section import TableSection
from mithridate.report.wording import MISSING, counted, number, one_line

MOST_STEPS = 200
"""Steps that the page lists; the log has all."""

_NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")


@dataclass
class Reason:
    """Steps that were not admitted for reasons which differ in their figures alone.

    Args:
        words: The reason of the first one.
        verdict: What became of them.
        attempts: Which they are.
    """

    words: str
    verdict: str
    attempts: list[int] = field(default_factory=list)


def reasons(steps: Sequence[Logged]) -> list[Reason]:
    """Why steps were not admitted, the most frequent reason first.

    Args:
        steps: Of one rank, in order.
    """
    by_kind: dict[tuple[str, str], Reason] = {}
    for step in steps:
        record = step.record
        if record.verdict != "admitted":
            words = one_line(record.reason) or "no reason given"
            kind = record.verdict, _NUMBER.sub("#", words)
            by_kind.setdefault(kind, Reason(words, record.verdict)).attempts.append(record.attempt)
    return sorted(by_kind.values(), key=lambda reason: -len(reason.attempts))


def reasons_table(by_rank: Mapping[int, Sequence[Logged]]) -> TableSection:
    """One row a reason, of every rank by itself.

    Args:
        by_rank: Steps by rank.
    """
    lines = [
        (
            f"rank {rank}",
            {
                "why": reason.words,
                "verdict": reason.verdict,
                "steps": str(len(reason.attempts)),
                "first": str(reason.attempts[0]),
                "last": str(reason.attempts[-1]),
            },
        )
        for rank, steps in by_rank.items()
        for reason in reasons(steps)
    ]
    return TableSection(
        "why",
        "Why",
        "Reasons that differ in their figures alone are one row, with the figures of the first time. First, last: "
        "attempted steps.",
        bold=2,
        about="rank",
    ).filled(lines)


def steps_table(by_rank: Mapping[int, Sequence[Logged]]) -> TableSection:
    """One row a step that was not admitted as it was, the newest first.

    Args:
        by_rank: Steps by rank.
    """
    odd = [step for steps in by_rank.values() for step in steps if step.record.verdict != "admitted"]
    odd.sort(key=lambda step: (-step.record.attempt, step.record.rank))
    several = len(by_rank) > 1
    lines = []
    for step in odd[:MOST_STEPS]:
        record = step.record
        cells = {
            "attempt": str(record.attempt),
            **({"rank": str(record.rank)} if several else {}),
            "verdict": record.verdict,
            "why": one_line(record.reason) or MISSING,
            "time (UTC)": when(step.time),
            "in a row": str(record.refusals_in_a_row) if record.refusals_in_a_row else MISSING,
            "trusted loss": _written(record.trusted_loss),
            "worst class (%)": _written(record.trusted_worst, scale=100),
            "flagged": str(record.flagged or MISSING),
            "taken out": str(record.quarantined or MISSING),
        }
        lines.append(("", cells))
    left_out = len(odd) - len(lines)
    return TableSection(
        "steps",
        "Step by step",
        "Steps that were refused or shortened, the newest first. Loss and worst class are those of the trusted set, in "
        "the state that the step led to. Flagged: samples that the defence corrected, dropped or weighed less; taken "
        "out: samples that are not finite, outside the domain or of an unknown class.",
        note=f"{counted(left_out, 'older step')} not shown; the log has all." if left_out else "",
        names=3 + several,
    ).filled(_without_empty_columns(lines))


def quarantine_table(entries: Sequence[Quarantined]) -> TableSection:
    """One row a batch in quarantine, the newest first.

    Args:
        entries: All batches.
    """
    lines = []
    for entry in sorted(entries, key=lambda entry: -entry.attempt)[:MOST_STEPS]:
        finite = [score for score in entry.scores or () if number(score) is not None]
        cells = {
            "id": entry.id,
            "why": one_line(f"damaged: {entry.problem}" if entry.problem else entry.reason) or MISSING,
            "samples": str(entry.size or MISSING),
            "kB": f"{entry.bytes / 1000:.0f}",
            "lowest score": _written(min(finite, default=None)),
            "highest score": _written(max(finite, default=None)),
        }
        lines.append(("", cells))
    left_out = len(entries) - len(lines)
    shapes = {_shapes(entry) for entry in entries if entry.shapes}
    notes = [
        f"Each holds {', '.join(shapes)}." if len(shapes) == 1 else "",
        f"{counted(left_out, 'batch')} of earlier steps not shown; mithridate quarantine list shows all."
        if left_out
        else "",
    ]
    return TableSection(
        "quarantine",
        "In quarantine",
        "Batches that are kept until somebody has looked at them: mithridate quarantine show, release or drop, with an "
        "id of these.",
        note=" ".join(filter(None, notes)),
    ).filled(_without_empty_columns(lines))


def _shapes(entry: Quarantined) -> str:
    return "; ".join(f"{one_line(name)} {one_line(shape)}" for name, shape in entry.shapes.items())


def _without_empty_columns(lines: Sequence[tuple[str, Mapping[str, str]]]) -> list[tuple[str, Mapping[str, str]]]:
    """Rows without the cells that no row fills."""
    filled = {name for _, cells in lines for name, cell in cells.items() if cell != MISSING}
    return [(about, {name: cell for name, cell in cells.items() if name in filled}) for about, cells in lines]


def when(seconds: float) -> str:
    """A time as a date and a time of day, to the second; a dash for what can be none.

    >>> when(0.0), when(1e30)
    ('1970-01-01 00:00:00', '—')
    """
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return MISSING


def _written(value: float | None, scale: float = 1) -> str:
    if value is None:
        return MISSING
    return f"{scale * value:.4g}"
