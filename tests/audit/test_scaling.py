"""A budget in another unit: every feature has a radius of its own, and nothing else changes."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from mithridate.attacks import Accumulative, GateAware, GradientInversion, Noise, Vanilla
from mithridate.audit.scaling import Scaled
from mithridate.audit.target import samples_of
from mithridate.audit.victim import GivenBatches, Victim
from mithridate.core.attack import Attack
from mithridate.core.batch import Batch
from mithridate.core.domain import Domain
from mithridate.core.view import Memory, View
from mithridate.simulation.online import OnlineRun, run_online
from mithridate.testing.checks.worlds import World, tabular_world
from tests.audit.targets import SCALE, table_target

QUIET: dict[str, Any] = {"trigger_update": "after_step", "steps": 2}
ATTACKS = [
    Noise(eps=0.5),
    Vanilla(eps=0.5, steps=2),
    GradientInversion(eps=0.5, steps=2),
    Accumulative(eps=0.5, **QUIET),
    GateAware(eps=0.5, inner={"name": "accumulative", **QUIET}),
]
EACH = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)


def sent(world: World, attack: Attack, memory: Memory) -> tuple[Batch, Batch]:
    view: View = world.view(attack, memory)
    rng = torch.Generator().manual_seed(1)
    return attack.poison(world.batches[0], view, rng=rng), attack.trigger(world.batches[2], view, rng=rng)


@EACH
def test_a_scale_of_one_is_the_attack_itself(attack: Attack) -> None:
    world = tabular_world()
    ones = torch.ones(world.batches[0].x.shape[1:])
    plain, scaled = sent(world, attack, {}), sent(world, Scaled(attack, ones), {})
    for a, b in zip(plain, scaled, strict=True):
        assert torch.allclose(a.x, b.x, rtol=0, atol=1e-6)
        assert torch.equal(a.y, b.y)


@EACH
def test_each_feature_keeps_to_its_own_radius_and_one_without_is_left_alone(attack: Attack) -> None:
    world = tabular_world()
    n = world.batches[0].x.shape[1]
    scale = torch.linspace(0, 2, n)
    for clean, poisoned in zip(
        (world.batches[0], world.batches[2]), sent(world, Scaled(attack, scale), {}), strict=True
    ):
        moved = (poisoned.x - clean.x).abs().amax(0)
        assert bool((moved <= 0.5 * scale + 1e-5).all())
        assert torch.equal(poisoned.x[:, 0], clean.x[:, 0])
        assert world.domain.holds(poisoned.x)


def test_the_models_flags_are_as_they_were_and_a_run_with_it_ends() -> None:
    world = tabular_world()
    model = world.learner.model
    first = next(m for m in model.modules() if m is not model)
    model.train()
    first.eval()
    flags = [m.training for m in model.modules()]
    attack = Scaled(Accumulative(eps=0.1, **QUIET), torch.full(world.batches[0].x.shape[1:], 0.5))
    sent(world, attack, {})
    assert [m.training for m in model.modules()] == flags


def test_scaled_bounds_hold_one_side_alone() -> None:
    """A domain that is open above stays so."""
    world = tabular_world()
    low = torch.full(world.batches[0].x.shape[1:], -100.0)
    attack = Scaled(Noise(eps=0.5), torch.full_like(low, 3.0))
    view = View(available=world.view(attack, {}).available, domain=Domain(low, torch.inf))
    inside = attack._inside(view).domain
    assert torch.allclose(torch.as_tensor(inside.low), low / 3)
    assert inside.high == torch.inf


def test_a_table_in_its_own_units_is_attacked_as_well_as_one_that_was_scaled_before() -> None:
    """`eps` in standard deviations does what scaling the table by hand does."""
    target = table_target(0, lr=1.0)
    samples = samples_of(target, 4, 0)
    victim = Victim(target, samples, None, 0)
    attack = Scaled(Vanilla(eps=0.5, steps=2), SCALE)
    outcome = run_online(victim.learner(guarded=False), GivenBatches.of(samples), attack, OnlineRun(steps=3, images=0))
    divided = [Batch(b.x / SCALE, b.y) for b in target.stream]
    parts: dict[str, Any] = {
        name: Batch(b.x / SCALE, b.y) for name in ("trusted", "test", "validation") if (b := getattr(target, name))
    }
    plain_model = target.model[1]  # type: ignore[index]  # a Sequential: the layer after the scaling
    victim.put_back()
    plain = replace(target, model=plain_model, stream=divided, **parts)
    same = Victim(plain, samples_of(plain, 4, 0), None, 0)
    run = OnlineRun(steps=3, images=0)
    by_hand = run_online(same.learner(guarded=False), GivenBatches.of(same.samples), attack.inner, run)
    assert outcome.accuracy_after_trigger == pytest.approx(by_hand.accuracy_after_trigger, abs=0.01)
    assert outcome.trace[-1]["loss"] == pytest.approx(by_hand.trace[-1]["loss"], rel=1e-3)
