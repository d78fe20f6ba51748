"""How much of this machine a command takes, where nobody says it."""

import os
import sys


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def default_jobs(engine: str) -> int | None:
    """Runs at a time; None: as many as the cluster takes.

    Args:
        engine: Where they are made: `local` or `ray`.
    """
    return 1 if engine == "local" else None


def use_threads(asked: int, *, jobs: int | None) -> None:
    """Set the threads of torch in this process, which its runs take over.

    Args:
        asked: How many; 0 shares the cores among the jobs.
        jobs: Runs at a time; None, which only a cluster knows, counts as one thread each.
    """
    import torch

    torch.set_num_threads(asked or (max(1, cores() // jobs) if jobs else 1))
