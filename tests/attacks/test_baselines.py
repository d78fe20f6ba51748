"""The baselines: noise, FGSM, PGD and MIM on the loss, and no attack at all."""

from collections.abc import Callable
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from mithridate.attacks.clean import Clean
from mithridate.attacks.fgsm import FGSM
from mithridate.attacks.mim import MIM
from mithridate.attacks.noise import Noise
from mithridate.attacks.pgd import PGD
from mithridate.core.attack import Attack
from mithridate.core.batch import Batch
from mithridate.core.registry import build
from mithridate.core.view import Need, View
from mithridate.data.stream import Stream
from mithridate.maths.norms import Norm
from mithridate.models import build_model
from mithridate.testing import toy_learner, toy_stream
from mithridate.training.learner import Learner

EPS = 0.1
DELUSIVE: dict[str, Callable[..., Attack]] = {"fgsm": FGSM, "pgd": PGD, "mim": MIM}


@pytest.fixture(scope="module")
def learner(stream: Stream) -> Learner:
    """Untrained: no sample has a slope of rounding errors only, as one has that a trained model is sure of."""
    model = build_model({"name": "small_cnn", "width": 8}, stream.info, seed=0)
    return Learner(model, SGD(model.parameters(), lr=0.05))


@pytest.fixture(scope="module")
def batch(stream: Stream) -> Batch:
    return stream.victim_batch(0, 0)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def view_of(learner: Learner, attack: Attack) -> View:
    return View(0, {}, {Need.MODEL: learner.white_box}, attack.needs)


def loss_slope(learner: Learner, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of the mean loss in the pixels, by plain autograd, with running statistics."""
    learner.model.eval()
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(learner.model(leaf), y), leaf)[0]


def loss(learner: Learner, batch: Batch) -> float:
    return learner.evaluate([batch]).loss


@pytest.mark.parametrize("name", DELUSIVE)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_loss_rises_far_more_than_under_noise(name: str, norm: Norm) -> None:
    eps = EPS if norm == "linf" else 0.8
    attack = DELUSIVE[name](eps=eps, norm=norm)
    climbs, shakes = [], []
    for seed in range(5):
        stream = toy_stream(seed)
        learner, batch = toy_learner(stream, seed=seed), stream.victim_batch(0, 0)
        sent, noisy = (
            a.poison(batch, view_of(learner, attack), rng=rng()) for a in (attack, Noise(eps=eps, norm=norm))
        )
        clean = loss(learner, batch)
        climbs.append(loss(learner, sent) - clean)
        shakes.append(abs(loss(learner, noisy) - clean))
    assert median(climbs) > 3 * median(shakes)


def test_fgsm_is_its_formula(learner: Learner, batch: Batch) -> None:
    attack = FGSM(eps=EPS)
    sent = attack.poison(batch, view_of(learner, attack), rng=rng())
    expected = (batch.x + EPS * loss_slope(learner, *batch).sign()).clamp(0, 1)
    assert float((sent.x - expected).abs().max()) < 1e-6


def test_pgd_is_its_formula(learner: Learner, batch: Batch) -> None:
    attack = PGD(eps=EPS, steps=4, step_size=0.03, random_start=False)
    sent = attack.poison(batch, view_of(learner, attack), rng=rng())
    x = batch.x
    for _ in range(4):
        x = x + 0.03 * loss_slope(learner, x, batch.y).sign()
        x = torch.minimum(torch.maximum(x, batch.x - EPS), batch.x + EPS).clamp(0, 1)
    assert float(((sent.x - x).abs() > 1e-5).float().mean()) < 0.005  # a sign may be a matter of rounding


def test_mim_is_its_formula(learner: Learner, batch: Batch) -> None:
    attack = MIM(eps=EPS, steps=4, step_size=0.03, decay=0.7)
    sent = attack.poison(batch, view_of(learner, attack), rng=rng())
    x, g = batch.x, torch.zeros_like(batch.x)
    for _ in range(4):
        now = loss_slope(learner, x, batch.y)
        g = 0.7 * g + now / now.abs().sum((1, 2, 3), keepdim=True)
        x = torch.minimum(torch.maximum(x + 0.03 * g.sign(), batch.x - EPS), batch.x + EPS).clamp(0, 1)
    assert float(((sent.x - x).abs() > 1e-5).float().mean()) < 0.005


def test_a_random_start_is_the_default_of_pgd_and_repeats(learner: Learner, batch: Batch) -> None:
    attack = PGD(eps=EPS, steps=1, step_size=0.01)
    a, b, c = (attack.poison(batch, view_of(learner, attack), rng=rng(seed)).x for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    fixed = PGD(eps=EPS, steps=1, step_size=0.01, random_start=False)
    d, e = (fixed.poison(batch, view_of(learner, fixed), rng=rng(seed)).x for seed in (0, 1))
    assert torch.equal(d, e)


def test_batch_statistics_are_a_choice_while_crafting(learner: Learner, batch: Batch) -> None:
    made = []
    for mode in ("eval", "train"):
        attack = build("attack", {"name": "fgsm", "eps": EPS, "craft_mode": mode})
        made.append(attack.poison(batch, view_of(learner, attack), rng=rng()).x)
    assert not torch.equal(made[0], made[1])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_noise_lies_on_the_surface_and_knows_nothing(norm: Norm) -> None:
    grey = Batch(torch.full((200, 1, 8, 8), 0.5), torch.zeros(200, dtype=torch.int64))
    attack = Noise(eps=EPS, norm=norm)
    assert attack.needs == frozenset()
    delta = attack.poison(grey, View(granted=frozenset()), rng=rng()).x - grey.x
    if norm == "linf":
        assert float((delta.abs() - EPS).abs().max()) < 1e-6  # each pixel to its limit
        assert float((delta > 0).float().mean()) == pytest.approx(0.5, abs=0.03)
    else:
        assert float((delta.flatten(1).norm(dim=1) - EPS).abs().max()) < 1e-6
        assert float(delta.mean(0).norm()) < 0.3 * EPS  # no preferred direction
    again = attack.poison(grey, View(granted=frozenset()), rng=rng()).x - grey.x
    other = attack.poison(grey, View(granted=frozenset()), rng=rng(1)).x - grey.x
    assert torch.equal(delta, again)
    assert not torch.equal(delta, other)


def test_clean_changes_nothing_whatever_its_budget(batch: Batch) -> None:
    for act in (Clean(eps=0.5).poison, Clean(eps=0.5).trigger):
        assert act(batch, View(), rng=rng()) is batch


@pytest.mark.parametrize("name", ["clean", "noise", *DELUSIVE])
def test_a_phase_is_had_or_not(name: str) -> None:
    assert build("attack", {"name": name}).ready(View()) is False
    assert build("attack", {"name": name, "phase": False}).ready(View()) is True
