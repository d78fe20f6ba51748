"""The mean without the extremes of every parameter."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.stats import trim_mean

from mithridate.aggregators.mean import Mean
from mithridate.aggregators.median import Median
from mithridate.aggregators.trimmed_mean import TrimmedMean
from mithridate.core.aggregator import Context
from mithridate.core.errors import ConfigError
from mithridate.core.registry import build


def context(n: int) -> Context:
    return Context(clients=torch.arange(n), rng=torch.Generator())


@hypothesis_settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 999), st.floats(0, 0.49))
def test_against_scipy_and_in_the_honest_box_exactly(n: int, width: int, seed: int, trim: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randint(-3, 4, (n, width), generator=rng).double()  # many ties
    rule = TrimmedMean(trim=trim)
    assert np.allclose(rule.aggregate(rows, context(n)), trim_mean(rows.numpy(), trim, axis=0))
    hostile = rule.most_hostile(n)
    rows[:hostile] = 1e30 * torch.randn(hostile, width, generator=rng, dtype=torch.float64)
    made = rule.aggregate(rows, context(n))
    assert (made >= rows[hostile:].amin(0)).all()
    assert (made <= rows[hostile:].amax(0)).all()


@pytest.mark.parametrize("hostile", [0, 1, 3])
def test_against_a_loop_with_a_given_number(hostile: int) -> None:
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = TrimmedMean(hostile=hostile, trim=0.4).aggregate(rows, context(9))
    for j in range(4):
        ordered = sorted(rows[:, j].tolist())
        kept = ordered[hostile : 9 - hostile]
        assert float(made[j]) == pytest.approx(sum(kept) / len(kept))


def test_from_the_mean_to_the_median() -> None:
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain, middle = Mean().aggregate(rows, context(9)), Median().aggregate(rows, context(9))
    assert torch.allclose(TrimmedMean(hostile=0).aggregate(rows, context(9)), plain)
    assert torch.equal(TrimmedMean(hostile=4).aggregate(rows, context(9)), middle)


def test_one_hostile_row_more_than_is_cut_moves_it_anywhere() -> None:
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[:3] = 1e30
    assert float(TrimmedMean(hostile=3).aggregate(rows, context(9)).abs().max()) < 5
    assert float(TrimmedMean(hostile=2).aggregate(rows, context(9)).min()) > 1e28


@pytest.mark.parametrize("trim", [-0.1, 0.5, 1.0])
def test_no_more_than_all_can_be_cut_off(trim: float) -> None:
    with pytest.raises(ConfigError, match="trim"):
        build("aggregator", {"name": "trimmed_mean", "trim": trim})
