"""The geometric median against a general minimiser, and why it does not start from the mean."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from mithridate.aggregators.geometric_median import GeometricMedian
from mithridate.core.aggregator import Context, Spread
from mithridate.testing.checks.aggregator import a_round, again


def context(n: int, **things: Any) -> Context:
    return Context(clients=torch.arange(n), rng=torch.Generator(), **things)


def total_distance(point: NDArray[np.float64], rows: NDArray[np.float64]) -> float:
    return float(sum(np.linalg.norm(point - row) for row in rows))


@pytest.mark.parametrize(("n", "hostile"), [(9, 0), (9, 3), (20, 8)])
@pytest.mark.parametrize("seed", range(3))
def test_it_minimises_the_sum_of_distances(n: int, hostile: int, seed: int) -> None:
    rows = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows[:hostile] += 50
    made = GeometricMedian(iterations=300).aggregate(rows, context(n)).numpy()
    best = minimize(total_distance, rows.numpy().mean(0), args=(rows.numpy(),), tol=1e-10)
    assert np.allclose(made, best.x, atol=1e-4)
    assert total_distance(made, rows.numpy()) <= best.fun + 1e-9
    default = GeometricMedian().aggregate(rows, context(n)).numpy()
    assert np.allclose(default, made, atol=1e-3)


def test_each_iteration_against_a_loop() -> None:
    rows, about, _ = a_round(0)
    weights = torch.rand(len(rows), generator=torch.Generator().manual_seed(1)).double()
    point = np.median(rows.numpy(), axis=0)
    for iterations in (1, 2, 3):
        pulls = [
            float(w) / max(float(np.linalg.norm(point - row)), 0.5)
            for w, row in zip(weights, rows.numpy(), strict=True)
        ]
        point = sum(pull * row for pull, row in zip(pulls, rows.numpy(), strict=True)) / sum(pulls)
        made = GeometricMedian(iterations=iterations, nu=0.5).aggregate(rows, again(about, weights=weights))
        assert np.allclose(made, point)


def test_a_weight_of_two_is_the_row_twice() -> None:
    rows = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rule = GeometricMedian(iterations=500)
    weighted = rule.aggregate(rows, context(7, weights=torch.tensor([2.0, 1, 1, 1, 1, 1, 1])))
    twice = rule.aggregate(torch.cat([rows[:1], rows]), context(8))
    assert torch.allclose(weighted, twice, atol=1e-9)
    assert not torch.allclose(weighted, rule.aggregate(rows, context(7)), atol=1e-3)


def test_one_long_row_wins_against_few_iterations_from_the_mean_and_not_from_the_median() -> None:
    """The paper's start and its three iterations: why ours is another."""
    rows = torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[0] = 1e12
    point = rows.numpy().mean(0)
    for _ in range(3):
        pulls = [1 / float(np.linalg.norm(point - row)) for row in rows.numpy()]
        point = sum(pull * row for pull, row in zip(pulls, rows.numpy(), strict=True)) / sum(pulls)
    assert np.abs(point).min() > 1e7
    for iterations in (1, 3, 30):
        assert float(GeometricMedian(iterations=iterations).aggregate(rows, context(10)).abs().max()) < 2


def test_no_iteration_raises_the_sum_of_distances() -> None:
    rows, about, _ = a_round(1)
    rows[:11] += 100
    totals = [
        total_distance(GeometricMedian(iterations=k).aggregate(rows, again(about)).numpy(), rows.numpy())
        for k in range(1, 12)
    ]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(totals))
    assert totals[-1] < totals[0] - 0.01


def test_hostile_rows_with_half_of_the_weights_have_no_bound() -> None:
    rows, about, _ = a_round(0)
    spread, n = Spread.of(rows), len(rows)
    heavy = torch.ones(n)
    heavy[0] = n
    assert GeometricMedian().leeway(spread, n, again(about)) < 100 * spread.diameter
    assert GeometricMedian().leeway(spread, n, again(about, weights=heavy)) == torch.inf
