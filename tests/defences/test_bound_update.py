"""The applied step is never longer than its bound, whatever momentum holds."""

import math
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW

from mithridate.core.batch import Batch
from mithridate.core.defence import Defence
from mithridate.core.updates import Updates
from mithridate.core.view import View
from mithridate.data.stream import Stream
from mithridate.defences.bound_update import BoundUpdate
from mithridate.testing import toy_learner
from mithridate.training.learner import Learner


class Exploding(BoundUpdate):
    """The first gradient is a million times too long."""

    def bound(self, updates: Updates, view: View) -> Updates:
        return updates.with_rows(updates.rows * 1e6) if view.step == 0 else updates


class ExplodingUndefended(Defence):
    def bound(self, updates: Updates, view: View) -> Updates:
        return updates.with_rows(updates.rows * 1e6) if view.step == 0 else updates


@pytest.mark.parametrize("optimiser", [SGD, AdamW])
def test_no_step_is_longer_than_the_bound_after_a_huge_gradient(stream: Stream, optimiser: Any) -> None:
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01} if optimiser is SGD else {"lr": 0.05}
    lengths: dict[bool, list[float]] = {}
    for defended in (False, True):
        learner = toy_learner(stream)
        learner.optimiser = optimiser(learner.model.parameters(), **options)
        learner.defence = Exploding(clip_norm=0.1) if defended else ExplodingUndefended()
        lengths[defended] = [learner.update(stream.victim_batch(i % 4, 0)).update_norm for i in range(5)]
    assert max(lengths[False]) > (100 if optimiser is SGD else 0.5)
    assert max(lengths[True]) <= 0.1 * (1 + 1e-4)
    assert min(lengths[True]) > 0.05


def test_momentum_keeps_what_was_cut_off_and_pays_it_out_bounded(stream: Stream) -> None:
    """The limitation that the docstring names: the steps after the huge gradient still go its way, at the bound."""
    learner = toy_learner(stream)
    learner.defence = Exploding(clip_norm=0.01)
    old = torch.cat([p.detach().flatten() for p in learner.model.parameters()])
    moves = []
    for i in range(4):
        learner.update(stream.victim_batch(i, 0))
        new = torch.cat([p.detach().flatten() for p in learner.model.parameters()])
        moves.append((new - old) / (new - old).norm())
        old = new
    assert all(float(moves[0] @ move) > 0.99 for move in moves[1:])


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_shortened_step_keeps_its_direction_and_has_the_bounds_length(stream: Stream, norm: Any) -> None:
    free, held = toy_learner(stream), toy_learner(stream, defence=BoundUpdate(clip_norm=1e-3, norm=norm))
    old = Updates.of(dict(free.model.named_parameters())).rows.double()
    steps = []
    for learner in (free, held):
        learner.update(stream.victim_batch(0, 0))
        steps.append(Updates.of(dict(learner.model.named_parameters())).rows.double() - old)
    length = [float(s.norm() if norm == "l2" else s.abs().max()) for s in steps]
    assert length[0] > 2e-3
    assert length[1] == pytest.approx(1e-3, rel=1e-3)
    assert torch.allclose(steps[1] / length[1], steps[0] / length[0], atol=1e-3)
    assert all(
        torch.equal(a, b) for a, b in zip(free.model.buffers(), held.model.buffers(), strict=True)
    )  # BatchNorm is not bounded


def test_a_bound_that_does_not_bind_returns_no_parameters(stream: Stream) -> None:
    free, held = toy_learner(stream), toy_learner(stream, defence=BoundUpdate(clip_norm=1e6))
    for i in range(3):
        free.update(stream.victim_batch(i, 0))
        assert held.update(stream.victim_batch(i, 0)).verdict.parameters is None
    assert all(torch.equal(a, b) for a, b in zip(free.model.parameters(), held.model.parameters(), strict=True))


class Infinite(BoundUpdate):
    """The gradient is not finite."""

    def bound(self, updates: Updates, view: View) -> Updates:
        return updates.with_rows(torch.full_like(updates.rows, math.inf))


def test_a_step_that_is_not_finite_is_refused(stream: Stream) -> None:
    learner = toy_learner(stream, defence=Infinite(clip_norm=1.0))
    before = [p.detach().clone() for p in learner.model.parameters()]
    done = learner.update(stream.victim_batch(0, 0))
    assert not done.verdict.admit
    assert "not finite" in done.verdict.reason
    assert all(torch.equal(a, b) for a, b in zip(before, learner.model.parameters(), strict=True))
    assert learner.optimiser.state_dict()["state"] == {}


def test_frozen_parameters_are_no_obstacle() -> None:
    frozen = torch.nn.Linear(64, 8).requires_grad_(False)
    model = torch.nn.Sequential(torch.nn.Flatten(), frozen, torch.nn.Linear(8, 4))
    kept = frozen.weight.detach().clone()
    learner = Learner(model, SGD(model.parameters(), lr=1.0), defence=BoundUpdate(clip_norm=1e-3))
    done = learner.update(Batch(torch.rand(8, 1, 8, 8), torch.arange(8) % 4))
    assert done.update_norm == pytest.approx(1e-3, rel=1e-3)
    assert torch.equal(frozen.weight, kept)


def test_a_resumed_learner_goes_on_with_the_same_bits(stream: Stream) -> None:
    whole = toy_learner(stream, defence=BoundUpdate(clip_norm=0.01))
    for i in range(2):
        whole.update(stream.victim_batch(i, 0))
    resumed = toy_learner(stream, defence=BoundUpdate(clip_norm=0.01))
    resumed.restore(whole.snapshot())
    assert whole.memory == {}
    for learner in (whole, resumed):
        for i in range(2, 4):
            learner.update(stream.victim_batch(i, 0))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
