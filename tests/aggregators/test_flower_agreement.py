"""Our rules and Flower's own make the same of the same replies."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mithridate.core.aggregator import Context
from mithridate.core.registry import build

theirs = pytest.importorskip(
    "flwr.server.strategy.aggregate", reason="the extra 'flower' is not installed", exc_type=ImportError
)


def replies(rows: NDArray[Any]) -> list[tuple[list[NDArray[Any]], int]]:
    """As Flower's rules take them: two arrays a client, and a number of examples."""
    half = rows.shape[1] // 2
    return [([row[:half].reshape(-1, 1), row[half:]], 10) for row in rows]


def flat(arrays: list[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate([a.reshape(-1) for a in arrays]))


def ours(rule: dict[str, Any], rows: NDArray[Any]) -> Tensor:
    made: Tensor = build("aggregator", rule).aggregate(
        torch.from_numpy(rows), Context(clients=torch.arange(len(rows)), rng=torch.Generator())
    )
    return made


@pytest.mark.parametrize("seed", range(20))
def test_median_trimmed_mean_krum_and_multi_krum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, f = int(rng.integers(9, 15)), 2
    rows = rng.normal(size=(n, 12))
    rows[:f] += 50  # two hostile clients
    sent = replies(rows)
    pairs = [
        (ours({"name": "median"}, rows), theirs.aggregate_median(sent)),
        (ours({"name": "trimmed_mean", "trim": 0.2}, rows), theirs.aggregate_trimmed_avg(sent, 0.2)),
        (ours({"name": "krum", "hostile": f}, rows), theirs.aggregate_krum(sent, f, 0)),
        (ours({"name": "multi_krum", "hostile": f}, rows), theirs.aggregate_krum(sent, f, n - f)),
    ]
    for mine, their in pairs:
        assert torch.allclose(mine, flat(their), rtol=1e-6, atol=1e-9)
