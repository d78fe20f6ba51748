"""The time that an audit may take."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class BudgetSpentError(BaseException):
    """The time is over; no `Exception`, so that a user's code does not catch it by accident."""


class Deadline:
    """When the time is over.

    Args:
        seconds: From now on, > 0.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left; at least 0."""
        return max(0.0, self._end - time.monotonic())

    def check(self) -> None:
        """Ask between steps and runs.

        Raises:
            BudgetSpentError: The time is over.
        """
        if not self.left:
            raise BudgetSpentError

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """End the block when the time is over, wherever Python stands in it.

        For code that asks nobody, such as the user's. It works where there are timers (not on Windows) and in the main
        thread; elsewhere the time is looked at when the block has ended.

        Raises:
            BudgetSpentError: The time is over.
        """
        self.check()
        if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
            yield
            self.check()
            return

        def over(number: int, frame: FrameType | None) -> None:
            raise BudgetSpentError

        before = signal.signal(signal.SIGALRM, over)
        signal.setitimer(signal.ITIMER_REAL, max(self.left, 1e-3))  # zero would switch it off
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
