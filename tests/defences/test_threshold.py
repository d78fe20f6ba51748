"""The line below which clean samples lie."""

import pytest
import torch

from mithridate.defences.threshold import quantile_line


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_distances_that_rounding_puts_below_zero_give_no_threshold_below_it(rate: float) -> None:
    values = torch.cat([torch.full((80,), -1e-10, dtype=torch.float64), torch.linspace(0, 1, 20, dtype=torch.float64)])
    mu, tau = quantile_line(torch.arange(100) // 20, values, rate)
    assert mu >= 0
    assert tau >= 0
