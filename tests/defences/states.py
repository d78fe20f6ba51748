"""Two states of a learner compared, and a batch that does harm."""

from typing import Any

import torch
from torch import Tensor

from mithridate.core.batch import Batch
from mithridate.core.past import Snapshot


def leaves(value: Any) -> list[Any]:
    """Every number and tensor in nested dicts and lists."""
    if isinstance(value, dict):
        return [leaf for key in value for leaf in [key, *leaves(value[key])]]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def same(a: Snapshot, b: Snapshot) -> bool:
    """Equal in every bit of parameters, buffers, optimiser state and step."""
    one, two = ([dict(s.parameters), dict(s.buffers), dict(s.optimiser), s.step] for s in (a, b))
    pairs = list(zip(leaves(one), leaves(two), strict=True))
    return all(torch.equal(p, q) if isinstance(p, Tensor) else p == q for p, q in pairs)


def wrong(batch: Batch) -> Batch:
    """Labels that teach every class to be the next one."""
    return Batch(batch.x, (batch.y + 1) % 4)
