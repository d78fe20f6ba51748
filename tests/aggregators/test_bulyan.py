"""Bulyan against loops, and the leeway that its second stage leaves."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mithridate.aggregators.bulyan import Bulyan, around_median
from mithridate.core.aggregator import Context
from mithridate.testing.checks.aggregator import outside


def context(n: int) -> Context:
    return Context(clients=torch.arange(n), rng=torch.Generator())


def by_hand(rows: NDArray[np.float64], f: int) -> list[float]:
    left, chosen = list(rows), list[NDArray[np.float64]]()
    while len(chosen) < len(rows) - 2 * f:
        keys = []
        for i, mine in enumerate(left):
            near = sorted(float(((mine - other) ** 2).sum()) for j, other in enumerate(left) if j != i)
            keys.append((round(sum(near[: max(len(left) - f - 2, 1)]), 9), [round(d, 9) for d in near], i))
        chosen.append(left.pop(min(keys)[2]))
    out = []
    for entries in np.array(chosen).T:
        median = float(np.median(entries))
        nearest = sorted((round(abs(float(entry) - median), 9), float(entry)) for entry in entries)
        out.append(float(np.mean([entry for _, entry in nearest[: len(rows) - 4 * f]])))
    return out


@pytest.mark.parametrize(("n", "f"), [(3, 0), (7, 1), (8, 1), (11, 2), (16, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_against_loops(n: int, f: int, seed: int) -> None:
    rows = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert np.allclose(Bulyan(hostile=f).aggregate(rows, context(n)), by_hand(rows.numpy(), f))
    rows[:f] = 1e30
    assert np.allclose(Bulyan(hostile=f).aggregate(rows, context(n)), by_hand(rows.numpy(), f))


def test_the_smaller_of_two_entries_as_near_is_taken() -> None:
    ordered = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
    assert float(around_median(ordered, 1)) == 2.0
    assert float(around_median(ordered, 2)) == 1.5
    assert float(around_median(ordered, 3)) == 2.0


def test_without_hostile_rows_to_expect_it_is_the_mean() -> None:
    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(Bulyan(hostile=0).aggregate(rows, context(6)), rows.mean(0))


def test_a_hostile_entry_can_take_it_just_outside_the_honest_box() -> None:
    """Why its leeway is not zero."""
    honest = torch.tensor([[5, 1], [1, 2], [1, 4], [5, 5], [1, 5], [2, 5]]).double()
    rows = torch.cat([honest, torch.tensor([[5.5, 5.75]]).double()])
    made = Bulyan(hostile=1).aggregate(rows, context(7))
    assert 0 < outside(made, honest) < 0.75
