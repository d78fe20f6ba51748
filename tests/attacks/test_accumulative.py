"""Algorithm 1 of Pang et al.: against an independent implementation by double backward, and against its own claims."""

import copy
from dataclasses import replace
from statistics import median
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from mithridate.attacks.accumulative import Accumulative
from mithridate.attacks.trigger import TRIGGER
from mithridate.attacks.vanilla import Vanilla
from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError
from mithridate.core.model import WhiteBox
from mithridate.core.modes import BatchNormMode
from mithridate.core.registry import build
from mithridate.core.view import Need, View
from mithridate.maths.calculus import product_gradient
from mithridate.maths.directions import Normalise
from mithridate.maths.norms import Norm
from mithridate.models import build_model
from mithridate.testing import toy_learner, toy_stream
from mithridate.training.learner import Learner
from tests.attacks.double_backward import Gradients, dot, followed, naive_unit

EPS = 0.1
NORMALISE: tuple[Normalise, ...] = ("none", "global", "tensor")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def first(batch: Batch, n: int) -> Batch:
    return Batch(batch.x[:n].double(), batch.y[:n])


STREAM = toy_stream(0)
BATCH = first(STREAM.victim_batch(0, 0), 4)
CLEAN_TRIGGER = first(STREAM.trigger_batch(3, 0), 3)
VALIDATION = first(STREAM.validation.all(), 12)


@pytest.fixture(scope="module")
def learner() -> Learner:
    """Untrained: no sample has a slope of rounding errors only, as one has that a trained model is sure of."""
    model = build_model({"name": "small_cnn", "width": 8}, STREAM.info, seed=0).double()
    return Learner(model, SGD(model.parameters(), lr=0.05, momentum=0.9))


def view_of(learner: Learner, **things: Any) -> View:
    named = {need.name.lower(): need for need in Need}
    shown: dict[Need, Any] = {
        Need.MODEL: learner.white_box,
        Need.VALIDATION: VALIDATION,
        Need.TRIGGER: CLEAN_TRIGGER,
        Need.ACCURACY: (0.9, 0.9),
    }
    return View(0, {}, shown | {named[k]: v for k, v in things.items()}, Accumulative.needs)


def attack_of(**values: Any) -> Accumulative:
    return Accumulative(**{"eps": EPS, "steps": 2, **values})


# The oracle: Algorithm 1 as printed, with graphs of graphs.


def naive_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Gradients:
    return torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()), create_graph=True)


def naive_product(model: nn.Module, trigger: Batch, normalise: Normalise) -> Tensor:
    """<g_val, g_tri>, normalised or not."""
    g_validation = naive_unit(naive_gradient(model, *VALIDATION), normalise)
    return dot(g_validation, naive_unit(naive_gradient(model, *trigger), normalise))


def naive_alignment(
    model: nn.Module, x: Tensor, trigger: Batch, *, normalise: Normalise, lam: float, clean_weight: float
) -> Tensor:
    """H_t as a function of the accumulative batch's pixels and the trigger's."""
    product = naive_product(model, trigger, normalise)
    pull = naive_unit(torch.autograd.grad(product, list(model.parameters()), create_graph=True), normalise)
    kept = [t.detach() for t in naive_unit(naive_gradient(model, *BATCH), normalise)]
    w = [clean_weight * k + lam * p for k, p in zip(kept, pull, strict=True)]
    return dot(naive_unit(naive_gradient(model, x, BATCH.y), normalise), w)


def naive_slopes(model: nn.Module, x: Tensor, trigger_x: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    """dH_t/dx and dH_t/dx_T: second and third order."""
    model.eval()
    leaf, trigger_leaf = x.clone().requires_grad_(), trigger_x.clone().requires_grad_()
    h = naive_alignment(model, leaf, Batch(trigger_leaf, CLEAN_TRIGGER.y), **how)
    of_batch, of_trigger = torch.autograd.grad(h, (leaf, trigger_leaf), materialize_grads=True)
    return of_batch, of_trigger


def naive_trigger_slope(model: nn.Module, trigger_x: Tensor, normalise: Normalise) -> Tensor:
    model.eval()
    leaf = trigger_x.clone().requires_grad_()
    slope: Tensor = torch.autograd.grad(naive_product(model, Batch(leaf, CLEAN_TRIGGER.y), normalise), leaf)[0]
    return slope


def step(x: Tensor, slope: Tensor, centre: Tensor, norm: Norm, length: float) -> Tensor:
    """One ascent step, projected."""
    if norm == "linf":
        moved = x + length * slope.sign()
        return torch.minimum(torch.maximum(moved, centre - EPS), centre + EPS).clamp(0, 1)
    lengths = slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    delta: Tensor = x + length * slope / lengths - centre
    radius = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    shrink: Tensor = (EPS / radius).clamp(max=1)
    moved = centre + delta * shrink
    return moved.clamp(0, 1)


def naive_craft(model: nn.Module, attack: Accumulative) -> tuple[Tensor, Tensor]:
    """The poisoned batch and the trigger after the first round."""
    length = 2 * EPS / attack.steps
    trigger_x = CLEAN_TRIGGER.x
    for _ in range(attack.steps if attack.trigger_mode == "fixed" else 0):
        slope = naive_trigger_slope(model, trigger_x, attack.normalise)
        trigger_x = step(trigger_x, -slope, CLEAN_TRIGGER.x, attack.norm, length)
    x = BATCH.x
    for _ in range(attack.steps):
        of_batch, of_trigger = naive_slopes(
            model, x, trigger_x, normalise=attack.normalise, lam=attack.lam, clean_weight=attack.clean_weight
        )
        x = step(x, of_batch, BATCH.x, attack.norm, length)
        if attack.trigger_mode == "reoptimised":
            trigger_x = step(trigger_x, of_trigger, CLEAN_TRIGGER.x, attack.norm, length)
    return x, trigger_x


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm()) <= 1e-9 * float(b.norm())


POINT = (BATCH.x + 0.05 * torch.randn(BATCH.x.shape, generator=rng(3), dtype=torch.float64)).clamp(0, 1)
TRIGGER_POINT = (
    CLEAN_TRIGGER.x + 0.05 * torch.randn(CLEAN_TRIGGER.x.shape, generator=rng(4), dtype=torch.float64)
).clamp(0, 1)


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize(("lam", "clean_weight"), [(0.3, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_joint_mode_climbs_h_in_both_batches(
    learner: Learner, monkeypatch: pytest.MonkeyPatch, normalise: Normalise, lam: float, clean_weight: float
) -> None:
    attack = attack_of(steps=1, normalise=normalise, lam=lam, clean_weight=clean_weight)
    view = view_of(learner)
    slope = followed(attack, BATCH, view, monkeypatch)
    with view.model.objective("eval"):  # as inside craft
        found = slope(torch.cat([POINT, TRIGGER_POINT]))
    of_batch, of_trigger = naive_slopes(
        learner.model, POINT, TRIGGER_POINT, normalise=normalise, lam=lam, clean_weight=clean_weight
    )
    assert close(found[: len(POINT)], of_batch)
    assert close(found[len(POINT) :], of_trigger)
    assert (float(of_trigger.norm()) > 0) is (lam > 0)


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize(("mode", "lam", "clean_weight"), [("clean", 0.3, 1.0), ("fixed", 1.0, 0.5)])
def test_the_other_modes_climb_h_in_the_batch(
    learner: Learner,
    monkeypatch: pytest.MonkeyPatch,
    normalise: Normalise,
    mode: str,
    lam: float,
    clean_weight: float,
) -> None:
    attack = attack_of(steps=1, normalise=normalise, lam=lam, clean_weight=clean_weight, trigger_mode=mode)
    view = view_of(learner)
    slope = followed(attack, BATCH, view, monkeypatch)
    with view.model.objective("eval"):
        found = slope(POINT)
    trigger_x = CLEAN_TRIGGER.x if mode == "clean" else view.memory[TRIGGER]
    of_batch, _ = naive_slopes(learner.model, POINT, trigger_x, normalise=normalise, lam=lam, clean_weight=clean_weight)
    assert close(found, of_batch)


def test_batch_statistics_while_crafting(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    """In train mode BatchNorm couples the samples: still H_t, now with that model."""
    attack = attack_of(steps=1, trigger_mode="clean", craft_mode="train", normalise="global")
    view = view_of(learner)
    slope = followed(attack, BATCH, view, monkeypatch)
    with view.model.objective("train"):
        found = slope(POINT)
        leaf = POINT.clone().requires_grad_()
        h = naive_alignment(learner.model, leaf, CLEAN_TRIGGER, normalise="global", lam=1.0, clean_weight=1.0)
        expected = torch.autograd.grad(h, leaf)[0]
    assert close(found, expected)


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("mode", ["reoptimised", "fixed"])
def test_a_round_is_algorithm_1(learner: Learner, normalise: Normalise, mode: str) -> None:
    """In l2 the direction is smooth in the gradient, so all pixels agree; signs do where the gradient is not nought."""
    attack = attack_of(norm="l2", normalise=normalise, trigger_mode=mode)
    view = view_of(learner)
    sent = attack.poison(BATCH, view, rng=rng())
    x, trigger_x = naive_craft(learner.model, attack)
    assert float((sent.x - x).abs().max()) < 1e-8
    assert float((view.memory[TRIGGER] - trigger_x).abs().max()) < 1e-8
    assert torch.equal(attack.trigger(CLEAN_TRIGGER, view, rng=rng()).x, view.memory[TRIGGER])

    signed = replace(attack, norm="linf")
    view = view_of(learner)
    sent = signed.poison(BATCH, view, rng=rng())
    x, trigger_x = naive_craft(learner.model, signed)
    assert float(((sent.x - x).abs() > 1e-8).double().mean()) < 0.01
    assert float(((view.memory[TRIGGER] - trigger_x).abs() > 1e-8).double().mean()) < 0.01


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_batch_gains_alignment(mode: BatchNormMode) -> None:
    """Far more than noise of the same budget gives it, over five burn-ins."""
    attack = attack_of(trigger_update="after_step", craft_mode=mode, steps=8)
    noise = (BATCH.x + EPS * torch.randn(BATCH.x.shape, generator=rng(1), dtype=torch.float64).sign()).clamp(0, 1)
    gained, by_chance = [], []
    for seed in range(5):
        learner = toy_learner(STREAM, seed=seed, dtype=torch.float64)
        view = view_of(learner)
        sent = attack.poison(BATCH, view, rng=rng())
        trigger = Batch(view.memory[TRIGGER], CLEAN_TRIGGER.y)
        with view.model.objective(mode):
            clean, poisoned, noisy = (
                float(naive_alignment(learner.model, x, trigger, normalise="none", lam=1, clean_weight=1).detach())
                for x in (BATCH.x, sent.x, noise)
            )
        gained.append((poisoned - clean) / abs(clean))
        by_chance.append(abs(noisy - clean) / abs(clean))
    assert median(gained) > 2 * median(by_chance)


# The weights.


def test_without_lam_the_trigger_and_the_validation_batch_do_not_matter(learner: Learner) -> None:
    attack = attack_of(lam=0.0, trigger_mode="clean", norm="l2")
    usual = attack.poison(BATCH, view_of(learner), rng=rng()).x
    other = Batch(VALIDATION.x.flip(0)[:9], VALIDATION.y[:9])
    assert torch.equal(attack.poison(BATCH, view_of(learner, validation=other), rng=rng()).x, usual)
    assert torch.equal(attack.poison(BATCH, view_of(learner, trigger=other), rng=rng()).x, usual)
    full = replace(attack, lam=1.0)
    assert not torch.equal(full.poison(BATCH, view_of(learner), rng=rng()).x, usual)
    assert not torch.equal(
        full.poison(BATCH, view_of(learner, trigger=other), rng=rng()).x,
        full.poison(BATCH, view_of(learner), rng=rng()).x,
    )


def test_the_balance_of_the_two_terms_is_all_that_counts_for_signs(learner: Learner) -> None:
    made = [
        attack_of(trigger_mode="clean", normalise="global", lam=lam, clean_weight=clean_weight)
        .poison(BATCH, view_of(learner), rng=rng())
        .x
        for lam, clean_weight in ((1.0, 0.0), (4.0, 0.0), (2.0, 0.5), (8.0, 2.0))
    ]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[2], made[3])
    assert not torch.equal(made[0], made[2])


# The trigger.


def test_the_clean_trigger_stays_as_it_is(learner: Learner) -> None:
    attack, view = attack_of(trigger_mode="clean"), view_of(learner)
    attack.poison(BATCH, view, rng=rng())
    attack.after_step(view, rng())
    assert torch.equal(attack.trigger(CLEAN_TRIGGER, view, rng=rng()).x, CLEAN_TRIGGER.x)
    assert TRIGGER not in view.memory


def a_few_steps_later(learner: Learner) -> Learner:
    """The same victim a few clean steps later."""
    model = copy.deepcopy(learner.model)
    other = Learner(model, SGD(model.parameters(), lr=0.05))
    for i in range(2):
        other.update(first(STREAM.victim_batch(i, 5), 20))
    return other


@pytest.fixture(scope="module")
def moved(learner: Learner) -> Learner:
    return a_few_steps_later(learner)


@pytest.mark.parametrize(("norm", "optimiser"), [("linf", "pgd"), ("l2", "fgsm"), ("l2", "mim")])
def test_the_fixed_trigger_is_vanillas_at_the_burn_in_model(
    learner: Learner, moved: Learner, norm: Norm, optimiser: str
) -> None:
    shared: dict[str, Any] = {"eps": EPS, "norm": norm, "optimiser": optimiser, "steps": 2, "normalise": "global"}
    attack = attack_of(**shared, trigger_mode="fixed")
    view = view_of(learner)
    attack.poison(BATCH, view, rng=rng())
    later = replace(view, available={**view.available, Need.MODEL: moved.white_box})
    attack.after_step(later, rng())
    attack.poison(BATCH, later, rng=rng())
    found = attack.trigger(CLEAN_TRIGGER, later, rng=rng()).x
    of_vanilla = [Vanilla(**shared).trigger(CLEAN_TRIGGER, view_of(by), rng=rng()).x for by in (learner, moved)]
    assert torch.allclose(found, of_vanilla[0], rtol=0, atol=1e-9)  # its S_val comes with a graph, and rounds otherwise
    assert not torch.allclose(found, of_vanilla[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("normalise", NORMALISE)
def test_reoptimising_after_a_step_lowers_the_product_at_the_new_model(normalise: Normalise) -> None:
    """By small steps in l2: signed ones may go to and fro around a lowest point."""
    attack = attack_of(
        trigger_mode="reoptimised",
        trigger_update="after_step",
        normalise=normalise,
        norm="l2",
        eps=0.8,
        steps=6,
        step_size=0.02,
    )
    rises = []
    for seed in range(5):
        learner = toy_learner(STREAM, seed=seed, dtype=torch.float64)
        moved, view = a_few_steps_later(learner), view_of(learner)
        attack.poison(BATCH, view, rng=rng())
        fixed = view.memory[TRIGGER].clone()
        now = replace(view, available={**view.available, Need.MODEL: moved.white_box})
        attack.after_step(now, rng())
        found = attack.trigger(CLEAN_TRIGGER, now, rng=rng()).x
        assert not torch.equal(found, fixed)
        moved.model.eval()
        before, after = (
            float(naive_product(moved.model, Batch(x, CLEAN_TRIGGER.y), normalise).detach()) for x in (fixed, found)
        )
        rises.append((after - before) / abs(before))
    assert median(rises) < 0


@pytest.mark.parametrize("normalise", NORMALISE)
def test_reoptimising_after_a_step_goes_on_from_the_last_trigger(
    learner: Learner, moved: Learner, normalise: Normalise
) -> None:
    attack = attack_of(trigger_update="after_step", normalise=normalise, norm="l2", steps=2, step_size=0.02)
    view = view_of(learner)
    attack.poison(BATCH, view, rng=rng())
    expected = view.memory[TRIGGER].clone()
    attack.after_step(replace(view, available={**view.available, Need.MODEL: moved.white_box}), rng())
    for _ in range(2):
        slope = naive_trigger_slope(moved.model, expected, normalise)
        expected = step(expected, -slope, CLEAN_TRIGGER.x, "l2", 0.02)
    assert float((view.memory[TRIGGER] - expected).abs().max()) < 1e-9


def test_joint_mode_moves_the_trigger_inside_the_round_and_not_after_it(learner: Learner) -> None:
    attack, view = attack_of(), view_of(learner)
    attack.poison(BATCH, view, rng=rng())
    vanilla = Vanilla(eps=EPS, steps=2).trigger(CLEAN_TRIGGER, view_of(learner), rng=rng()).x
    kept = view.memory[TRIGGER].clone()
    assert not torch.equal(kept, vanilla)
    attack.after_step(view, rng())
    assert torch.equal(view.memory[TRIGGER], kept)
    assert torch.equal(attack.trigger(CLEAN_TRIGGER, view, rng=rng()).x, kept)


def test_without_a_phase_the_trigger_is_vanillas_or_where_algorithm_1_begins(learner: Learner) -> None:
    made = {
        update: attack_of(trigger_update=update).trigger(CLEAN_TRIGGER, view_of(learner), rng=rng()).x
        for update in ("joint", "after_step")
    }
    assert torch.equal(
        made["after_step"], Vanilla(eps=EPS, steps=2).trigger(CLEAN_TRIGGER, view_of(learner), rng=rng()).x
    )
    assert torch.equal(made["joint"], CLEAN_TRIGGER.x)


# S_val.


def test_a_part_of_the_validation_images_can_be_used(learner: Learner) -> None:
    whole = attack_of(norm="l2")
    made = replace(whole, validation_size=5).poison(BATCH, view_of(learner), rng=rng()).x
    five = Batch(VALIDATION.x[:5], VALIDATION.y[:5])
    assert torch.equal(made, whole.poison(BATCH, view_of(learner, validation=five), rng=rng()).x)
    assert not torch.equal(made, whole.poison(BATCH, view_of(learner), rng=rng()).x)
    everything = replace(whole, validation_size=999).poison(BATCH, view_of(learner), rng=rng()).x
    assert torch.equal(everything, whole.poison(BATCH, view_of(learner), rng=rng()).x)


def test_resampling_draws_anew_by_the_generator(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = attack_of(resample_validation=True, validation_size=10, steps=1, norm="l2")
    drawn: list[Tensor] = []
    original = Accumulative._validation

    def labelled(batch: Batch) -> Tensor:
        return torch.cat([batch.x.flatten(1), batch.y.double().unsqueeze(1)], dim=1)

    def spy(self: Accumulative, view: View, rng: torch.Generator) -> tuple[Batch, Batch]:
        whole, part = original(self, view, rng)
        drawn.append(labelled(whole))
        return whole, part

    monkeypatch.setattr(Accumulative, "_validation", spy)
    view = view_of(learner)
    made = [attack.poison(BATCH, view_of(learner), rng=rng(seed)).x for seed in (0, 0, 1)]
    generator = rng(0)
    for _ in range(2):
        attack.poison(BATCH, view, rng=generator)
    assert [len(x) for x in drawn] == [10] * 5
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(made[0], made[2])
    assert not torch.equal(drawn[3], drawn[4])  # at every step, not once
    assert all(row in labelled(VALIDATION).tolist() for row in drawn[0].tolist())


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("update", ["joint", "after_step"])
def test_chunks_bound_memory_and_change_nothing(learner: Learner, chunk: int, update: str) -> None:
    made = []
    for size in (chunk, 100):
        attack, view = attack_of(norm="l2", chunk=size, trigger_update=update), view_of(learner)
        sent = attack.poison(BATCH, view, rng=rng()).x
        attack.after_step(view, rng())
        made.append(torch.cat([sent, view.memory[TRIGGER]]))
    assert float((made[0] - made[1]).abs().max()) < 1e-9


def test_with_batch_statistics_chunks_are_not_used(learner: Learner) -> None:
    made = [
        attack_of(craft_mode="train", chunk=chunk, trigger_mode="clean").poison(BATCH, view_of(learner), rng=rng()).x
        for chunk in (5, 100)
    ]
    assert torch.equal(*made)


# Settings.


@pytest.mark.parametrize("update", ["joint", "after_step"])
def test_a_random_start_is_of_the_batch_and_by_the_generator(learner: Learner, update: str) -> None:
    attack = attack_of(random_start=True, steps=1, step_size=0.01, trigger_update=update)
    a, b, c = (attack.poison(BATCH, view_of(learner), rng=rng(seed)).x for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert float((a - c).abs().max()) > 0.03  # further apart than two steps reach
    still = replace(attack, random_start=False)
    assert torch.equal(*(still.poison(BATCH, view_of(learner), rng=rng(seed)).x for seed in (0, 1)))


@pytest.mark.parametrize(
    ("optimiser", "mode", "update"),
    [
        ("pgd", "clean", "joint"),
        ("fgsm", "fixed", "joint"),
        ("pgd", "reoptimised", "joint"),
        ("mim", "reoptimised", "joint"),
        ("pgd", "reoptimised", "after_step"),
        ("mim", "reoptimised", "after_step"),
    ],
)
def test_the_same_positions_are_poisoned_in_every_batch_and_the_trigger(
    learner: Learner, optimiser: str, mode: str, update: str
) -> None:
    attack = attack_of(poison_ratio=0.5, optimiser=optimiser, steps=2, trigger_mode=mode, trigger_update=update)
    trigger = Batch(CLEAN_TRIGGER.x[[0, 1, 2, 0]], CLEAN_TRIGGER.y[[0, 1, 2, 0]])
    view = view_of(learner, trigger=trigger)
    changed = []
    for seed in range(2):
        changed.append(attack.poison(BATCH, view, rng=rng(seed)).x != BATCH.x)
        attack.after_step(view, rng(seed))
    if mode != "clean":
        changed.append(attack.trigger(trigger, view, rng=rng(9)).x != trigger.x)
    masks = [c.flatten(1).any(1) for c in changed]
    assert [int(m.sum()) for m in masks] == [2] * len(masks)
    assert all(torch.equal(m, masks[0]) for m in masks)


@pytest.mark.parametrize(
    ("values", "accuracy", "over"),
    [
        ({}, (0.9, 0.0), False),
        ({"accuracy_floor": 0.8}, (0.9, 0.79), True),
        ({"accuracy_floor": 0.8}, (0.9, 0.8), False),
        ({"max_drop": 0.05}, (0.9, 0.84), True),
        ({"max_drop": 0.05}, (0.9, 0.86), False),
        ({"max_drop": 0.05, "accuracy_floor": 0.88}, (0.9, 0.87), True),
        ({"max_drop": 0.05, "accuracy_floor": 0.1}, (0.9, 0.84), True),
        ({"max_drop": 0.0}, (0.9, 0.95), False),
    ],
)
def test_the_phase_ends_outside_the_range_of_accuracy(
    learner: Learner, values: dict[str, Any], accuracy: tuple[float, float], over: bool
) -> None:
    first = view_of(learner, accuracy=accuracy)
    assert attack_of(**values).ready(replace(first, step=1)) is over
    assert not attack_of(**values).ready(replace(first, step=0))  # a phase that is asked for has a step, as released


def test_the_presets_are_what_the_text_and_the_released_code_say() -> None:
    paper = build("attack", {"name": "accumulative", "preset": "paper"})
    assert (paper.steps, paper.step_size, paper.accuracy_floor, paper.lam) == (100, None, 0.8, 1.0)
    assert (paper.norm, paper.optimiser, paper.random_start) == ("linf", "pgd", False)
    assert (paper.normalise, paper.craft_mode) == ("none", "eval")
    assert (paper.trigger_mode, paper.trigger_update) == ("reoptimised", "joint")
    released = build("attack", {"name": "accumulative", "preset": "released"})
    assert (released.eps, released.steps, released.step_size, released.random_start) == (0.2, 2, None, False)
    assert (released.normalise, released.craft_mode) == ("tensor", "eval")
    assert (released.trigger_mode, released.trigger_update) == ("fixed", "released")
    assert released.accuracy_floor == pytest.approx(1 - 0.18)
    assert build("attack", {"name": "accumulative", "preset": "paper", "steps": 7}).steps == 7


def test_it_is_the_model_at_hand_that_is_attacked(learner: Learner, moved: Learner) -> None:
    attack = attack_of(trigger_mode="clean")
    boxes: list[WhiteBox] = [learner.white_box, moved.white_box]
    made = [attack.poison(BATCH, view_of(learner, model=box), rng=rng()).x for box in boxes]
    assert not torch.equal(*made)


@pytest.mark.parametrize("optimiser", ["pgd", "apgd"])
@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("mode", ["clean", "fixed", "joint"])
def test_the_objective_is_noted_as_it_was_found_and_left(
    learner: Learner, mode: str, normalise: Normalise, optimiser: Any
) -> None:
    """By H_t as graphs of graphs have it. Where it is climbed by apgd, it is never left lower."""
    trigger_mode: Any = "reoptimised" if mode == "joint" else mode
    attack = attack_of(normalise=normalise, trigger_mode=trigger_mode, optimiser=optimiser, steps=4, lam=0.3)
    view = view_of(learner)
    assert attack.ascent(view) is None
    sent = attack.poison(BATCH, view, rng=rng())
    noted = attack.ascent(view)
    assert noted is not None
    left = view.memory.get(TRIGGER, CLEAN_TRIGGER.x)
    begun = CLEAN_TRIGGER.x if mode == "joint" else left
    model = learner.model.eval()
    expected = []
    for x, trigger_x in ((BATCH.x, begun), (sent.x, left)):
        trigger = Batch(trigger_x.clone().requires_grad_(), CLEAN_TRIGGER.y)
        h = naive_alignment(model, x, trigger, normalise=normalise, lam=0.3, clean_weight=1.0)
        expected.append(float(h.detach()))
    assert noted == pytest.approx(expected, rel=1e-8)
    if optimiser == "apgd":
        assert noted[1] >= noted[0]


def test_an_objective_is_that_of_the_last_batch(learner: Learner) -> None:
    """A trigger that was crafted before, and is fed as it is, has none of its own."""
    attack, view = attack_of(trigger_mode="reoptimised", trigger_update="after_step"), view_of(learner)
    attack.poison(BATCH, view, rng=rng())
    assert attack.ascent(view) is not None
    attack.trigger(CLEAN_TRIGGER, view, rng=rng())
    assert attack.ascent(view) is None


def test_a_slope_that_is_that_of_no_function_cannot_be_compared() -> None:
    for options in ({"optimiser": "apgd"}, {"keep": "best"}):
        with pytest.raises(ConfigError, match="two slopes at once"):
            attack_of(beta=1.0, hide="pixels", **options)
        attack_of(beta=1.0, hide="gradient", **options)


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("mode", ["fixed", "joint"])
def test_bfloat16_follows_nearly_the_same_slope(mode: str, normalise: Normalise) -> None:
    """In single precision, for all that is computed beside the passes. Nearly: of clear signs, almost all."""
    model = build_model({"name": "small_cnn", "width": 8}, STREAM.info, seed=0)
    box = Learner(model, SGD(model.parameters(), lr=0.05)).white_box
    batch, trigger, validation = (Batch(b.x.float(), b.y) for b in (BATCH, CLEAN_TRIGGER, VALIDATION))
    trigger_mode: Any = "reoptimised" if mode == "joint" else mode
    sent = {}
    for precision in ("float32", "bfloat16"):
        attack = attack_of(normalise=normalise, trigger_mode=trigger_mode, steps=1, precision=precision)
        view = view_of(Learner(model, SGD(model.parameters(), lr=0.05)), model=box, validation=validation)
        view = replace(view, available={**view.available, Need.TRIGGER: trigger})
        sent[precision] = attack.poison(batch, view, rng=rng()).x - batch.x
    assert sent["bfloat16"].dtype == torch.float32
    agree = (sent["float32"].sign() == sent["bfloat16"].sign()).float().mean()
    assert 0.8 < float(agree) < 1.0


def pulls(attack: Accumulative, view: View, batches: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Whose batch each G_t was computed for."""
    found: list[int] = []

    def spy(*args: Any, **options: Any) -> Any:
        found.append(number)
        return product_gradient(*args, **options)

    monkeypatch.setattr("mithridate.attacks.accumulative.product_gradient", spy)
    for number in range(batches):
        attack.poison(BATCH, view, rng=rng(number))
    return found


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3])])
def test_one_pull_serves_several_batches(
    learner: Learner, every: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = attack_of(trigger_mode="fixed", pull_every=every, steps=1)
    assert pulls(attack, view_of(learner), 5, monkeypatch) == expected


def test_a_pull_that_is_kept_is_the_one_that_was_computed(learner: Learner) -> None:
    """The model has not moved, so both send the same."""
    exact, kept = (attack_of(trigger_mode="fixed", pull_every=every) for every in (1, 2))
    sent = []
    for attack in (exact, kept):
        view = view_of(learner)
        attack.poison(BATCH, view, rng=rng())
        sent.append(attack.poison(BATCH, view, rng=rng(1)).x)
    assert torch.equal(*sent)


def test_a_jointly_poisoned_trigger_has_no_pull_to_keep() -> None:
    with pytest.raises(ConfigError, match="pull_every"):
        attack_of(pull_every=2)


def test_curvature_from_a_part_of_the_validation_samples(learner: Learner) -> None:
    """The mean over parts is that of the whole; as many as there are is the whole, and each step draws anew."""
    whole = attack_of(trigger_mode="clean")
    part = replace(whole, validation_batch=4)
    rngs = rng()
    with whole.round(view_of(learner), rng()) as at:
        exact = at.validation
    v = {name: torch.randn(t.shape, generator=rngs, dtype=t.dtype) for name, t in exact.gradient.items()}
    drawn = []
    for _ in range(150):
        with part.round(view_of(learner), rngs) as at:
            assert all(torch.allclose(at.validation.gradient[name], t) for name, t in exact.gradient.items())
            drawn.append(torch.cat([t.flatten() for t in at.validation.curvature(v).values()]))
    expected = torch.cat([t.flatten() for t in exact.curvature(v).values()])
    assert not torch.equal(drawn[0], drawn[1])
    error = torch.stack(drawn).mean(0) - expected
    assert float(error.norm()) < 0.25 * float((torch.stack(drawn) - expected).norm(dim=1).mean())
    everything = replace(whole, validation_batch=VALIDATION.size).poison(BATCH, view_of(learner), rng=rng())
    assert torch.equal(everything.x, whole.poison(BATCH, view_of(learner), rng=rng()).x)


class Read(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives it no types
    """Counts the values that are read from tensors, at each of which a GPU is waited for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.values += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def as_traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Graphs that are traced from now on, which are run as they are."""
    graphs: list[Any] = []

    def uncompiled(graph: Any, device: object) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr("mithridate.core.compiling._compiled", uncompiled)
    return graphs


@pytest.mark.parametrize(
    "attack", [attack_of(trigger_mode="fixed"), Vanilla(eps=EPS, steps=2)], ids=["accumulative", "vanilla"]
)
def test_traced_inner_steps_send_the_same(attack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch, the trigger, which is smaller, and those of a model that has moved on."""
    graphs = as_traced(monkeypatch)
    sent: dict[bool, list[Tensor]] = {False: [], True: []}
    for traced, images in sent.items():
        victim = Learner(model := tiny(), SGD(model.parameters(), lr=0.5))
        one, view = replace(attack, normalise="tensor", compile=traced), view_of(victim)
        for seed in range(2):
            batch = one.poison(BATCH, view, rng=rng(seed))
            victim.update(batch)
            images += [batch.x, one.trigger(CLEAN_TRIGGER, view, rng=rng()).x]
        assert len(graphs) == 2 * traced
    torch.testing.assert_close(sent[True], sent[False], rtol=0, atol=1e-9)


def tiny() -> nn.Module:
    """Traced soon."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(STREAM.info.shape[0], 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(10)]
        model = nn.Sequential(*layers).double()
        model(BATCH.x)
    return model.eval()


def values_read(learner: Learner, **how: Any) -> list[int]:
    """How many values are read in making a batch, with three and with seven steps."""
    read = []
    for steps in (3, 7):
        attack = attack_of(steps=steps, **how)
        with Read() as counted:
            attack.poison(BATCH, view_of(learner), rng=rng())
        read.append(counted.values)
    return read


@pytest.mark.parametrize("optimiser", ["pgd", "mim", "apgd"])
@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("mode", ["fixed", "joint"])
def test_an_inner_step_waits_for_no_gpu(learner: Learner, mode: str, normalise: Normalise, optimiser: str) -> None:
    trigger_mode = "reoptimised" if mode == "joint" else mode
    three, seven = values_read(learner, normalise=normalise, trigger_mode=trigger_mode, optimiser=optimiser)
    assert three == seven


@pytest.mark.parametrize("normalise", ["none", "tensor"])
def test_nor_does_a_traced_one(normalise: Normalise, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, victim = as_traced(monkeypatch), Learner(model := tiny(), SGD(model.parameters(), lr=0.05))
    how: dict[str, Any] = {"normalise": normalise, "trigger_mode": "clean", "compile": True}
    values_read(victim, **how)  # tracing reads values
    three, seven = values_read(victim, **how)
    assert three == seven
    assert len(graphs) == 1
