"""Clients of a round whose samples the model cannot take: they are left out, and the round goes on without them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mithridate.core.batch import Batch
from mithridate.core.targets import IGNORED, loss_of
from mithridate.training.learner import Learner

NAMED = 8
"""Clients that a verdict names."""


def fit_clients(learner: Learner, data: Batch) -> Tensor:
    """Whose samples are all finite, inside the domain and of classes that the model has, and some count in the loss.

    Args:
        learner: The server's.
        data: Of the round: x (clients, samples, ...), y (clients, samples).

    Returns:
        (clients,) bool, on the CPU.
    """
    clients, samples = data.y.shape[:2]
    usable = learner.usable(Batch(data.x.flatten(0, 1), data.y.flatten(0, 1)))
    fit: Tensor = usable.view(clients, samples).all(1)
    if data.y.dtype == torch.int64:
        fit &= (data.y != IGNORED).flatten(1).any(1).cpu()
    return fit


@torch.no_grad()
def taken_clients(learner: Learner, data: Batch) -> Tensor:
    """Whose samples the model and the criterion take without an error, in eval mode: (clients,) bool, on the CPU.

    Args:
        learner: The server's.
        data: Of some clients: x (clients, samples, ...), y (clients, samples).
    """
    try:
        logits = learner.white_box.logits(data.x.flatten(0, 1))
        loss_of(learner.criterion, logits, data.y.flatten(0, 1), where="a client's batch")
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever the model stumbles over: that of a single client must not stop the others
        half = len(data.y) // 2
        if half == 0:
            return torch.zeros(1, dtype=torch.bool)
        return torch.cat([taken_clients(learner, data.take(part)) for part in (slice(half), slice(half, None))])
    return torch.ones(len(data.y), dtype=torch.bool)


def left_out(clients: Sequence[int]) -> str:
    """That clients were left out of a round, and why, for its verdict; empty if there are none.

    Args:
        clients: Their ids.
    """
    if not clients:
        return ""
    names = ", ".join(map(str, clients[:NAMED])) + (f" and {len(clients) - NAMED} more" if clients[NAMED:] else "")
    return (
        f"left out client{'s' if len(clients) > 1 else ''} {names}, with samples that are not finite, outside the "
        "domain, of a class that the model has not, or that it cannot take"
    )
