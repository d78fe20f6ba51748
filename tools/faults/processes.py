"""Cases in processes of their own: whatever one does, dies of or hangs in, the others go on.

A child is forked from a parent that has imported the library and computed nothing, so it starts in milliseconds.
"""

import importlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.faults.case import Fault, Result, UnpreparedError, exception_of

MEMORY = 6 << 30
"""Bytes of address space of a child: what asks for more fails by itself, and not the machine."""


def forked(work: Callable[[], Any], *, limit: float, on_start: Callable[[int], None] | None = None) -> tuple[Any, str]:
    """Call a function in a child: what it returned (a JSON value), or None and what it raised or how the child died.

    Args:
        work: What to do.
        limit: Seconds, after which the child is killed.
        on_start: Called with the child's process id.
    """
    reading, writing = os.pipe()

    def told(send: Callable[[Any], None]) -> None:
        try:
            answer = work(), ""
        except Exception as error:  # whatever the library raises: that is what is looked for
            answer = None, exception_of(error)
        send(answer)

    pid = _child(writing, reading, told)
    os.close(writing)
    if on_start:
        on_start(pid)
    text, whole = _read(reading, time.monotonic() + limit)
    os.close(reading)
    if not whole:
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if not whole:
        return None, f"it hung for {limit:g} s"
    if os.WIFSIGNALED(status):
        return None, signal.Signals(os.WTERMSIG(status)).name
    answer: tuple[Any, str] = (
        tuple(json.loads(text)) if text else (None, f"exit code {os.waitstatus_to_exitcode(status)}")
    )
    return answer


def killed_after(work: Callable[[], Any], seconds: float, *, limit: float) -> str:
    """Call a function in a child that is killed some time later: how the child died, empty if it had ended before.

    Args:
        work: What to do.
        seconds: Until SIGKILL.
        limit: Seconds, after which it is killed anyway.
    """

    def kill_later(pid: int) -> None:
        def kill() -> None:
            time.sleep(seconds)
            os.kill(pid, signal.SIGKILL)  # nobody has waited for it, so the number is still its own

        thread = threading.Thread(target=kill)
        thread.start()
        threads.append(thread)

    threads: list[threading.Thread] = []
    _, died = forked(work, limit=limit, on_start=kill_later)
    threads[0].join()
    return died


def import_what(work: Callable[[], Any], *, limit: float) -> Any:  # noqa: ANN401  (any JSON value)
    """Import in this process what a child needs for some work, so that later children find it there.

    Args:
        work: Done once, in a child, with nothing done to it.
        limit: Seconds, after which the child is killed.

    Returns:
        What the work returned.

    Raises:
        UnpreparedError: It raised something, died or hung.
    """
    told, died = forked(lambda: (work(), list(sys.modules)), limit=limit)
    if died:
        raise UnpreparedError(died)
    answer, needed = told
    for name in needed:
        if name not in sys.modules:
            with suppress(Exception):  # some modules are made at run time, and cannot be imported by name
                importlib.import_module(name)
    return answer


def _child(writing: int, reading: int, work: Callable[[Callable[[Any], None]], None]) -> int:
    """Fork; the child works, sends JSON lines and leaves without cleaning up what is its parent's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which have nothing to do yet
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        warnings.simplefilter("ignore")

        def send(value: Any) -> None:  # noqa: ANN401  (any JSON value)
            data = (json.dumps(value) + "\n").encode()
            while data:
                data = data[os.write(writing, data) :]

        work(send)
        code = 0
    finally:
        os._exit(code)


def _read(reading: int, until: float) -> tuple[str, bool]:
    """All that a pipe gives, and whether it was closed in time."""
    data = b""
    while (left := until - time.monotonic()) > 0:
        if select.select([reading], [], [], left)[0]:
            piece = os.read(reading, 1 << 16)
            if not piece:
                return data.decode(), True
            data += piece
    return data.decode(), False


@dataclass
class _Worker:
    pid: int
    reading: int
    numbers: list[int]
    since: float = field(default_factory=time.monotonic)
    text: bytes = b""


def results(
    fault: Fault, numbers: Iterable[int], folder: Path, *, jobs: int, chunk: int, limit: float
) -> Iterator[tuple[int, Result]]:
    """Each case's number and how it ended, as they end.

    Args:
        fault: Whose cases.
        numbers: Which ones.
        folder: Where cases have folders of their own.
        jobs: Processes at a time.
        chunk: Cases that one process goes through.
        limit: Seconds of a case; one that takes longer hangs.
    """
    left = list(numbers)
    workers: list[_Worker] = []
    while left or workers:
        while left and len(workers) < jobs:
            some, left = left[:chunk], left[chunk:]
            workers.append(_start(fault, some, folder))
        ready, _, _ = select.select([w.reading for w in workers], [], [], 0.5)
        for worker in list(workers):
            ended = False
            if worker.reading in ready:
                piece = os.read(worker.reading, 1 << 16)
                ended = not piece
                *lines, worker.text = (worker.text + piece).split(b"\n")
                for line in lines:
                    number, *values = json.loads(line)
                    worker.numbers.remove(number)
                    worker.since = time.monotonic()
                    yield number, Result(*values)
            hung = time.monotonic() - worker.since > limit
            if not (ended or hung):
                continue
            if hung:
                os.killpg(worker.pid, signal.SIGKILL)
            status = os.waitpid(worker.pid, 0)[1]
            os.close(worker.reading)
            workers.remove(worker)
            if worker.numbers:
                number, *others = worker.numbers
                left = others + left
                died = f"the process hung for {limit:g} s" if hung else f"the process died, status {status}"
                yield number, Result("exception", "(the case gave no answer)", died)


def _start(fault: Fault, numbers: list[int], folder: Path) -> _Worker:
    reading, writing = os.pipe()

    def work(send: Callable[[Any], None]) -> None:
        os.setpgid(0, 0)
        for number in numbers:
            place = Path(tempfile.mkdtemp(dir=folder, prefix=f"case-{number}-"))
            try:
                result = fault.case(number, place)
            except Exception as error:  # a fault may raise anything: that is what is looked for
                result = Result("exception", "(the case itself)", exception_of(error))
            finally:
                shutil.rmtree(place, ignore_errors=True)
            send((number, *result))

    pid = _child(writing, reading, work)
    with suppress(OSError):  # the child was faster
        os.setpgid(pid, pid)
    os.close(writing)
    return _Worker(pid, reading, list(numbers))
