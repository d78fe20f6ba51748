"""The poisoned trigger alone: it turns its gradient against validation, and so one step on it hurts."""

from statistics import median
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from mithridate.attacks.noise import Noise
from mithridate.attacks.vanilla import Vanilla
from mithridate.core.attack import Attack
from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError
from mithridate.core.registry import build
from mithridate.core.view import Need, View
from mithridate.data.stream import Stream
from mithridate.maths.directions import Normalise
from mithridate.maths.norms import Norm
from mithridate.models import build_model
from mithridate.testing import toy_learner, toy_stream
from mithridate.training.learner import Learner

EPS = 0.15
EPSILON = torch.finfo(torch.float64).eps
STREAMS = [toy_stream(seed) for seed in range(5)]
NORMALISE: tuple[Normalise, ...] = ("none", "global", "tensor")


@pytest.fixture(scope="module")
def learner(stream: Stream) -> Learner:
    """Untrained: no sample has a slope of rounding errors only, as one has that a trained model is sure of."""
    model = build_model({"name": "small_cnn", "width": 8}, stream.info, seed=0).double()
    return Learner(model, SGD(model.parameters(), lr=0.05))


@pytest.fixture(scope="module")
def several() -> list[tuple[Stream, Learner]]:
    """Streams with trained victims, for claims."""
    return [(stream, toy_learner(stream, seed=seed, dtype=torch.float64)) for seed, stream in enumerate(STREAMS)]


def doubled(batch: Batch) -> Batch:
    return Batch(batch.x.double(), batch.y)


def view_of(learner: Learner, stream: Stream, attack: Attack, n: int = 60) -> View:
    validation = doubled(stream.validation.all())
    things = {Need.MODEL: learner.white_box, Need.VALIDATION: Batch(validation.x[:n], validation.y[:n])}
    return View(0, {}, things, attack.needs)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss_gradient(learner: Learner, x: Tensor, y: Tensor) -> list[Tensor]:
    learner.model.eval()
    loss = F.cross_entropy(learner.model(x), y)
    return list(torch.autograd.grad(loss, list(learner.model.parameters()), create_graph=True))


def product(learner: Learner, a: Batch, b: Batch, normalise: Normalise) -> Tensor:
    """<g_a, g_b> by plain autograd."""
    g, h = loss_gradient(learner, *a), loss_gradient(learner, *b)
    if normalise == "tensor":
        return torch.stack(
            [F.cosine_similarity(s.flatten(), t.flatten(), dim=0) for s, t in zip(g, h, strict=True)]
        ).sum()
    s, t = torch.cat([v.flatten() for v in g]), torch.cat([v.flatten() for v in h])
    return F.cosine_similarity(s, t, dim=0) if normalise == "global" else s @ t


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_product_falls_below_zero_and_below_that_of_noise(
    several: list[tuple[Stream, Learner]], normalise: Normalise, norm: Norm
) -> None:
    eps = EPS if norm == "linf" else 6 * EPS
    attack = Vanilla(eps=eps, norm=norm, normalise=normalise, steps=10)
    cosines = []
    for stream, learner in several:
        view = view_of(learner, stream, attack)
        clean = doubled(stream.trigger_batch(3, 0))
        noisy = Noise(eps=eps, norm=norm).trigger(clean, view, rng=rng())
        sent = attack.trigger(clean, view, rng=rng())
        cosines.append([float(product(learner, view.validation, b, "global").detach()) for b in (clean, noisy, sent)])
    usual, shaken, turned = (median(values) for values in zip(*cosines, strict=True))
    assert turned < min(0, usual, shaken) - 0.2


def loss_after(learner: Learner, batch: Batch, validation: Batch, lr: float) -> float:
    """L(S_val) after one plain SGD step on a batch, running statistics throughout."""
    victim = Learner(learner.model, SGD(learner.model.parameters(), lr=lr), update_mode="eval")
    before = victim.snapshot()
    victim.update(batch)
    after = victim.evaluate([validation]).loss
    victim.restore(before)
    return after


def test_one_step_on_it_raises_the_validation_loss(several: list[tuple[Stream, Learner]]) -> None:
    """By the step's length times the product, to first order; and more than noise does, or the clean trigger."""
    attack, lr, rises = Vanilla(eps=EPS), 1e-5, []
    for stream, learner in several:
        view = view_of(learner, stream, attack)
        clean = doubled(stream.trigger_batch(3, 0))
        sent = attack.trigger(clean, view, rng=rng())
        noisy = Noise(eps=EPS).trigger(clean, view, rng=rng())
        start = learner.evaluate([view.validation]).loss
        rises.append([loss_after(learner, b, view.validation, lr) - start for b in (sent, noisy, clean)])
        first_order = -lr * float(product(learner, view.validation, sent, "none").detach())
        assert rises[-1][0] == pytest.approx(first_order, rel=0.05)
    poisoned, shaken, usual = (median(values) for values in zip(*rises, strict=True))
    assert poisoned > 2 * max(0, shaken, usual)


def test_a_step_of_the_climb_is_the_sign_of_the_mixed_derivative(stream: Stream, learner: Learner) -> None:
    """One small step from the clean trigger, against double backward."""
    clean = doubled(stream.trigger_batch(3, 0))
    for normalise in NORMALISE:
        attack = Vanilla(eps=EPS, steps=1, step_size=0.01, normalise=normalise, norm="l2")
        view = view_of(learner, stream, attack)
        leaf = clean.x.clone().requires_grad_()
        slope = torch.autograd.grad(product(learner, view.validation, Batch(leaf, clean.y), normalise), leaf)[0]
        lengths = slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        expected = (clean.x - 0.01 * slope / lengths).clamp(0, 1)
        worst = float(lengths.max() / lengths.min())  # what dividing by its length does to a slope's rounding errors
        assert float((attack.trigger(clean, view, rng=rng()).x - expected).abs().max()) <= 100 * EPSILON * worst


def test_chunks_bound_memory_and_change_nothing(stream: Stream, learner: Learner) -> None:
    clean = doubled(stream.trigger_batch(3, 0))
    made = []
    for chunk in (7, 1000):
        attack = Vanilla(eps=EPS, steps=2, norm="l2", chunk=chunk)
        made.append(attack.trigger(clean, view_of(learner, stream, attack), rng=rng()).x)
    assert float((made[0] - made[1]).abs().max()) < 1e-9 * EPS


def test_with_batch_statistics_chunks_are_not_used(stream: Stream, learner: Learner) -> None:
    clean = doubled(stream.trigger_batch(3, 0))
    made = []
    for mode, chunk in (("train", 7), ("train", 1000), ("eval", 1000)):
        attack: Attack = build(
            "attack", {"name": "vanilla", "eps": EPS, "steps": 2, "craft_mode": mode, "chunk": chunk}
        )
        made.append(attack.trigger(clean, view_of(learner, stream, attack), rng=rng()).x)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[1], made[2])


def test_there_is_no_phase() -> None:
    assert Vanilla().ready(View()) is True


def test_the_presets_are_what_the_text_and_the_released_code_say() -> None:
    paper = build("attack", {"name": "vanilla", "preset": "paper"})
    assert (paper.steps, paper.step_size, paper.normalise, paper.random_start) == (100, None, "none", False)
    released = build("attack", {"name": "vanilla", "preset": "released"})
    assert (released.eps, released.steps, released.normalise, released.step_size) == (0.2, 2, "tensor", None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eps": -0.1}, "eps = -0.1"),
        ({"eps": float("inf")}, "eps = inf"),
        ({"steps": -1}, "steps = -1"),
        ({"poison_ratio": 1.5}, "poison_ratio = 1.5"),
        ({"norm": "l1"}, "norm = 'l1'"),
        ({"chunk": 0}, "chunk = 0"),
        ({"chunk": -5}, "chunk = -5"),
        ({"step_size": 0.0}, "step_size = 0.0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("attack", {"name": "vanilla", **values})
