"""A rule: one question that a report asks of its own numbers."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mithridate.report.doubts.doubt import Doubt
from mithridate.report.rows import Row

Find = Callable[[Sequence[Row]], Iterable[Doubt]]


@dataclass(frozen=True)
class Rule:
    """A pure function from rows that are compared with each other (same data set and model) to its doubts.

    Rules about what attacks did skip the controls, `clean` and `noise`: nobody claims a drop for those.

    Args:
        title: The rule in a few words.
        meaning: What it looks for, a sentence that stands in the report.
        find: The doubts of some rows, each with its numbers.
    """

    title: str
    meaning: str
    find: Find

    def __call__(self, rows: Sequence[Row]) -> list[Doubt]:
        """All doubts that it has about these rows; empty if there is none."""
        return list(self.find(rows))


def rule(title: str) -> Callable[[Find], Rule]:
    """Make a function a rule; the first line of its docstring is what the report says of it.

    Args:
        title: The rule in a few words.
    """

    def made(find: Find) -> Rule:
        return Rule(title, (find.__doc__ or "").partition("\n")[0], find)

    return made
