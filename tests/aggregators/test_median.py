"""The median of every parameter."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mithridate.aggregators.median import Median
from mithridate.core.aggregator import Context


@hypothesis_settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 999), st.sampled_from([torch.float32, torch.float64]))
def test_against_a_loop_and_in_the_honest_box_exactly(n: int, width: int, seed: int, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randint(-3, 4, (n, width), generator=rng).to(dtype)  # many ties
    hostile = (n - 1) // 2
    rows[:hostile] = 1e30 * torch.randn(hostile, width, generator=rng)
    made = Median().aggregate(rows, Context(clients=torch.arange(n), rng=rng)).numpy()
    for j in range(width):
        ordered = sorted(rows[:, j].tolist())
        assert made[j] == np.float32((ordered[(n - 1) // 2] + ordered[n // 2]) / 2) or dtype == torch.float64
        assert np.isclose(made[j], np.median(rows[:, j].double().numpy()))
        assert rows[hostile:, j].min() <= made[j] <= rows[hostile:, j].max()
