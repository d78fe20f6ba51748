"""One case of a fault: what is done, and how it ends."""

from pathlib import Path
from random import Random
from typing import Literal, NamedTuple, Protocol

Outcome = Literal["refused", "redone", "same", "silent", "exception"]
OUTCOMES: tuple[Outcome, ...] = ("refused", "redone", "same", "silent", "exception")
BAD: frozenset[Outcome] = frozenset({"silent", "exception"})

LONGEST = 600
"""Characters of a message to the user, less than."""


class Result(NamedTuple):
    """How a case ended.

    Args:
        outcome: `refused`: in words, by a `UserError` that names what is wrong; `redone`: the right result, by doing
            it anew; `same`: the right result; `silent`: another result, or another state, without a word; `exception`:
            anything else that was raised, a process that died or hung, a message that does not say what it must.
        what: The fault.
        said: The message, or what was wrong.
        size: How many faults of the kind it holds (replies, batches).
    """

    outcome: Outcome
    what: str
    said: str = ""
    size: int = 1


class UnpreparedError(Exception):
    """What all cases of a kind start from cannot be made: with nothing done to it, the library fails."""


class Fault(Protocol):
    """A kind of fault. What all cases share is made once, in its folder; a case depends on its number and the seed."""

    full: int
    """Cases of a full run."""

    def prepare(self) -> None:
        """Make what all cases share; called once, before the first case.

        Raises:
            UnpreparedError: It cannot be made.
        """

    def case(self, number: int, folder: Path) -> Result:
        """Make one fault and look at what comes of it.

        Args:
            number: Which one, >= 0.
            folder: An empty one, for this case alone.
        """


def drawn(kind: str, seed: int, number: int) -> Random:
    """The generator of a case."""
    return Random(f"{kind} {seed} {number}")  # noqa: S311  (no secret)


def exception_of(error: BaseException) -> str:
    """An exception and where it was raised, in one line."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if "mithridate" in f.filename] or frames
    place = f" at {Path(inside[-1].filename).name}:{inside[-1].lineno}" if inside else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"
