"""The recovered offset, under every threat model of the paper, and what else attacks on rounds share."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor, nn

from mithridate.core.defence import Defence
from mithridate.core.registry import build
from mithridate.core.update_attack import Honest
from mithridate.core.updates import Updates
from mithridate.data.shards import Shards
from mithridate.data.stream import Stream
from mithridate.defences.clip import Clip
from mithridate.maths.norms import Norm, clip_rows
from mithridate.simulation.clients import FederatedRun, federate
from mithridate.simulation.federated import run_federated
from mithridate.simulation.run import victim_optimiser
from mithridate.training.learner import Learner, Update
from mithridate.update_attacks.direct import Direct
from mithridate.update_attacks.hostile import scaled, shared_out, zero_sum


class Watched(Learner):
    """Keeps the update of each round."""

    def apply(self, gradient: Updates, *, batch_loss: float, learned: int, buffers: Mapping[str, Tensor]) -> Update:
        self.applied: list[Tensor] = [*getattr(self, "applied", []), gradient.rows[0].clone()]
        return super().apply(gradient, batch_loss=batch_loss, learned=learned, buffers=buffers)


def updates(
    burned_in: Learner, stream: Stream, attack: dict[str, Any], run: FederatedRun, defence: Defence | None = None
) -> list[Tensor]:
    """What each round came to, every image of the victim part being a client."""
    model = copy.deepcopy(burned_in.model)
    learner = Watched(model, victim_optimiser(model, run), defence=defence)
    federation = federate(stream, Shards(clients=100, partition="one"), seed=0)
    run_federated(learner, federation, build("update_attack", attack), run)
    return learner.applied


def distance(a: Tensor, b: Tensor) -> float:
    """Relative to the length of the second."""
    return float((a - b).norm() / b.norm())


# C.1 and C.2: one hostile client of a hundred does what a hundred do.

WISHES: list[dict[str, Any]] = [
    {"name": "accumulative", "preset": "released", "lam": 0.3},
    {"name": "accumulative", "preset": "paper", "sums": False, "trigger": "reversed", "lam": 0.1},
    {"name": "accumulative", "preset": "paper", "sums": False, "lam": 0.1, "trigger_norm": 2.0},
    {"name": "direct", "trigger_scale": 5.0},
]


@pytest.mark.slow
@pytest.mark.parametrize("clip_norm", [math.inf, 0.05], ids=["C.1", "C.2"])
@pytest.mark.parametrize("attack", WISHES, ids=lambda a: "-".join(map(str, a.values())))
def test_one_client_of_a_hundred_makes_the_update_of_all(
    burned_in: Learner, stream: Stream, attack: dict[str, Any], clip_norm: float
) -> None:
    run = FederatedRun(rounds=2, lr=0.02, batch_norm="frozen")
    defence = Clip(clip_norm=clip_norm)
    one, half, all_ = (
        updates(burned_in, stream, {**attack, "poison_ratio": ratio}, run, defence) for ratio in (0.01, 0.5, 1.0)
    )
    honest = updates(burned_in, stream, {"name": "clean"}, run, defence)
    for found in (one, half):
        assert len(found) == len(all_)
        assert max(distance(a, b) for a, b in zip(found, all_, strict=True)) < 2e-4
    assert distance(all_[-1], honest[-1]) > 0.1
    longest = max(float(row.norm()) for row in all_)
    assert longest <= 0.05 * (1 + 1e-5) if math.isfinite(clip_norm) else longest > 0.05


# C.3: every row is clipped by the server, and the wanted sum may be out of reach.


def a_round(seed: int, *, hostile: int, bound: float, norm: Norm, how: Literal["scale", "project"]) -> Honest:
    """Five honest clients of four parameters, and some hostile ones."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(5, 4, generator=rng, dtype=torch.float64)
    own = torch.randn(hostile, 4, generator=rng, dtype=torch.float64)
    bounded = clip_rows(rows, bound, norm, how=how)
    nothing = torch.zeros(hostile, 1, 1, 1, 1), torch.zeros(hostile, 1, dtype=torch.int64)
    return Honest(rows.sum(0), bounded.sum(0), 5, *nothing, bounded, lambda x, y: own)


def best_miss(honest: Honest, wanted: Tensor, bound: float, norm: Norm) -> float:
    """The smallest distance to the wanted mean that rows inside the bound can reach, by a general optimiser."""
    target = (wanted * honest.clients - honest.bounded_total).numpy()
    m, width = honest.own.shape

    def miss(flat: NDArray[np.float64]) -> float:
        return float(((target - flat.reshape(m, width).sum(0)) ** 2).sum())

    inside = [
        {"type": "ineq", "fun": lambda flat, i=i: bound**2 - (flat.reshape(m, width)[i] ** 2).sum()} for i in range(m)
    ]
    start = np.random.default_rng(0).normal(size=m * width) * bound / 10
    if norm == "l2":
        found = minimize(miss, start, method="SLSQP", constraints=inside, options={"ftol": 1e-14, "maxiter": 500})
    else:
        found = minimize(miss, start, bounds=[(-bound, bound)] * (m * width), options={"ftol": 1e-15, "gtol": 1e-12})
    return math.sqrt(max(float(found.fun), 0.0)) / honest.clients


@pytest.mark.parametrize("hostile", [1, 3])
@pytest.mark.parametrize(("norm", "how"), [("l2", "scale"), ("linf", "project")])
@pytest.mark.parametrize("bound", [0.2, 1.0, 50.0], ids=["far out of reach", "near", "within reach"])
def test_clipped_before_no_rows_come_nearer(
    norm: Norm, how: Literal["scale", "project"], hostile: int, bound: float
) -> None:
    rng = torch.Generator().manual_seed(9)
    for seed in range(4):
        honest = a_round(seed, hostile=hostile, bound=bound, norm=norm, how=how)
        wanted = torch.randn(4, generator=rng, dtype=torch.float64)
        sent = clip_rows(shared_out(wanted, honest), bound, norm, how=how)
        reached = (honest.bounded_total + sent.sum(0)) / honest.clients
        miss, best = float((reached - wanted).norm()), best_miss(honest, wanted, bound, norm)
        assert miss == pytest.approx(best, abs=1e-5)
        assert miss < 1e-12 if bound == 50 else miss > 0.01
        if bound < 50:  # what a naive attacker sends, who forgets the others, comes less near
            naive = clip_rows(wanted.expand(hostile, -1), bound, norm, how=how)
            naively = float(((honest.bounded_total + naive.sum(0)) / honest.clients - wanted).norm())
            assert naively > miss if norm == "l2" else naively >= miss  # clamped, the two may be the same corner


def test_more_hostile_clients_reach_further() -> None:
    """Poisoning m clients relaxes the bound from eta to m eta."""
    misses = []
    for hostile in (1, 2, 4, 8):
        honest = a_round(0, hostile=hostile, bound=0.3, norm="l2", how="scale")
        wanted = torch.tensor([2.0, -2.0, 2.0, -2.0], dtype=torch.float64)
        sent = clip_rows(shared_out(wanted * 9 / honest.clients, honest), 0.3, "l2")
        misses.append(float((wanted * 9 - honest.bounded_total - sent.sum(0)).norm()))
    assert [a - b for a, b in itertools.pairwise(misses)] == pytest.approx([0.3, 0.6, 1.2], rel=1e-9)


class Tiny(nn.Module):
    """Four parameters, to be checked by a general optimiser."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(1, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(x.mean((1, 2, 3)).unsqueeze(1))
        return logits


@pytest.mark.parametrize(("norm", "how"), [("l2", "scale"), ("linf", "project")])
def test_a_whole_round_with_a_bound_before_comes_as_near_as_can_be(stream: Stream, norm: Any, how: Any) -> None:
    torch.manual_seed(3)
    bound = 0.1
    run = FederatedRun(rounds=0, bound="before", momentum=0.0)
    model = Tiny()
    learner = Watched(model, victim_optimiser(model, run), defence=Clip(clip_norm=bound, norm=norm, how=how))
    federation = federate(stream, Shards(clients=8), seed=0)
    _, data = federation.round(0, run)
    rows = torch.stack(
        [
            torch.autograd.grad(nn.functional.cross_entropy(model(x), y), model.last.weight)[0].flatten()
            for x, y in zip(data.x, data.y, strict=True)
        ]
    ).double()
    run_federated(learner, federation, Direct(poison_ratio=0.25, trigger_scale=3.0), run)
    wanted = -3 * rows.mean(0)
    bounded = clip_rows(rows[2:], bound, norm, how=how)
    honest = Honest(rows[2:].sum(0), bounded.sum(0), 6, data.x[:2], data.y[:2], bounded, lambda x, y: rows[:2])
    miss = float((learner.applied[0].double() - wanted).norm())
    assert miss == pytest.approx(best_miss(honest, wanted, bound, norm), rel=1e-4)
    assert miss > 0.01  # out of reach


# Shared pieces.


def test_the_offset_gives_what_is_wanted_exactly_and_in_equal_parts() -> None:
    honest = a_round(1, hostile=3, bound=math.inf, norm="l2", how="scale")
    wanted = torch.arange(4, dtype=torch.float64)
    rows = shared_out(wanted, honest)
    assert torch.equal(rows[0], rows[1])
    assert rows.shape == honest.own.shape
    assert torch.allclose((honest.total + rows.sum(0)) / 8, wanted, atol=1e-12)


@pytest.mark.parametrize(("n", "spread"), [(2, 0.5), (7, 0.1), (7, 2.0)])
def test_random_rows_that_sum_to_zero(n: int, spread: float) -> None:
    rows = torch.full((n, 4000), 0.1, dtype=torch.float64)
    drawn = zero_sum(rows, spread, torch.Generator().manual_seed(0))
    length = float(rows[0].norm())
    assert float(drawn.sum(0).abs().max()) < 1e-10
    expected = spread * length * math.sqrt((n - 1) / n)
    assert drawn.norm(dim=1).tolist() == pytest.approx([expected] * n, rel=0.1)
    assert not torch.allclose(drawn[0], drawn[1])
    assert torch.equal(drawn, zero_sum(rows, spread, torch.Generator().manual_seed(0)))


def test_nothing_to_spread_out() -> None:
    rng = torch.Generator().manual_seed(0)
    assert not zero_sum(torch.ones(3, 5), 0.0, rng).any()
    assert not zero_sum(torch.ones(1, 5), 1.0, rng).any()


def test_an_update_at_a_length() -> None:
    update = torch.tensor([3.0, 4.0])
    assert torch.equal(scaled(update, 2.0, None), torch.tensor([6.0, 8.0]))
    assert torch.allclose(scaled(update, 2.0, 10.0), torch.tensor([6.0, 8.0]))  # the length wins over the factor
    assert not scaled(torch.zeros(2), 1.0, 3.0).any()
    tiny = scaled(update * 1e-30, 1.0, 1.0)
    assert float(tiny.norm()) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("length", [0.1, 7.0])
def test_a_direct_trigger_has_the_length_that_it_is_given(burned_in: Learner, stream: Stream, length: float) -> None:
    run = FederatedRun(rounds=3, momentum=0.0)
    plain, *rest = updates(burned_in, stream, {"name": "clean", "phase": False}, run)
    (sent,) = updates(burned_in, stream, {"name": "direct", "poison_ratio": 0.01, "trigger_norm": length}, run)
    assert rest == []
    assert float(sent.norm()) == pytest.approx(length, rel=1e-3)
    assert float(torch.cosine_similarity(sent, plain, dim=0)) == pytest.approx(-1, abs=1e-3)
    for factor in (1.0, 10.0):
        attack = {"name": "direct", "poison_ratio": 0.2, "trigger_scale": factor}
        (sent,) = updates(burned_in, stream, attack, run)
        assert distance(sent, -factor * plain) < 1e-3


def test_frozen_settings_hold_the_ratio() -> None:
    attack = build("update_attack", {"name": "direct", "poison_ratio": 0.25})
    assert attack.ratio == 0.25
    assert dataclasses.replace(attack, poison_ratio=0.5).ratio == 0.5
