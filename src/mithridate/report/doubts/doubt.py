"""A doubt: one reason not to trust a number."""

from dataclasses import dataclass
from enum import StrEnum

ALL_CELLS = "all cells"


class Severity(StrEnum):
    """How much a doubt takes away, the gravest first."""

    SERIOUS = "serious"
    CAUTION = "caution"
    NOTE = "note"

    @property
    def rank(self) -> int:
        """Its place among them, 0 for the gravest."""
        return list(Severity).index(self)


@dataclass(frozen=True)
class Doubt:
    """One reason not to trust a number.

    Args:
        severity: How much it takes away.
        cell: Attack and defence concerned, or `ALL_CELLS`.
        text: What was found, with numbers.
    """

    severity: Severity
    cell: str
    text: str
