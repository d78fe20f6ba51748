"""Norm bounding against a loop: long rows count as much as the bound, short ones as they are."""

import math

import numpy as np
import pytest
import torch

from mithridate.aggregators.mean import Mean
from mithridate.aggregators.norm_bounding import NormBounding
from mithridate.maths.norms import Norm
from mithridate.testing.checks.aggregator import a_round, again


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_against_a_loop(norm: Norm) -> None:
    rows, context, _ = a_round(0)
    order = 2 if norm == "l2" else np.inf
    lengths = [float(np.linalg.norm(row, order)) for row in rows.numpy()]
    bound = float(np.median(lengths))
    clipped = [row * min(1.0, bound / length) for row, length in zip(rows.numpy(), lengths, strict=True)]
    weights = torch.rand(len(rows), generator=torch.Generator().manual_seed(1)).double()
    rule = NormBounding(clip_norm=bound, norm=norm)
    assert np.allclose(rule.aggregate(rows, again(context)), np.mean(clipped, axis=0))
    made = rule.aggregate(rows, again(context, weights=weights))
    assert np.allclose(made, np.average(clipped, axis=0, weights=weights.numpy()))


def test_an_infinite_bound_is_the_mean_bit_for_bit() -> None:
    rows, context, _ = a_round(0)
    plain = Mean().aggregate(rows, again(context))
    assert torch.equal(NormBounding(clip_norm=math.inf).aggregate(rows, again(context)), plain)
    assert not torch.equal(NormBounding(clip_norm=1.0).aggregate(rows, again(context)), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_however_long_a_row_one_of_n_moves_the_result_by_two_bounds_over_n(dtype: torch.dtype) -> None:
    rows, context, _ = a_round(0, dtype=dtype)
    plain = NormBounding(clip_norm=0.5).aggregate(rows, again(context))
    rows[0] = -1e30
    moved = NormBounding(clip_norm=0.5).aggregate(rows, again(context))
    assert 0 < float((moved - plain).norm()) <= 2 * 0.5 / len(rows) + 1e-6
    assert float(moved.norm()) <= 0.5 + 1e-6
