"""The end of the time: between steps, in the middle of what asks nobody, and in a thread."""

import signal
import threading
import time
from contextlib import suppress

import pytest

from mithridate.audit.deadline import BudgetSpentError, Deadline


def test_what_asks_nobody_is_ended_and_the_alarm_is_given_back() -> None:
    before = signal.getsignal(signal.SIGALRM)
    began = time.monotonic()
    with pytest.raises(BudgetSpentError), Deadline(0.05).interrupting(), suppress(Exception):  # as users may well do
        time.sleep(60)
    assert time.monotonic() - began < 10
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_ends_in_time_is_not_disturbed() -> None:
    deadline = Deadline(60)
    with deadline.interrupting():
        deadline.check()
    assert 0 < deadline.left <= 60
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_in_a_thread_the_time_is_looked_at_afterwards() -> None:
    ended: list[type[BaseException]] = []

    def work() -> None:
        try:
            with Deadline(0.01).interrupting():
                time.sleep(0.05)
        except BudgetSpentError as error:
            ended.append(type(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [BudgetSpentError]
