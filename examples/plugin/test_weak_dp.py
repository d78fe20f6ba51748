"""The defence keeps the rules of every component, and adds the noise that it says."""

import torch
from weak_dp import WeakDP

import mithridate as mi
from mithridate.testing import check_component


def test_it_is_a_component() -> None:
    """All rules that the library has for defences."""
    check_component(WeakDP)


def test_the_noise_has_the_length_that_is_said() -> None:
    """Of n draws the standard deviation is off by about 1 / sqrt(2 n), here 0.5 %."""
    updates = mi.Updates(torch.zeros(2, 10_000, dtype=torch.float64), {"w": torch.Size([10_000])})
    blurred = WeakDP(noise=0.01).bound(updates, mi.View(step=3)).rows
    torch.testing.assert_close(float(blurred.std()), 0.01, rtol=0.05, atol=0.0)
