"""Krum and Multi-Krum: which rows are chosen, and how far out a hostile one can be and still be chosen."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mithridate.aggregators.krum import Krum, ranking, reach, sums
from mithridate.aggregators.multi_krum import MultiKrum
from mithridate.core.aggregator import Context, Spread
from mithridate.core.errors import ConfigError
from mithridate.maths.rows import squared_distances
from mithridate.testing.checks.aggregator import outside


def context(n: int) -> Context:
    return Context(clients=torch.arange(n), rng=torch.Generator())


def normal(n: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scores_by_hand(rows: NDArray[np.float64], f: int) -> list[float]:
    out = []
    for i, mine in enumerate(rows):
        distances = sorted(float(((mine - other) ** 2).sum()) for j, other in enumerate(rows) if j != i)
        out.append(sum(distances[: len(rows) - f - 2]))
    return out


@pytest.mark.parametrize(("n", "f"), [(5, 1), (7, 0), (7, 2), (12, 4)])
@pytest.mark.parametrize("seed", range(5))
def test_against_a_loop(n: int, f: int, seed: int) -> None:
    rows = normal(n, 6, seed)
    scores = scores_by_hand(rows.numpy(), f)
    order = list(np.argsort(scores, kind="stable"))
    assert np.allclose(sums(squared_distances(rows), f), scores)
    assert ranking(squared_distances(rows), f) == order
    assert torch.equal(Krum(hostile=f).aggregate(rows, context(n)), rows[order[0]])
    for keep in (1, 2, n - f):
        made = MultiKrum(hostile=f, keep=keep).aggregate(rows, context(n))
        assert torch.allclose(made, rows[order[:keep]].mean(0))
    assert torch.allclose(MultiKrum(hostile=f).aggregate(rows, context(n)), rows[order[: n - f]].mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("large", [1e30, -3e38])
def test_long_rows_are_never_chosen_though_their_squares_overflow(dtype: torch.dtype, large: float) -> None:
    rows = normal(9, 4).to(dtype)
    rows[:3] = large
    made = Krum(hostile=3).aggregate(rows, context(9))
    assert any(torch.equal(made, row) for row in rows[3:])
    assert float(MultiKrum(hostile=3).aggregate(rows, context(9)).abs().max()) < 5


def test_colluding_rows_beside_the_honest_ones_are_chosen_and_are_as_near_as_promised() -> None:
    """The result can be a hostile row, outside the honest box; the leeway is what is true of it."""
    honest = normal(8, 20)
    rows = torch.cat([honest, (honest.mean(0) + 0.7).repeat(3, 1)])
    made = Krum(hostile=3).aggregate(rows, context(11))
    assert torch.equal(made, rows[-1])
    further = torch.cat([honest, (honest.mean(0) + 2.5 * torch.eye(20, dtype=torch.float64)[0]).repeat(3, 1)])
    leeway = Krum(hostile=3).leeway(Spread.of(honest), 11, context(11))
    chosen = Krum(hostile=3).aggregate(further, context(11))
    nearest = float((chosen - honest).norm(dim=1).min())
    assert torch.equal(chosen, further[-1])
    assert 0 < outside(chosen, honest) <= nearest <= leeway


def test_the_reach_is_the_largest_distance_at_which_a_hostile_row_can_win() -> None:
    """One hostile row among four honest ones on the corners of a simplex, D apart: no place beyond the reach wins."""
    honest = torch.eye(4, dtype=torch.float64)
    limit = reach(2**0.5, 5, 1)
    best = 0.0
    for place in torch.linspace(0, 3 * limit, 400, dtype=torch.float64):
        rows = torch.cat([honest, (honest.mean(0) - place / 2).unsqueeze(0)])
        if torch.equal(Krum(hostile=1).aggregate(rows, context(5)), rows[4]):
            best = max(best, float((rows[4] - honest).norm(dim=1).min()))
    assert 0.5 * limit < best <= limit


def test_a_mutual_nearest_pair_is_decided_by_the_next_neighbour_not_by_the_order() -> None:
    rows = torch.tensor([[0.0], [1.0], [3.0]])  # 0 and 1 have the same sum; 1 is nearer to the third
    for order in ([0, 1, 2], [1, 0, 2], [2, 0, 1]):
        assert float(Krum(hostile=0).aggregate(rows[order], context(3))) == 1.0


def test_equal_rows_are_decided_by_the_lowest_index() -> None:
    assert ranking(torch.zeros(4, 4, dtype=torch.float64), 0) == [0, 1, 2, 3]


def test_no_more_is_kept_than_can_be_honest() -> None:
    MultiKrum(hostile=2, keep=5).check(7)
    with pytest.raises(ConfigError, match=r"keep = 6.* n - f = 5"):
        MultiKrum(hostile=2, keep=6).check(7)
