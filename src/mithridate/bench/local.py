"""Cells on this machine, several at a time, each in a process of its own that lasts for many cells."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from mithridate.bench import store
from mithridate.bench.failure import Failure
from mithridate.bench.running import deterministic
from mithridate.bench.tasks import Hears, Queue, Sender, Task
from mithridate.bench.workplace import Ended, Terms, Workplace
from mithridate.core.errors import BusyError, EngineError, WriteError
from mithridate.core.files import locked


def run_in_processes(tasks: Sequence[Task], terms: Terms, jobs: int, hears: Hears) -> None:
    """Run tasks, `jobs` at a time; none is left running when this returns or raises.

    Each process has as many threads as torch has here. One that dies takes its cell with it, which is told of as
    failed, and the others go on.

    Args:
        tasks: In the order of the recipe.
        terms: How.
        jobs: Processes at most.
        hears: Is told what happens.

    Raises:
        WriteError: The file system refuses a process.
        EngineError: A process cannot be started.
    """
    queue, workers = Queue(tasks), list[_Worker]()
    try:
        while True:
            _hand_out(queue, workers, terms, jobs, hears)
            busy = {worker.connection: worker for worker in workers if worker.task is not None}
            if not busy:
                return
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]  # it waits for what it was given
                if not _heard(worker, queue, terms, hears):
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.process.kill()  # whatever it is at: every file is written in one move
        for worker in workers:
            worker.process.join()


class _Worker:
    """A process.

    Args:
        terms: How it runs cells.
    """

    def __init__(self, terms: Terms) -> None:
        context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, terms, torch.get_num_threads()), daemon=True)
        with _deaf_to_interrupts():
            self.process.start()
        theirs.close()  # so that the end of the process is the end of the connection
        self.ready = False
        self.task: Task | None = None
        self.last: Task | None = None

    def give(self, task: Task) -> None:
        with suppress(OSError):  # it has died, which the next look at it shows
            self.connection.send(task)
        self.task = self.last = task

    def ending(self) -> str:
        """How the process ended, once its connection has."""
        self.process.join()
        code = self.process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """A process that is started inside the block never hears Ctrl-C, not even while it imports: its parent ends it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # else the first process starts it, which makes this one hear signals again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _hand_out(queue: Queue, workers: list[_Worker], terms: Terms, jobs: int, hears: Hears) -> None:
    """Give every idle process a task, as far as there are any; start processes, as far as there may be more."""
    workers[:] = [worker for worker in workers if worker.task is not None or worker.process.is_alive()]
    while len(queue):
        idle = next((worker for worker in workers if worker.task is None), None)
        if idle is None and len(workers) >= jobs:
            return
        task = queue.take(idle.last if idle else None)
        if task is None:
            return
        if idle is None:
            idle = _Worker(terms)
            workers.append(idle)
        hears.begun(task)
        idle.give(task)


def _heard(worker: _Worker, queue: Queue, terms: Terms, hears: Hears) -> bool:
    """Take what a process says; false if it has died."""
    task = worker.task
    assert task is not None  # noqa: S101  (only those at work are listened to)
    try:
        name, values = worker.connection.recv()
    except (EOFError, OSError):
        if not worker.ready:
            raise EngineError(
                f"a process of --jobs could not be started ({worker.ending()}); it says why above. A script that "
                'calls run_recipe needs the guard `if __name__ == "__main__":`.'
            ) from None
        queue.over(task)
        hears.ended(task, _died(task, terms, worker.ending()))
        return False
    match name:
        case "ready":
            worker.ready = True
        case "fatal":
            raise WriteError(*values)
        case "ended":
            worker.task = None
            queue.over(task)
            (ended,) = values
            if ended.busy and not task.patient:
                queue.put_back(task)
            else:
                hears.ended(task, ended)
        case _:
            if name == "prepared":
                queue.trained(task)
            hears.event(task, name, values)
    return True


def _died(task: Task, terms: Terms, how: str) -> Ended:
    """How a cell ended whose process did."""
    advice = " It may have needed more memory than there is: try fewer --jobs." if how == "SIGKILL" else ""
    failure = Failure(how, f"its process ended by {how}, and is gone.{advice}")
    directory = terms.out / task.run
    with suppress(BusyError), locked(directory / store.LOCK, timeout=5):
        if store.finished(directory):
            return Ended(store.read_summary(directory))
        return Ended(None, failure=failure.write(directory))
    return Ended(None, failure=failure)


def _serve(connection: Connection, terms: Terms, threads: int) -> None:
    """What a process does: a task, and the next one, until it is ended."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)

    def send(name: str, values: tuple[Any, ...]) -> None:
        try:
            connection.send((name, values))
        except OSError:  # the parent is gone: no error of the cell, which goes on from its last whole step
            os._exit(1)

    workplace = Workplace(terms, Sender(send))
    send("ready", ())
    with deterministic():
        while True:
            try:
                task = connection.recv()
            except EOFError:
                return
            try:
                send("ended", (task.carried_out(workplace),))
            except WriteError as error:
                send("fatal", error.args)


def _end_with_parent() -> None:
    """A parent that is killed cannot end its children."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
