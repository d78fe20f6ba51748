"""Several trackers as one, none of which can stop a training. Imports no torch."""

import logging
from collections.abc import Iterable

from mithridate.core.errors import said
from mithridate.guard.record import StepRecord, Tracker

log = logging.getLogger("mithridate")


class Trackers:
    """Tells every tracker; what one of them raises is said once, and the others hear of the record all the same.

    Args:
        members: The trackers, in the order in which they are told.
    """

    def __init__(self, members: Iterable[Tracker]) -> None:
        self._members = tuple(members)
        self._failed: set[int] = set()

    def note(self, record: StepRecord) -> None:
        """Tell all of them of one record."""
        for number, tracker in enumerate(self._members):
            try:
                tracker.note(record)
            except Exception as error:
                self._say(number, error)

    def close(self) -> None:
        """Let all of them write what is not written yet."""
        for number, tracker in enumerate(self._members):
            try:
                tracker.close()
            except Exception as error:
                self._say(number, error)

    def _say(self, number: int, error: Exception) -> None:
        if number not in self._failed:
            log.warning(
                "guard: the tracker %s raised %s: %s; training goes on, and this is not said again.",
                type(self._members[number]).__name__,
                type(error).__name__,
                said(error),
            )
        self._failed.add(number)
