"""An attacker who hides from Memorization Discrepancy: Eq. (21) against autograd, and what hiding does and costs."""

import copy
from dataclasses import replace
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import SGD

from mithridate.attacks.accumulative import Accumulative
from mithridate.attacks.hiding import discrepancy_gradient, discrepancy_slope, steer
from mithridate.attacks.trigger import TRIGGER
from mithridate.core.batch import Batch
from mithridate.core.discrepancy import memorization_discrepancy
from mithridate.core.errors import ConfigError
from mithridate.core.model import WhiteBox
from mithridate.core.past import Weights
from mithridate.core.view import Need, View
from mithridate.maths.directions import Normalise
from mithridate.models import build_model
from mithridate.testing import toy_learner, toy_stream
from mithridate.training.history import History
from mithridate.training.learner import Learner
from tests.attacks.double_backward import dot, followed, naive_unit, parameter_gradient

EPS = 0.1
NORMALISE: tuple[Normalise, ...] = ("none", "global", "tensor")
STREAM = toy_stream(0)
SHARED: dict[str, Any] = {"eps": EPS, "steps": 4, "trigger_update": "after_step", "normalise": "global"}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def first(batch: Batch, n: int) -> Batch:
    return Batch(batch.x[:n].double(), batch.y[:n])


BATCH = first(STREAM.victim_batch(0, 0), 12)
CLEAN_TRIGGER = first(STREAM.trigger_batch(3, 0), 8)
VALIDATION = first(STREAM.validation.all(), 20)
POINT = (BATCH.x + 0.05 * torch.randn(BATCH.x.shape, generator=rng(3), dtype=torch.float64)).clamp(0, 1)


def moved_on(made: Learner) -> Learner:
    """Lets a victim move on from the model that its history then keeps as epoch 4; epoch 0 is another one."""
    other = build_model({"name": "small_cnn", "width": 8}, STREAM.info, seed=99).double()
    then = made.snapshot()
    checkpoints = {
        0: Weights(dict(other.named_parameters()), dict(other.named_buffers()), "burn-in epoch 0"),
        4: Weights(then.parameters, then.buffers, "burn-in epoch 4"),
    }
    made.history = History(checkpoints=checkpoints)
    for i in range(4):
        made.update(first(STREAM.victim_batch(i, 5), 20))
    return made


def old_of(learner: Learner) -> Weights:
    assert learner.history is not None
    found = learner.history.checkpoint(4)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def learner() -> Learner:
    """Hardly trained: no sample has a slope of rounding errors only, as one has that a trained model is sure of."""
    model = build_model({"name": "small_cnn", "width": 8}, STREAM.info, seed=0).double()
    return moved_on(Learner(model, SGD(model.parameters(), lr=0.01)))


@pytest.fixture(scope="module")
def old(learner: Learner) -> Weights:
    return old_of(learner)


@pytest.fixture(scope="module")
def several() -> list[tuple[Learner, Batch]]:
    """Victims of several burn-ins, each with a batch of its own, for claims."""
    learners = [moved_on(toy_learner(STREAM, seed=seed, dtype=torch.float64)) for seed in range(7)]
    return [(learner, first(STREAM.victim_batch(i % 5, 0), 20)) for i, learner in enumerate(learners)]


def view_of(learner: Learner, attack: Accumulative | None = None) -> View:
    things = {
        Need.MODEL: learner.white_box,
        Need.VALIDATION: VALIDATION,
        Need.TRIGGER: CLEAN_TRIGGER,
        Need.ACCURACY: (0.9, 0.9),
        Need.HISTORY: learner.history,
    }
    return View(0, {}, things, frozenset(Need) if attack is None else attack.needs, "Accumulative")


def naive_discrepancy(model: nn.Module, old: Weights, x: Tensor, *, still: bool = False) -> Tensor:
    """Mean KL(old || now) by its formula; `still` holds the old answer constant, as it is for the parameters."""
    p: Tensor = functional_call(model, {**old.parameters, **old.buffers}, (x,)).softmax(1)
    p = p.detach() if still else p
    apart: Tensor = p * (p.log() - model(x).log_softmax(1))
    return apart.sum(1).mean()


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm()) <= 1e-9 * float(b.norm())


@pytest.mark.parametrize("chunk", [None, 5])
def test_the_derivatives_are_those_of_the_discrepancy(learner: Learner, old: Weights, chunk: int | None) -> None:
    model = learner.model.eval()
    value = naive_discrepancy(model, old, POINT)
    point = Batch(POINT, BATCH.y)
    assert float(value.detach()) == pytest.approx(
        float(memorization_discrepancy(WhiteBox(model, F.cross_entropy), old, point).mean())
    )
    expected = torch.autograd.grad(value, list(model.parameters()))
    model.train()  # which must not matter
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    found = discrepancy_gradient(learner.white_box, old, POINT, chunk=chunk)
    assert all(float((a - b).abs().max()) < 1e-12 for a, b in zip(found.values(), expected, strict=True))
    slope = discrepancy_slope(learner.white_box, old, POINT, chunk=chunk)
    assert model.training
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    model.eval()
    leaf = POINT.clone().requires_grad_()
    by_pixels = torch.autograd.grad(len(POINT) * naive_discrepancy(model, old, leaf), leaf)[0]
    assert close(slope, by_pixels)


def test_a_steered_slope_has_no_unit() -> None:
    up, away = (torch.randn(5, 1, 4, 4, generator=rng(i), dtype=torch.float64) for i in range(2))
    found = steer(up, away, 0.5)
    assert float((found - steer(100 * up, 0.01 * away, 0.5)).abs().max()) < 1e-12
    assert torch.equal(steer(up, torch.zeros_like(up), 0.5), steer(up, away, 0.0))
    alone = steer(torch.zeros_like(up), away, 0.5).flatten(1)
    assert float((alone.norm(dim=1) - 0.5).abs().max()) < 1e-12
    assert float((alone * away.flatten(1)).sum(1).max()) < 0


# Eq. (21).


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("beta", [0.3, 2.0])
@pytest.mark.parametrize("hide", ["gradient", "pixels"])
def test_the_slope_is_that_of_equation_21(
    learner: Learner, old: Weights, monkeypatch: pytest.MonkeyPatch, normalise: Normalise, beta: float, hide: Any
) -> None:
    """w = g(S_t) + beta grad D + lam G_t by graphs of graphs; with `pixels` two slopes of unit length."""
    attack = Accumulative(
        eps=EPS, steps=1, normalise=normalise, beta=beta, hide=hide, hide_from=4, trigger_mode="clean", lam=0.3
    )
    view = view_of(learner, attack)
    slope = followed(attack, BATCH, view, monkeypatch)
    model = learner.model.eval()
    leaf = POINT.clone().requires_grad_()
    g_validation = naive_unit(parameter_gradient(model, F.cross_entropy(model(VALIDATION.x), VALIDATION.y)), normalise)
    g_trigger = naive_unit(
        parameter_gradient(model, F.cross_entropy(model(CLEAN_TRIGGER.x), CLEAN_TRIGGER.y)), normalise
    )
    pull = naive_unit(parameter_gradient(model, dot(g_validation, g_trigger)), normalise)
    kept = naive_unit(parameter_gradient(model, F.cross_entropy(model(BATCH.x), BATCH.y)), normalise)
    seen = naive_unit(parameter_gradient(model, naive_discrepancy(model, old, POINT, still=True)), normalise)
    share = beta if hide == "gradient" else 0.0
    w = [(k + 0.3 * p + share * s).detach() for k, p, s in zip(kept, pull, seen, strict=True)]
    offered = naive_unit(parameter_gradient(model, F.cross_entropy(model(leaf), BATCH.y)), normalise)
    expected = torch.autograd.grad(dot(offered, w), leaf)[0]
    if hide == "pixels":
        away = torch.autograd.grad(naive_discrepancy(model, old, leaf), leaf)[0]
        expected, away = (t / t.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for t in (expected, away))
        expected = expected - beta * away
    with view.model.objective("eval"):
        found = slope(POINT)
    assert close(found, expected)


def alignment(learner: Learner, x: Tensor, y: Tensor, direction: list[Tensor]) -> float:
    """Cosine of a batch's parameter gradient and a direction."""
    model = learner.model.eval()
    g = naive_unit(parameter_gradient(model, F.cross_entropy(model(x), y)), "global")
    return float(dot(g, naive_unit(direction, "global")).detach())


Several = list[tuple[Learner, Batch]]


def test_by_the_gradient_the_victims_step_itself_lowers_the_discrepancy(several: Several) -> None:
    """g is turned towards +grad D, the victim steps along -g, and so D of what it learned from falls."""
    short, rises = [], []
    for learner, batch in several:
        old, model = old_of(learner), learner.model
        missing = []
        for beta in (0.0, 4.0):
            attack = Accumulative(**SHARED, beta=beta, hide_from=4)
            sent = attack.poison(batch, view_of(learner, attack), rng=rng())
            seen = parameter_gradient(model.eval(), naive_discrepancy(model, old, sent.x, still=True))
            missing.append(1 - alignment(learner, *sent, seen))
        short.append(missing[1] / missing[0])
        twin = copy.deepcopy(model)
        victim = Learner(twin, SGD(twin.parameters(), lr=1e-3), update_mode="eval")
        before = float(memorization_discrepancy(WhiteBox(twin, F.cross_entropy), old, sent).mean())
        victim.update(sent)  # the batch that hides
        rises.append(float(memorization_discrepancy(WhiteBox(twin, F.cross_entropy), old, sent).mean()) - before)
    assert median(short) < 1  # of what the cosine lacks of 1 without hiding
    assert median(rises) < 0


def test_by_the_pixels_the_batch_itself_stands_out_less_and_aligns_less(several: Several) -> None:
    """What hiding gains, and what it costs H_t = <g, g(S_t) + G_t>, both as shares of what they are without hiding."""
    stands_out, aligns = [], []
    for learner, batch in several:
        old, model = old_of(learner), learner.model

        def slope(batch: Batch, model: nn.Module = model) -> list[Tensor]:
            return parameter_gradient(model, F.cross_entropy(model.eval()(batch.x), batch.y))

        seen, gained = [], []
        for beta in (0.0, 4.0):
            attack = Accumulative(**{**SHARED, "normalise": "none"}, beta=beta, hide="pixels", hide_from=4)
            view = view_of(learner, attack)
            sent = attack.poison(batch, view, rng=rng())
            seen.append(float(memorization_discrepancy(WhiteBox(model, F.cross_entropy), old, sent).mean()))
            product = dot(slope(VALIDATION), slope(Batch(view.memory[TRIGGER], CLEAN_TRIGGER.y)))
            w = [k + p for k, p in zip(slope(batch), parameter_gradient(model, product), strict=True)]
            gained.append(float(dot(slope(sent), w).detach()))
        stands_out.append(seen[1] / seen[0])
        aligns.append(gained[1] / gained[0])
    assert median(stands_out) < 0.5
    assert median(aligns) < 0.8


@pytest.mark.parametrize("update", ["joint", "after_step"])
def test_the_trigger_hides_if_asked(several: Several, update: Any) -> None:
    less = []
    for learner, batch in several[:5]:

        def seen(attack: Accumulative, learner: Learner = learner, batch: Batch = batch) -> float:
            view = view_of(learner, attack)
            attack.poison(first(batch, 3), view, rng=rng())
            sent = attack.trigger(CLEAN_TRIGGER, view, rng=rng())
            return float(
                memorization_discrepancy(WhiteBox(learner.model, F.cross_entropy), old_of(learner), sent).mean()
            )

        free = Accumulative(**{**SHARED, "steps": 3, "trigger_update": update}, hide_from=4)
        hiding = replace(free, beta=1.0, hide="pixels")
        less.append(seen(replace(hiding, hide_trigger=True)) / seen(free))
        if update == "after_step":  # its own slope is the same, if not hidden
            assert seen(hiding) == seen(free)
    assert median(less) < 0.8


@pytest.mark.parametrize("values", [{"hide": "pixels"}, {"hide_from": 99}, {"hide": "pixels", "hide_trigger": True}])
def test_without_weight_nothing_is_hidden_and_nothing_looked_at(learner: Learner, values: dict[str, Any]) -> None:
    usual, same = Accumulative(**SHARED), Accumulative(**SHARED, **values)
    assert same.needs == Accumulative.needs
    assert Need.HISTORY not in same.needs
    made = [attack.poison(BATCH, view_of(learner, attack), rng=rng()).x for attack in (usual, same)]
    assert torch.equal(*made)


def test_the_chosen_old_model_is_the_one_that_counts(learner: Learner) -> None:
    def sent(epoch: int | None) -> Tensor:
        attack = Accumulative(**SHARED, beta=1.0, hide="pixels", hide_from=epoch)
        x: Tensor = attack.poison(BATCH, view_of(learner, attack), rng=rng()).x
        return x

    assert torch.equal(sent(None), sent(0))  # the earliest
    assert not torch.equal(sent(0), sent(4))


def test_an_old_model_that_was_not_kept_is_an_error(learner: Learner) -> None:
    attack = Accumulative(**SHARED, beta=1.0, hide_from=7)
    with pytest.raises(ConfigError, match=r"hides from an old model .*burn-in epoch 7"):
        attack.poison(BATCH, view_of(learner, attack), rng=rng())
    empty = view_of(learner, attack)
    empty = replace(empty, available={**empty.available, Need.HISTORY: History()})
    with pytest.raises(ConfigError, match="no older one is kept"):
        replace(attack, hide_from=None).poison(BATCH, empty, rng=rng())


@pytest.mark.parametrize("hide", ["gradient", "pixels"])
def test_batch_statistics_while_crafting_do_not_reach_the_discrepancy(
    learner: Learner, monkeypatch: pytest.MonkeyPatch, old: Weights, hide: Any
) -> None:
    """Craft mode `train`: H_t with the batch's statistics, D in eval mode all the same; flags come back."""
    attack = Accumulative(
        eps=EPS,
        steps=1,
        beta=1.0,
        hide=hide,
        hide_from=4,
        trigger_mode="clean",
        craft_mode="train",
        lam=0.0,
        clean_weight=0.0,
    )
    view = view_of(learner, attack)
    slope = followed(attack, BATCH, view, monkeypatch)
    model = learner.model.eval()
    leaf = POINT.clone().requires_grad_()
    seen = parameter_gradient(model, naive_discrepancy(model, old, POINT, still=True))
    away = torch.autograd.grad(naive_discrepancy(model, old, leaf), leaf)[0]
    with view.model.objective("train"):
        found = slope(POINT)
        offered = parameter_gradient(model, F.cross_entropy(model(leaf), BATCH.y))
        turned = torch.autograd.grad(dot(offered, [t.detach() for t in seen]), leaf)[0]
    lengths = away.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert close(found, turned if hide == "gradient" else -away / lengths)
