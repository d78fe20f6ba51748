"""Attacks without a gradient in the inputs: wrong labels, and the worst of real samples."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mithridate.attacks import WorstSamples, WrongLabels
from mithridate.attacks.worst_samples import aligned, slope
from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError
from mithridate.core.model import WhiteBox
from mithridate.core.seeding import generator, seeded_default
from mithridate.core.targets import IGNORED
from mithridate.core.view import Need, View

RULES = ["next", "least_likely", "random"]


@pytest.fixture
def box() -> WhiteBox:
    with seeded_default(3):
        return WhiteBox(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), F.cross_entropy)


def batch(samples: int, seed: int = 0) -> Batch:
    rng = generator("substituting", seed)
    return Batch(torch.randn(samples, 6, generator=rng), torch.randint(4, (samples,), generator=rng))


def view(box: WhiteBox, validation: Batch[Any]) -> View:
    return View(available={Need.MODEL: box, Need.VALIDATION: validation})


@pytest.mark.parametrize("rule", RULES)
def test_every_label_is_wrong_and_of_a_class_and_inputs_are_as_they_were(box: WhiteBox, rule: Any) -> None:
    clean = batch(40)
    sent = WrongLabels(rule=rule).poison(clean, view(box, clean), rng=generator("flip"))
    assert torch.equal(sent.x, clean.x)
    assert bool((sent.y != clean.y).all())
    assert set(sent.y.tolist()) <= set(range(4))


def test_the_least_likely_label_is_that_of_the_largest_loss(box: WhiteBox) -> None:
    clean = batch(40)
    sent = WrongLabels(rule="least_likely").poison(clean, view(box, clean), rng=generator("flip"))
    with torch.no_grad():
        losses = -box.logits(clean.x).log_softmax(1)
    losses[torch.arange(40), clean.y] = -torch.inf
    assert torch.equal(sent.y, losses.argmax(1))


def test_a_label_that_no_loss_counts_stays(box: WhiteBox) -> None:
    clean = batch(8)
    clean.y[3] = IGNORED
    sent = WrongLabels().poison(clean, view(box, clean), rng=generator("flip"))
    assert sent.y[3] == IGNORED
    assert int((sent.y != clean.y).sum()) == 7


def test_numbers_are_no_labels_and_one_output_has_no_other() -> None:
    with pytest.raises(ConfigError, match="label_flip compares targets"):
        WrongLabels().check_inputs(Batch(torch.zeros(2, 3), torch.zeros(2)))
    single = WhiteBox(nn.Linear(6, 1), F.cross_entropy)
    with pytest.raises(ConfigError, match="one output alone"):
        WrongLabels().poison(batch(4), view(single, batch(4)), rng=generator("flip"))


def test_alignment_is_the_product_of_a_samples_gradient_with_the_validation_parts(box: WhiteBox) -> None:
    """The central difference against a backward pass a sample, in float64."""
    double = WhiteBox(box.module.double(), F.cross_entropy)
    part, pool = (Batch(b.x.double(), b.y) for b in (batch(20, 1), batch(12, 2)))
    direction = slope(double, part)
    expected = []
    for i in range(pool.size):
        g = slope(double, pool.take(slice(i, i + 1)))
        expected.append(float(sum((g[name] * direction[name]).sum() for name in g)))
    assert aligned(double, pool, direction).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_what_is_sent_are_own_samples_with_their_labels_the_most_opposed_ones(box: WhiteBox) -> None:
    own, clean = batch(40, 5), batch(6)
    sent = WorstSamples(distinct=3).poison(clean, view(box, own), rng=generator("worst"))
    part, pool = own.take(slice(0, None, 2)), own.take(slice(1, None, 2))
    worst = aligned(box, pool, slope(box, part)).argsort()[:3]
    assert torch.equal(sent.x, pool.x[worst].repeat(2, 1))
    assert torch.equal(sent.y, pool.y[worst].repeat(2))


def test_a_part_of_a_mapping_is_replaced_whole(box: WhiteBox) -> None:
    class Named(nn.Module):
        def forward(self, a: torch.Tensor) -> torch.Tensor:
            return box.module(a)  # type: ignore[no-any-return]  # a tensor

    module = Named()
    module.inner = box.module
    own = Batch({"a": batch(20, 7).x}, batch(20, 7).y)
    clean: Batch[Any] = Batch({"a": batch(10).x}, batch(10).y)
    sees = view(WhiteBox(module, F.cross_entropy), own)
    attack = WorstSamples(poison_ratio=0.5)
    sent = attack.poison(clean, sees, rng=generator("worst"))
    mask = attack.positions(10, sees, generator("worst"))
    assert torch.equal(sent.x["a"][~mask], clean.x["a"][~mask])
    assert torch.equal(sent.y[~mask], clean.y[~mask])
    rows = {tuple(row) for row in own.x["a"].tolist()}
    assert all(tuple(row) in rows for row in sent.x["a"][mask].tolist())


def test_one_sample_is_too_few_to_choose_from(box: WhiteBox) -> None:
    with pytest.raises(ConfigError, match="S_val has one sample alone"):
        WorstSamples().poison(batch(4), view(box, batch(1)), rng=generator("worst"))
