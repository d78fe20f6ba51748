"""Clients of a federation that send garbage: they test a server's limits, not how it learns."""

import math
from typing import Literal

import torch
from torch import Tensor

from mithridate.core.registry import settings
from mithridate.guard.hostile_clients import NamedClients, Tensors, Turn

Garbage = Literal["nan", "huge", "shape", "missing", "count", "all"]

CYCLE: tuple[Garbage, ...] = ("nan", "shape", "missing", "huge")
"""What `all` sends in turn."""

HUGE = 1e30
"""What `huge` puts into every weight: finite in float32, ruinous in an average."""

ABSURD_COUNT = 10**15
"""The number of examples that `count` claims."""


@settings
class GarbageClients(NamedClients):
    """Clients that send what breaks a careless server; they need neither model nor data.

    Args:
        partitions: Numbers of the hostile clients (`partition-id` of the node), each >= 0 and once.
        kind: `nan`; `huge` (1e30 in every weight); `shape` (every array of another shape); `missing` (one array left
            out); `count` (an honest model and an absurd number of examples); `all`: `nan`, `shape`, `missing`, `huge`
            in turn, one a round; each client begins one later in that order than the one before it in `partitions`.
    """

    kind: Garbage = "all"

    @property
    def claimed_examples(self) -> int | None:
        """The number of examples that they report; None: the true one."""
        return ABSURD_COUNT if self.kind == "count" else None

    def sent(self, turn: Turn) -> dict[str, Tensor]:
        """Garbage, whatever the round."""
        turns = turn.round - 1 + self.partitions.index(turn.partition)
        return _spoilt(turn.honest, CYCLE[turns % len(CYCLE)] if self.kind == "all" else self.kind)


def _spoilt(honest: Tensors, kind: Garbage) -> dict[str, Tensor]:
    if kind == "count":
        return dict(honest)  # what it lies about is no array
    if kind == "missing":
        return {name: honest[name] for name in list(honest)[1:]}
    if kind == "shape":
        return {name: torch.cat([t.reshape(-1), t.reshape(-1)]) for name, t in honest.items()}
    value = math.nan if kind == "nan" else HUGE
    return {name: torch.full_like(t, value) if t.is_floating_point() else t for name, t in honest.items()}
