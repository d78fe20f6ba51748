"""Centred clipping over rounds, with and without worker momentum, against loops."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mithridate.aggregators.centered_clipping import CENTRE, CenteredClipping
from mithridate.core.aggregator import Context
from mithridate.core.errors import CheckpointError
from mithridate.core.view import Memory


def normal(n: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def context(n: int, memory: Memory | None = None) -> Context:
    return Context(clients=torch.arange(n), rng=torch.Generator(), memory={} if memory is None else memory)


def step(centre: NDArray[np.float64], rows: NDArray[np.float64], tau: float) -> NDArray[np.float64]:
    moved = centre.copy()
    for row in rows:
        length = float(np.linalg.norm(row - centre))
        moved += (row - centre) * min(1.0, tau / length) / len(rows)
    return moved


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("iterations", [1, 3])
def test_four_rounds_against_loops(beta: float, iterations: int) -> None:
    rule = CenteredClipping(clip_norm=1.5, iterations=iterations, worker_momentum=beta)
    memory: Memory = {}
    centre = np.zeros(5)
    momentum: dict[int, NDArray[np.float64]] = {}
    for time in range(4):
        clients = [c for c in range(8) if (c + time) % 3]  # some are absent in every round
        rows = 1 + normal(len(clients), 5, time)
        for client, row in zip(clients, rows.numpy(), strict=True):
            momentum[client] = (1 - beta) * row + beta * momentum[client] if client in momentum else row
        for _ in range(iterations):
            centre = step(centre, np.array([momentum[c] for c in clients]), 1.5)
        now = Context(clients=torch.tensor(clients), rng=torch.Generator(), memory=memory)
        assert np.allclose(rule.aggregate(rows, now), centre)
    assert len(memory) == (3 if beta else 1)


def test_a_bound_beyond_all_rows_makes_it_the_mean() -> None:
    rows = normal(6, 4)
    assert torch.allclose(CenteredClipping(clip_norm=1e9).aggregate(rows, context(6)), rows.mean(0))


def test_no_round_moves_further_than_the_bound_and_no_client_further_than_its_part() -> None:
    rule = CenteredClipping(clip_norm=0.5, iterations=2)
    memory: Memory = {}
    before = torch.zeros(4, dtype=torch.float64)
    for time in range(5):
        after = rule.aggregate(1e30 * normal(6, 4, time), context(6, memory))
        assert float((after - before).norm()) <= 1.0 + 1e-9
        before = after
    rows = normal(10, 4)
    attacked = rows.clone()
    attacked[0] = -1e30
    one = CenteredClipping(clip_norm=0.5)
    moved = one.aggregate(attacked, context(10)) - one.aggregate(rows, context(10))
    assert 0 < float(moved.norm()) <= 2 * 0.5 / 10


def test_many_iterations_bring_rows_that_agree_to_their_row() -> None:
    row = torch.full((3,), 7.0)
    rule = CenteredClipping(clip_norm=1.0)
    memory: Memory = {}
    for _ in range(30):
        made = rule.aggregate(row.repeat(5, 1), context(5, memory))
    assert torch.allclose(made, row)


def test_it_moves_and_scales_with_the_rows_if_centre_and_bound_do() -> None:
    rows, shift, start = normal(6, 4), torch.tensor([10.0, -20, 30, 0]).double(), normal(1, 4, 5)[0]
    still = CenteredClipping(clip_norm=1.0).aggregate(rows, context(6, {CENTRE: start}))
    moved = CenteredClipping(clip_norm=1.0).aggregate(rows + shift, context(6, {CENTRE: start + shift}))
    large = CenteredClipping(clip_norm=9.0).aggregate(9 * rows, context(6, {CENTRE: 9 * start}))
    assert torch.allclose(moved, still + shift)
    assert torch.allclose(large, 9 * still)


def test_notes_of_another_model_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"kept centre has 3 parameters.* have 4"):
        CenteredClipping().aggregate(normal(6, 4), context(6, {CENTRE: torch.zeros(3)}))


def test_momentum_makes_a_push_that_hides_in_the_noise_visible() -> None:
    """Hostile rows within the honest noise, always one way: with momentum the honest rows agree, so the bound can be
    small, and the same attack moves the result less (Karimireddy et al. 2021, section 5).
    """
    drift = {}
    for beta, tau in ((0.0, 4.0), (0.9, 1.0)):
        rule = CenteredClipping(clip_norm=tau, worker_momentum=beta)
        memory: Memory = {}
        made = []
        for time in range(60):
            rows = normal(20, 16, time)
            rows[:2] = rows[2:].std(0)
            made.append(rule.aggregate(rows, context(20, memory)))
        drift[beta] = float(torch.stack(made[20:]).mean(0).norm())
    assert drift[0.9] < 0.6 * drift[0.0]
