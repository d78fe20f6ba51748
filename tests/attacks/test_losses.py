"""The losses of crafting: each against plain autograd in float64, and each does what its name says."""

import itertools
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from mithridate.attacks.accumulative import Accumulative
from mithridate.attacks.losses import NUDGE, Loss, by_targets, nudged, targets
from mithridate.attacks.noise import Noise
from mithridate.attacks.pgd import PGD
from mithridate.attacks.trigger import TRIGGER
from mithridate.attacks.vanilla import Vanilla
from mithridate.core.attack import Attack
from mithridate.core.batch import Batch
from mithridate.core.domain import PIXELS
from mithridate.core.errors import ConfigError
from mithridate.core.registry import build
from mithridate.core.targets import Criterion
from mithridate.core.view import Need, View
from mithridate.maths.calculus import gradient, input_gradient
from mithridate.maths.directions import Normalise
from mithridate.maths.margin import margin
from mithridate.maths.norms import Ball
from mithridate.models import build_model
from mithridate.testing import toy_learner, toy_stream
from mithridate.training.learner import Learner
from tests.attacks.double_backward import dot, followed, naive_unit, parameter_gradient

EPS = 0.1
LOSSES: tuple[Loss, ...] = ("ce", "kl", "cw")
NORMALISE: tuple[Normalise, ...] = ("none", "global", "tensor")
STREAM = toy_stream(0)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def first(batch: Batch, n: int) -> Batch:
    return Batch(batch.x[:n].double(), batch.y[:n])


BATCH = first(STREAM.victim_batch(0, 0), 6)
CLEAN_TRIGGER = first(STREAM.trigger_batch(3, 0), 4)
VALIDATION = first(STREAM.validation.all(), 12)
POINT = (BATCH.x + 0.05 * torch.randn(BATCH.x.shape, generator=rng(3), dtype=torch.float64)).clamp(0, 1)
ALL = torch.ones(len(BATCH.x), dtype=torch.bool)


@pytest.fixture(scope="module")
def learner() -> Learner:
    """Untrained: no sample has a slope of rounding errors only, as one has that a trained model is sure of."""
    model = build_model({"name": "small_cnn", "width": 8}, STREAM.info, seed=0).double()
    return Learner(model, SGD(model.parameters(), lr=0.05, momentum=0.9))


def view_of(learner: Learner) -> View:
    return View(
        0,
        {},
        {
            Need.MODEL: learner.white_box,
            Need.VALIDATION: VALIDATION,
            Need.TRIGGER: CLEAN_TRIGGER,
            Need.ACCURACY: (0.9, 0.9),
        },
    )


# Oracles.


def naive_margin(logits: Tensor, y: Tensor) -> Tensor:
    rows = []
    for z, label in zip(logits, y.tolist(), strict=True):
        rows.append(torch.stack([z[j] for j in range(len(z)) if j != label]).max() - z[label])
    return torch.stack(rows).mean()


def naive_loss(model: nn.Module, loss: Loss, clean: Batch) -> Callable[[Tensor], Tensor]:
    """Pixels to the loss of the poisoned samples, the model in the mode that it is in."""
    with torch.no_grad():
        answer = model(clean.x).softmax(1)

    def value(x: Tensor) -> Tensor:
        logits: Tensor = model(x)
        if loss == "ce":
            return F.cross_entropy(logits, clean.y)
        if loss == "cw":
            return naive_margin(logits, clean.y)
        apart: Tensor = answer * (answer.log() - logits.log_softmax(1))
        return apart.sum(1).mean()

    return value


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return float((a - b).norm()) <= tolerance * float(b.norm())


def test_the_margin_is_the_best_other_class_over_the_label() -> None:
    logits = torch.randn(40, 5, generator=rng(), dtype=torch.float64)
    y = torch.randint(5, (40,), generator=rng(1))
    assert float(margin(logits, y)) == pytest.approx(float(naive_margin(logits, y)), rel=1e-12)
    wrong = torch.tensor([[3.0, 1.0, 0.0]])
    assert float(margin(wrong, torch.tensor([1]))) == 2
    assert float(margin(wrong, torch.tensor([0]))) == -2


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("loss", LOSSES)
def test_slopes_in_pixels_and_parameters_are_those_of_the_loss(learner: Learner, loss: Loss, mode: Any) -> None:
    """For kl with cross-entropy and soft targets in its place: the same derivatives, whole or in chunks."""
    box = by_targets(learner.white_box, loss)
    y = targets(loss, box, BATCH, mode)
    with box.objective(mode) as objective:
        value = naive_loss(learner.model, loss, BATCH)
        leaf = POINT.clone().requires_grad_()
        by_pixels = torch.autograd.grad(value(leaf), leaf)[0]
        by_parameters = torch.autograd.grad(value(POINT), list(learner.model.parameters()))
        assert close(input_gradient(objective, box.parameters, POINT, y).gradient, by_pixels)
        for chunk in (None, 4) if mode == "eval" else (None,):
            found = gradient(objective, box.parameters, POINT, y, chunk=chunk)
            assert all(float((a - b).abs().max()) < 1e-12 for a, b in zip(found.values(), by_parameters, strict=True))


def test_plain_labels_are_under_the_victims_own_criterion(learner: Learner) -> None:
    calls: list[Tensor] = []

    def own(logits: Tensor, y: Tensor) -> Tensor:
        calls.append(y)
        return F.cross_entropy(logits, y, label_smoothing=0.1)

    box = by_targets(Learner(learner.model, learner.optimiser, criterion=own).white_box, "kl")
    logits = torch.randn(6, 4, generator=rng())
    assert torch.equal(box.criterion(logits, BATCH.y), F.cross_entropy(logits, BATCH.y, label_smoothing=0.1))
    assert calls[0] is BATCH.y
    box.criterion(logits, BATCH.y.unsqueeze(1))
    box.criterion(logits, logits.softmax(1))
    assert len(calls) == 1
    assert targets("ce", box, BATCH, "eval") is BATCH.y


def regression(logits: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(logits[:, :1], y)


@pytest.mark.parametrize(
    ("criterion", "y"),
    [
        (F.binary_cross_entropy_with_logits, (torch.rand(6, 4, generator=rng(5)) < 0.5).double()),
        (partial(F.cross_entropy, label_smoothing=0.3), torch.rand(6, 4, generator=rng(5)).double().softmax(1)),
        (regression, torch.rand(6, 1, generator=rng(5)).double()),
    ],
    ids=["many labels", "probabilities", "a column of numbers"],
)
@pytest.mark.parametrize(
    "attack", [PGD(eps=EPS, steps=1, random_start=False), Vanilla(eps=EPS, steps=1)], ids=["pgd", "vanilla"]
)
def test_targets_of_any_form_are_attacked_by_the_criterion_that_the_victim_learns_by(
    learner: Learner, monkeypatch: pytest.MonkeyPatch, attack: Attack, criterion: Criterion, y: Tensor
) -> None:
    victim = Learner(learner.model, learner.optimiser, criterion=criterion)
    batch, validation = Batch(BATCH.x, y), Batch(CLEAN_TRIGGER.x, y[:4].roll(1, 0))
    view = View(0, {}, {Need.MODEL: victim.white_box, Need.VALIDATION: validation})
    model = learner.model.eval()
    leaf = BATCH.x.clone().requires_grad_()
    loss = criterion(model(leaf), y)
    if isinstance(attack, Vanilla):
        usual = parameter_gradient(model, criterion(model(validation.x), validation.y))
        loss = -dot(parameter_gradient(model, loss), usual)
    (slope,) = torch.autograd.grad(loss, leaf)
    sent = attack.poison(batch, view, rng=rng()).x
    moved = (sent != BATCH.x) & (slope.abs() > 1e-9 * slope.abs().max())
    assert float(moved.double().mean()) > 0.3
    assert torch.equal((sent - BATCH.x).sign()[moved], slope.sign()[moved])


@pytest.mark.parametrize("loss", ["kl", "cw"])
def test_losses_of_a_named_class_refuse_other_targets_before_a_run_and_at_a_batch(learner: Learner, loss: Loss) -> None:
    labels = Batch(BATCH.x, torch.zeros(6, 4, dtype=torch.float64))
    attack = PGD(eps=EPS, loss=loss)
    with pytest.raises(ConfigError, match=rf'PGD with loss = "{loss}" needs class numbers .*\(6, 4\); set loss = "ce"'):
        attack.check_inputs(labels)
    with pytest.raises(ConfigError, match=rf'PGD with loss = "{loss}" needs class numbers'):
        build("attack", {"name": "gate_aware", "inner": {"name": "pgd", "loss": loss}}).check_inputs(labels)
    with pytest.raises(ConfigError, match="needs class numbers"):
        attack.poison(labels, view_of(learner), rng=rng())
    attack.check_inputs(Batch(BATCH.x, BATCH.y.to(torch.uint8)))
    PGD(eps=0.0, loss=loss).check_inputs(labels)


def test_kl_has_no_slope_at_the_clean_sample_and_so_begins_beside_it(learner: Learner) -> None:
    box = by_targets(learner.white_box, "kl")
    y = targets("kl", box, BATCH, "eval")
    with box.objective("eval") as objective:
        at, beside = (
            input_gradient(objective, box.parameters, x, y).gradient
            for x in (BATCH.x, nudged(BATCH.x, Ball("linf", EPS), ALL, PIXELS, rng()))
        )
    assert float(at.norm()) < 1e-6 * float(beside.norm())


@pytest.mark.parametrize("ball", [Ball("linf", 0.1), Ball("linf", NUDGE / 10), Ball("l2", NUDGE)], ids=str)
def test_a_nudge_is_small_inside_the_ball_and_only_of_those_that_may_move(ball: Ball) -> None:
    mask = torch.arange(6) % 2 == 0
    moved = nudged(BATCH.x, ball, mask, PIXELS, rng()) - BATCH.x
    assert ball.holds(moved)
    assert float(moved.abs().max()) < 6 * NUDGE
    assert torch.equal(moved.flatten(1).any(1), mask)


@pytest.mark.parametrize("name", ["pgd", "fgsm", "mim"])
@pytest.mark.parametrize("loss", LOSSES)
def test_greedy_attacks_ascend_the_loss_that_was_chosen(name: str, loss: Loss) -> None:
    """Above the start and above noise by far; `random_start` is not needed, not even for kl."""
    start = {"random_start": False} if name == "pgd" else {}
    attack: Attack = build("attack", {"name": name, "eps": EPS, "loss": loss, **start})
    climbs, shakes = [], []
    for seed in range(5):
        stream = toy_stream(seed)
        learner, batch = toy_learner(stream, seed=seed, dtype=torch.float64), first(stream.victim_batch(0, 0), 20)
        sent, noisy = (a.poison(batch, view_of(learner), rng=rng()) for a in (attack, Noise(eps=EPS)))
        value = naive_loss(learner.model.eval(), loss, batch)
        with torch.no_grad():
            clean, shaken, reached = (float(value(x)) for x in (batch.x, noisy.x, sent.x))
        climbs.append(reached - clean)
        shakes.append(abs(shaken - clean))
    assert median(climbs) > 3 * median(shakes)


def test_the_three_losses_are_three_attacks(learner: Learner) -> None:
    sent = [PGD(eps=EPS, loss=loss).poison(BATCH, view_of(learner), rng=rng()).x for loss in LOSSES]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(sent, 2))


# What the poisoned samples offer, in attacks on the parameter gradient.


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("loss", ["kl", "cw"])
def test_vanilla_turns_the_gradient_of_that_loss_against_validation(
    learner: Learner, monkeypatch: pytest.MonkeyPatch, loss: Loss, normalise: Normalise
) -> None:
    view = view_of(learner)
    slope = followed(Vanilla(eps=EPS, steps=1, loss=loss, normalise=normalise), BATCH, view, monkeypatch)
    model = learner.model.eval()
    value = naive_loss(model, loss, BATCH)
    leaf = POINT.clone().requires_grad_()
    offered = naive_unit(parameter_gradient(model, value(leaf)), normalise)
    usual = naive_unit(parameter_gradient(model, F.cross_entropy(model(VALIDATION.x), VALIDATION.y)), normalise)
    expected = -torch.autograd.grad(dot(offered, usual), leaf)[0]
    with view.model.objective("eval"):
        assert close(slope(POINT), expected)


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("loss", ["kl", "cw"])
@pytest.mark.parametrize("update", ["joint", "after_step"])
def test_accumulative_offers_that_loss_in_batch_and_trigger(
    learner: Learner,
    monkeypatch: pytest.MonkeyPatch,
    loss: Loss,
    normalise: Normalise,
    update: Literal["joint", "after_step"],
) -> None:
    """H_t by graphs of graphs: S_val and g(S_t) under cross-entropy, A_t and P(S_T) under the loss."""
    attack = Accumulative(eps=EPS, steps=1, loss=loss, normalise=normalise, trigger_update=update, lam=0.3)
    view = view_of(learner)
    slope = followed(attack, BATCH, view, monkeypatch)
    model = learner.model.eval()
    joint = update == "joint"
    trigger_point = (CLEAN_TRIGGER.x + 0.03).clamp(0, 1) if joint else view.memory[TRIGGER]
    leaf, trigger_leaf = POINT.clone().requires_grad_(), trigger_point.clone().requires_grad_()
    g_validation = naive_unit(parameter_gradient(model, F.cross_entropy(model(VALIDATION.x), VALIDATION.y)), normalise)
    of_trigger = naive_loss(model, loss, CLEAN_TRIGGER)(trigger_leaf)
    product = dot(g_validation, naive_unit(parameter_gradient(model, of_trigger), normalise))
    pull = naive_unit(parameter_gradient(model, product), normalise)
    kept = naive_unit(parameter_gradient(model, F.cross_entropy(model(BATCH.x), BATCH.y)), normalise)
    w = [k.detach() + 0.3 * p for k, p in zip(kept, pull, strict=True)]
    offered = naive_unit(parameter_gradient(model, naive_loss(model, loss, BATCH)(leaf)), normalise)
    expected = torch.autograd.grad(dot(offered, w), (leaf, trigger_leaf))
    with view.model.objective("eval"):
        found = slope(torch.cat([POINT, trigger_point]) if joint else POINT)
    assert close(found[: len(POINT)], expected[0])
    if joint:
        assert close(found[len(POINT) :], expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_trigger_turns_its_gradient_against_validation(loss: Loss, normalise: Normalise) -> None:
    """The cosine of g_val and g_tri falls far, and below zero: by the victim's cross-entropy for `ce` and `kl`.

    `cw` does so by itself: it weighs all samples alike, and cross-entropy only those that the model is unsure of.
    """
    measured: Loss = "cw" if loss == "cw" else "ce"
    clean, poisoned = list[float](), list[float]()
    for seed in range(5):
        stream = toy_stream(seed)
        trigger, validation = first(stream.trigger_batch(3, 0), 20), first(stream.validation.all(), 60)
        learner = toy_learner(stream, seed=seed, dtype=torch.float64)
        view = View(0, {}, {Need.MODEL: learner.white_box, Need.VALIDATION: validation})
        sent = Vanilla(eps=EPS, loss=loss, normalise=normalise).trigger(trigger, view, rng=rng())
        model = learner.model.eval()
        g = naive_unit(parameter_gradient(model, F.cross_entropy(model(validation.x), validation.y)), "global")
        for batch, cosines in ((trigger, clean), (sent, poisoned)):
            g_trigger = naive_unit(parameter_gradient(model, naive_loss(model, measured, batch)(batch.x)), "global")
            cosines.append(float(dot(g, g_trigger).detach()))
    assert median(poisoned) < min(0.0, median(clean)) - 0.1
