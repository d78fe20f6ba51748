"""The mean is what each client weighs, and one client makes of it what it wants."""

import numpy as np
import torch

from mithridate.aggregators.mean import Mean
from mithridate.testing.checks.aggregator import a_round, again


def test_against_numpy() -> None:
    rows, context, _ = a_round(0)
    weights = torch.rand(len(rows), generator=torch.Generator().manual_seed(1))
    assert np.allclose(Mean().aggregate(rows, context), rows.numpy().mean(0))
    expected = np.average(rows.numpy(), axis=0, weights=weights.numpy())
    assert np.allclose(Mean().aggregate(rows, again(context, weights=weights)), expected)


def test_one_client_that_knows_the_others_sends_the_recovered_offset_and_gets_any_result() -> None:
    """Pang et al., Appendix C.1: the poisoned row is what the sum lacks."""
    rows, context, _ = a_round(0)
    wanted = torch.linspace(-1e3, 1e3, rows.shape[1], dtype=torch.float64)
    rows[4] = len(rows) * wanted - (rows.sum(0) - rows[4])
    assert torch.allclose(Mean().aggregate(rows, context), wanted)
