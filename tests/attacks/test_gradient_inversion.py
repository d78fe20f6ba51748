"""A gradient attack sent as data: the gradient of a batch comes to the wanted one, and a step does what that does."""

from statistics import median
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from mithridate.attacks import budget
from mithridate.attacks.gradient_inversion import GradientInversion
from mithridate.attacks.noise import Noise
from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError
from mithridate.core.registry import build
from mithridate.core.view import Need, View
from mithridate.data.stream import Stream
from mithridate.maths.alignment import turn_towards
from mithridate.maths.calculus import Slope
from mithridate.testing import toy_learner, toy_stream
from mithridate.training.learner import Learner

EPS = 0.15


@pytest.fixture(scope="module")
def several() -> list[tuple[Stream, Learner]]:
    """Streams with trained victims, in float64."""
    return [(s, toy_learner(s, seed=seed, dtype=torch.float64)) for seed, s in enumerate(map(toy_stream, range(5)))]


def doubled(batch: Batch) -> Batch:
    return Batch(batch.x.double(), batch.y)


def view_of(learner: Learner, stream: Stream) -> View:
    things = {Need.MODEL: learner.white_box, Need.VALIDATION: doubled(stream.validation.all())}
    return View(0, {}, things, GradientInversion.needs)


def flat_gradient(learner: Learner, batch: Batch) -> Tensor:
    """By plain autograd, running statistics throughout."""
    learner.model.eval()
    loss = F.cross_entropy(learner.model(batch.x), batch.y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(learner.model.parameters()))])


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def loss_after(learner: Learner, batch: Batch, validation: Batch, lr: float) -> float:
    """L(S_val) after one plain SGD step on a batch."""
    victim = Learner(learner.model, SGD(learner.model.parameters(), lr=lr), update_mode="eval")
    before = victim.snapshot()
    victim.update(batch)
    after = victim.evaluate([validation]).loss
    victim.restore(before)
    return after


@pytest.mark.parametrize(("norm", "ratio"), [("linf", 0.5), ("l2", 1.0)])
def test_the_distance_to_the_wanted_gradient_falls_below_that_of_any_other_batch(
    several: list[tuple[Stream, Learner]], norm: Any, ratio: float
) -> None:
    """Also where half of the samples are clean: the gradient of the whole batch is what comes near."""
    eps, apart = EPS if norm == "linf" else 6 * EPS, []
    for stream, learner in several:
        view, clean = view_of(learner, stream), doubled(stream.victim_batch(0, 0))
        wanted = -20 * flat_gradient(learner, view.validation)
        attack = GradientInversion(eps=eps, norm=norm, strength=20.0, poison_ratio=ratio)
        noise = Noise(eps=eps, norm=norm, poison_ratio=ratio)
        batches = (attack.poison(clean, view, rng=rng()), clean, noise.poison(clean, view, rng=rng()))
        apart.append([float((flat_gradient(learner, b) - wanted).norm() / wanted.norm()) for b in batches])
    near, usual, shaken = (median(values) for values in zip(*apart, strict=True))
    assert near < 0.95  # a gradient of zero is at 1
    assert near < 0.95 * min(usual, shaken)


def test_the_cosine_rises_and_it_says_by_how_much(several: list[tuple[Stream, Learner]]) -> None:
    cosines = []
    for stream, learner in several:
        view, clean = view_of(learner, stream), doubled(stream.victim_batch(0, 0))
        wanted = -flat_gradient(learner, view.validation)
        attack, noise = GradientInversion(eps=EPS, match="cosine"), Noise(eps=EPS)
        batches = (clean, noise.poison(clean, view, rng=rng()), attack.poison(clean, view, rng=rng()))
        cosines.append([float(F.cosine_similarity(flat_gradient(learner, b), wanted, dim=0)) for b in batches])
        assert attack.ascent(view) == pytest.approx((cosines[-1][0], cosines[-1][2]), rel=1e-6)
    usual, shaken, turned = (median(values) for values in zip(*cosines, strict=True))
    assert turned > max(0.0, usual, shaken) + 0.2


def test_one_step_on_it_climbs_the_validation_loss_the_farther_the_stronger(
    several: list[tuple[Stream, Learner]],
) -> None:
    rises = []
    for stream, learner in several:
        view, clean = view_of(learner, stream), doubled(stream.victim_batch(0, 0))
        start = learner.evaluate([view.validation]).loss
        batches = [Noise(eps=EPS).poison(clean, view, rng=rng())]
        batches += [GradientInversion(eps=EPS, strength=s).poison(clean, view, rng=rng()) for s in (1.0, 20.0)]
        rises.append([loss_after(learner, b, view.validation, 1e-3) - start for b in batches])
    shaken, weak, strong = (median(values) for values in zip(*rises, strict=True))
    assert strong > 2 * max(0.0, shaken, weak)


def test_it_poisons_every_batch_or_the_trigger_alone() -> None:
    assert not GradientInversion().ready(View())
    assert GradientInversion(phase=False).ready(View())


def test_compile_is_heard(several: list[tuple[Stream, Learner]], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Slope:
        compiled.append(1)
        return turn_towards(*args, **kwargs)

    monkeypatch.setattr(budget, "turn_towards_compiled", counted)
    stream, learner = several[0]
    attack = GradientInversion(eps=EPS, steps=3, match="cosine", compile=True)
    attack.poison(doubled(stream.victim_batch(0, 0)), view_of(learner, stream), rng=rng())
    assert len(compiled) >= 3


@pytest.mark.parametrize("match", ["l2", "cosine"])
def test_chunks_bound_memory_and_change_nothing(several: list[tuple[Stream, Learner]], match: Any) -> None:
    stream, learner = several[0]
    view, clean = view_of(learner, stream), doubled(stream.victim_batch(0, 0))
    made = [
        GradientInversion(eps=EPS, steps=2, norm="l2", match=match, chunk=chunk).poison(clean, view, rng=rng()).x
        for chunk in (7, 1000)
    ]
    assert float((made[0] - made[1]).abs().max()) < 1e-9 * EPS


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strength": 0.0}, "strength = 0.0"),
        ({"match": "l1"}, "match = 'l1'"),
        ({"compile": True}, 'set match = "cosine", or compile = false'),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("attack", {"name": "gradient_inversion", **values})
