"""What can go wrong by the user's hand. Every message says what happened, where, and what to do."""

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


LONGEST = 599
"""Characters of a message at most."""


class UserError(Exception):
    """A mistake that the user can mend; the command line prints it without a traceback and exits with 2.

    Args:
        message: What happened, where, and what to do. The middle of one that is too long is left out.
    """

    def __init__(self, message: str = "") -> None:
        too_long = len(message) > LONGEST
        super().__init__(f"{message[: LONGEST - 205]} ... {message[-200:]}" if too_long else message)


class ConfigError(UserError):
    """A recipe, a setting or the name of a component is wrong."""


class DataError(UserError):
    """A data set is missing, too short, or holds values it must not hold."""


class CheckpointError(UserError):
    """A checkpoint is corrupt, foreign, or does not fit the model."""


class DeviceError(UserError):
    """The asked device is not on this machine."""


class StoreError(UserError):
    """A run directory is in the way, unreadable or incomplete."""


class WriteError(UserError):
    """A file cannot be written: the disk is full, a folder is read-only, or something is in the way."""


class BusyError(UserError):
    """Another process is writing in the same place."""


class ComponentError(UserError):
    """A component from elsewhere raised an error of its own."""


class EngineError(UserError):
    """The processes or machines that runs are handed to cannot be had."""


class ThreatModelError(UserError):
    """A component looked at something that it does not declare in its `needs`."""


def shown(value: object, most: int = 100) -> str:
    """A value from outside in a message: as it is written, on one line, cut if it is long.

    Args:
        value: Whatever a stranger wrote.
        most: Characters that are shown of it.

    >>> shown("epz"), shown([0] * 1000, 10)
    ("'epz'", '[0, 0, 0, ...')
    """
    try:
        text = repr(value)
    except Exception:  # a number too long to be written, nesting too deep, an object that cannot say what it is
        return f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}..."


def said(error: BaseException) -> str:
    r"""What an error says, on one line and without its last full stop, cut if it is long.

    >>> said(ValueError("why\nnot.")), said(ValueError())
    ('why not', 'it says no more')
    """
    try:
        text = " ".join(str(error).split())
    except Exception:  # an error that cannot say what it is
        return shown(error)
    return f"{text[:300]}..." if len(text) > 300 else text.rstrip(".") or "it says no more"


def nearest(name: str, known: "Iterable[str]") -> str:
    """The end of an error message: the closest known name, and all of them.

    Args:
        name: What the user wrote.
        known: What would have been right.

    >>> nearest("epz", ["eps", "steps"])
    "did you mean 'eps'? Known: eps, steps."
    """
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    guess = f"did you mean '{close[0]}'? " if close else ""
    return f"{guess}Known: {', '.join(names) or 'none'}."
