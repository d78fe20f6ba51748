"""FLTrust against a loop, and what holds when every client is hostile."""

import numpy as np
import pytest
import torch

from mithridate.aggregators.fltrust import FLTrust
from mithridate.core.aggregator import Context
from mithridate.testing.checks.aggregator import a_round, again


@pytest.mark.parametrize("seed", range(4))
def test_against_a_loop(seed: int) -> None:
    rows, context, _ = a_round(seed)
    assert context.trusted is not None
    own = context.trusted.numpy()
    total, trust = np.zeros(rows.shape[1]), 0.0
    for row in rows.numpy():
        cosine = max(float(row @ own) / float(np.linalg.norm(row) * np.linalg.norm(own)), 0.0)
        total += cosine * row * np.linalg.norm(own) / np.linalg.norm(row)
        trust += cosine
    assert np.allclose(FLTrust().aggregate(rows, context), total / trust)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_if_all_are_hostile_it_is_no_longer_than_the_server_s_update_and_never_against_it(size: float) -> None:
    for seed in range(20):
        rows, context, _ = a_round(seed)
        assert context.trusted is not None
        hostile = size * torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        made = FLTrust().aggregate(hostile, context)
        assert float(made.norm()) <= float(context.trusted.norm()) + 1e-9
        assert float(made @ context.trusted) > 0


def test_rows_that_point_away_do_not_count() -> None:
    rows, context, _ = a_round(0)
    assert context.trusted is not None
    toward = torch.stack([context.trusted, 5 * context.trusted])
    away = -torch.rand(3, 1, dtype=torch.float64) * context.trusted
    sent = torch.cat([toward, away, torch.zeros(1, rows.shape[1])])
    made = FLTrust().aggregate(sent, again(context, clients=torch.arange(6)))
    assert torch.allclose(made, context.trusted)


def test_without_a_trusted_row_or_direction_the_model_stays() -> None:
    _, context, _ = a_round(0)
    assert context.trusted is not None
    against = again(context, clients=torch.arange(3))
    assert torch.equal(FLTrust().aggregate(-context.trusted.repeat(3, 1), against), torch.zeros_like(context.trusted))
    still = Context(clients=torch.arange(3), rng=torch.Generator(), trusted=torch.zeros(4))
    assert torch.equal(FLTrust().aggregate(torch.ones(3, 4), still), torch.zeros(4))
