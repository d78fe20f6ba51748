"""Cells on a Ray cluster whose machines share a file system: each is a task, and they have the store in common."""

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from mithridate.bench.failure import Failure
from mithridate.bench.plan import GRID
from mithridate.bench.running import deterministic
from mithridate.bench.tasks import Hears, Queue, Sender, Task
from mithridate.bench.watcher import Watcher
from mithridate.bench.workplace import Ended, Terms, Workplace
from mithridate.core.errors import EngineError, StoreError, WriteError, said

OLDEST = (2, 55)
"""The first version of Ray that this is tested with."""

QUIET = ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
"""An environment variable without which Ray 2.55 warns of a change that does not concern tasks on CPUs."""

SECONDS = 0.2
"""Between two looks at what tasks say."""


class _Answer(NamedTuple):
    """What a task returns: how the cell ended, or what the file system said."""

    ended: Ended | None
    fatal: str = ""


def run_on_ray(tasks: Sequence[Task], terms: Terms, jobs: int | None, hears: Hears) -> None:
    """Run tasks on the cluster that `RAY_ADDRESS` names, on one that this machine belongs to, or on one made here.

    A cell asks for as many CPUs as torch has threads here, and has as many threads. One whose machine is lost is tried
    again elsewhere, three times at most, and goes on from its last whole step.

    Args:
        tasks: In the order of the recipe.
        terms: How; every machine of the cluster sees the store, the cache and the data by these paths.
        jobs: Cells at a time at most; None: as many as the cluster has CPUs for.
        hears: Is told what happens.

    Raises:
        WriteError: A machine's file system refuses.
        EngineError: Ray is not installed, or too old; there is no cluster, or it is lost.
    """
    ray = installed_ray()
    os.environ.setdefault(*QUIET)
    ours = not ray.is_initialized()
    try:
        if ours:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        _drive(ray, tasks, replace(terms, resume=True), jobs, hears)
    except (ray.exceptions.RayError, ConnectionError, TimeoutError) as error:
        raise EngineError(
            f"the Ray cluster cannot be used, or is gone ({type(error).__name__}: {said(error)}). Finished runs are "
            "kept; go on with --resume."
        ) from error
    finally:
        if ours:
            ray.shutdown()


def installed_ray() -> Any:  # noqa: ANN401  (a module that need not be there)
    """The module `ray`.

    Raises:
        EngineError: It is not installed, or too old.
    """
    try:
        import ray
        import ray.util.queue
    except ImportError as error:
        raise EngineError(
            f"--engine ray needs Ray, and it cannot be imported ({said(error)}); install it by "
            "`pip install 'mithridate[ray]'`, on every machine of the cluster, or use --jobs."
        ) from None
    if tuple(int(part) for part in ray.__version__.split(".")[:2]) < OLDEST:
        raise EngineError(
            f"Ray {ray.__version__} is installed, and --engine ray needs {'.'.join(map(str, OLDEST))} or newer; "
            "install it by `pip install 'mithridate[ray]'`."
        )
    return ray


def _drive(ray: Any, tasks: Sequence[Task], terms: Terms, jobs: int | None, hears: Hears) -> None:  # noqa: ANN401  (the module, which may be absent)
    """Hand out tasks and listen to them until all have ended."""
    threads = torch.get_num_threads()
    gpus = 1 if terms.device == "cuda" else 0
    events = ray.util.queue.Queue(actor_options={"num_cpus": 0})
    remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=3)(_carried_out)
    queue, by_run = Queue(tasks), {task.run: task for task in tasks}
    at_work: dict[Any, Task] = {}

    def listen() -> None:
        for run, name, values in events.get_nowait_batch(events.qsize()):
            if name == "prepared":
                queue.trained(by_run[run])
            hears.event(by_run[run], name, values)

    try:
        while len(queue) or at_work:
            most = jobs or max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
            while len(at_work) < most and (task := queue.take()) is not None:
                hears.begun(task)
                at_work[remote.remote(task, terms, threads, events)] = task
            ended, _ = ray.wait(list(at_work), timeout=SECONDS)
            listen()
            for reference in ended:
                task = at_work.pop(reference)
                queue.over(task)
                how = _told(ray, reference)
                if how.busy and not task.patient:
                    queue.put_back(task)
                else:
                    hears.ended(task, how)
    finally:
        with suppress(ray.exceptions.RayError, ValueError):  # a cluster that goes on without us, after an interrupt
            for reference in at_work:
                ray.cancel(reference, force=True)
            events.shutdown(force=True)


def _told(ray: Any, reference: Any) -> Ended:  # noqa: ANN401  (ditto)
    """How a cell ended."""
    try:
        answer: _Answer = ray.get(reference)
    except (ray.exceptions.RayTaskError, ray.exceptions.RaySystemError):
        raise
    except ray.exceptions.RayError as error:  # its process, its machine, or memory
        kind = type(error).__name__
        return Ended(None, failure=Failure(kind, f"its process on the cluster is lost ({kind}: {said(error)})."))
    if answer.ended is None:
        raise WriteError(answer.fatal)
    return answer.ended


@lru_cache(maxsize=1)
def _workplace(terms: Terms) -> Workplace:
    """That of the process, which lasts for many tasks."""
    return Workplace(terms, Watcher())


def _carried_out(task: Task, terms: Terms, threads: int, events: Any) -> _Answer:  # noqa: ANN401  (a queue of Ray)
    """What a task does, on its machine."""
    if not (terms.out / GRID).is_file():
        error = StoreError(
            f"{socket.gethostname()} does not see {terms.out}: with --engine ray, --out is a path on a file system "
            "that all machines share."
        )
        return _Answer(Ended(None, failure=Failure.of(error)))
    from ray.exceptions import RayError

    def send(name: str, values: tuple[Any, ...]) -> None:
        with suppress(RayError):  # what is heard of a cell decides nothing of it
            events.put((task.run, name, values))

    torch.set_num_threads(threads)
    workplace = _workplace(terms)
    workplace.watcher = Sender(send)
    try:
        with deterministic():
            return _Answer(task.carried_out(workplace))
    except WriteError as error:
        return _Answer(None, str(error))
