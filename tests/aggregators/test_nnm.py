"""Nearest-neighbour mixing against a loop, and what it is for."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mithridate.aggregators.krum import Krum
from mithridate.aggregators.nnm import NearestNeighbourMixing
from mithridate.core.aggregator import Context
from mithridate.core.errors import ConfigError
from mithridate.core.registry import build, config_of


def context(n: int) -> Context:
    return Context(clients=torch.arange(n), rng=torch.Generator())


def normal(n: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "f"), [(5, 0), (5, 2), (12, 4)])
def test_the_mixtures_against_a_loop(n: int, f: int) -> None:
    rows = normal(n, 4)
    rows[: f // 2] = 1e30
    mixed, ids = NearestNeighbourMixing(hostile=f).mix(rows, context(n))
    for i, mine in enumerate(rows.numpy()):
        order = np.argsort([float(((other - mine) ** 2).sum()) for other in rows.numpy()], kind="stable")
        assert np.allclose(mixed[i], rows.numpy()[order[: n - f]].mean(0))
    assert torch.equal(ids, context(n).clients)


def test_without_hostile_rows_to_expect_every_mixture_is_the_mean() -> None:
    rows = normal(6, 4)
    made = NearestNeighbourMixing(hostile=0, inner={"name": "krum"}).aggregate(rows, context(6))
    assert torch.allclose(made, rows.mean(0))


def test_it_draws_honest_rows_together_and_brings_krum_nearer_to_their_mean() -> None:
    """Clients of differing data: Krum alone takes one client's update; mixed first, it takes what most have in common
    (Allouah et al., Lemma 5: mixing shrinks the honest variance by about f / n).
    """
    errors, variances = [], []
    for seed in range(10):
        rows = normal(15, 10, seed)
        rows[:3] = 4.0
        honest = rows[3:]
        mixing = NearestNeighbourMixing(hostile=3, inner={"name": "krum", "hostile": 3})
        mixed, _ = mixing.mix(rows, context(15))
        variances.append([float(x.var(0).sum()) for x in (honest, mixed[3:])])
        made = (Krum(hostile=3).aggregate(rows, context(15)), mixing.aggregate(rows, context(15)))
        errors.append([float((point - honest.mean(0)).norm()) for point in made])
    alone, with_mixing = torch.tensor(errors).mean(0).tolist()
    before, after = torch.tensor(variances).mean(0).tolist()
    assert after < 0.5 * before
    assert with_mixing < 0.5 * alone


def test_an_inner_rule_with_worker_momentum_is_refused_and_its_own_is_taken_before_mixing() -> None:
    with pytest.raises(ConfigError, match="set `worker_momentum` on NearestNeighbourMixing"):
        NearestNeighbourMixing(inner={"name": "centered_clipping", "worker_momentum": 0.9})
    rule = NearestNeighbourMixing(worker_momentum=0.5, inner={"name": "mean"})
    now = context(4)
    first, second = normal(4, 3, 0), normal(4, 3, 1)
    rule.aggregate(first, now)
    made = rule.aggregate(second, now)
    assert torch.allclose(made, (first + second).mean(0) / 2)


def test_the_inner_table_is_completed_and_checked() -> None:
    rule = NearestNeighbourMixing(inner={"name": "trimmed_mean", "hostile": 2})
    assert rule.inner == {"name": "trimmed_mean", "hostile": 2, "trim": 0.2}
    assert build("aggregator", config_of(rule)) == rule
    assert hash(build("aggregator", config_of(rule))) == hash(rule)
    with pytest.raises(ConfigError, match=r"NearestNeighbourMixing, inner.*did you mean 'hostile'"):
        NearestNeighbourMixing(inner={"name": "krum", "hostil": 2})
    with pytest.raises(ConfigError, match=r"unknown aggregator 'krumm'.*'krum'"):
        NearestNeighbourMixing(inner={"name": "krumm"})


def test_it_is_as_robust_as_its_inner_rule_says() -> None:
    assert NearestNeighbourMixing(inner={"name": "mean"}).average
    assert not NearestNeighbourMixing().average
    assert NearestNeighbourMixing(inner={"name": "fltrust"}).needs_trusted
