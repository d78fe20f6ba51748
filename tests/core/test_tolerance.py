"""One rule of how much worse a model may become: what is measured, what it is compared with, which limits break."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mithridate.core.batch import Batch
from mithridate.core.errors import DataError
from mithridate.core.model import IGNORED, WhiteBox, check_labels
from mithridate.core.past import Weights
from mithridate.core.tolerance import BEST, START, Quality, Tolerance, quality

STATES = [Quality(1.0, 0.5), Quality(0.8, 0.4), Quality(0.9, 0.7), Quality(math.nan, 0.1), Quality(2.0, 0.2)]


def test_the_best_loss_and_the_best_worst_class_are_kept_each_for_itself() -> None:
    tolerance = Tolerance(reference="best")
    memory: dict[str, Tensor] = {}
    assert [tolerance.compared_with(memory, kept) for kept in STATES] == [
        (1.0, 0.5),
        (0.8, 0.5),
        (0.8, 0.7),
        (0.8, 0.7),
        (0.8, 0.7),
    ]
    assert memory.keys() == {BEST}


def test_a_best_that_is_no_number_gives_way() -> None:
    memory: dict[str, Tensor] = {}
    tolerance = Tolerance(reference="best")
    assert math.isnan(tolerance.compared_with(memory, Quality(math.nan, 0.2)).loss)
    assert tolerance.compared_with(memory, Quality(3.0, 0.1)) == (3.0, 0.2)


def test_the_start_stays_and_the_previous_one_is_not_noted() -> None:
    memory: dict[str, Tensor] = {}
    assert [Tolerance(reference="start").compared_with(memory, kept) for kept in STATES] == [(1.0, 0.5)] * 5
    assert memory.keys() == {START}
    memory = {}
    assert [Tolerance().compared_with(memory, kept) for kept in STATES[:3]] == STATES[:3]
    assert memory == {}


@pytest.mark.parametrize(
    ("before", "now", "broken"),
    [
        ((1.0, 0.5), (1.05, 0.45), []),
        ((1.0, 1.0), (1.125, 0.75), []),  # just at the limits
        ((1.0, 0.75), (1.13, 0.75), ["trusted loss 1 to 1.13, limit +0.125"]),
        ((1.0, 1.0), (0.5, 0.74), ["worst class's accuracy 1.000 to 0.740, limit -0.25"]),
        ((1.0, 1.0), (2.0, 0.0), ["trusted loss", "worst class's accuracy"]),
        ((1.0, 0.5), (math.nan, 1.0), ["the trusted loss is nan"]),
        ((1.0, 0.5), (math.inf, 0.0), ["the trusted loss is inf"]),
    ],
)
def test_faults_are_the_limits_that_are_broken(
    before: tuple[float, float], now: tuple[float, float], broken: list[str]
) -> None:
    found = Tolerance(max_loss_rise=0.125, max_accuracy_drop=0.25).faults(Quality(*before), Quality(*now))
    assert len(found) == len(broken)
    assert all(words in fault for words, fault in zip(broken, found, strict=True))


def test_a_limit_that_is_off_is_never_broken_but_by_what_is_no_number() -> None:
    tolerance = Tolerance(max_loss_rise=math.inf, max_accuracy_drop=1.0)
    assert not tolerance.off
    assert Tolerance(max_loss_rise=math.inf, max_accuracy_drop=math.inf).off
    assert tolerance.faults(Quality(0.0, 1.0), Quality(1e30, 0.0)) == []
    assert tolerance.faults(Quality(0.0, 1.0), Quality(math.inf, 1.0)) != []


def test_fractions_of_counts_are_not_exact_and_pass_at_the_limit() -> None:
    assert 0.8 - 0.7 > 0.1
    assert Tolerance(max_accuracy_drop=0.1).faults(Quality(1.0, 0.8), Quality(1.0, 0.7)) == []
    assert Tolerance(max_accuracy_drop=0.1).faults(Quality(1.0, 0.8), Quality(1.0, 0.69)) != []


def test_a_quality_is_noted_in_full() -> None:
    for state in (Quality(1 / 3, 2 / 7), Quality(math.inf, 0.0)):
        assert Quality.read(state.note()) == state
        assert state.note().dtype == torch.float64


# What is measured.


def box_of(criterion: Any, features: int = 3, outputs: int = 3) -> WhiteBox:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(features, outputs), nn.BatchNorm1d(outputs))
    return WhiteBox(module, criterion)


def inputs(n: int, features: int = 3) -> Tensor:
    return torch.randn(n, features, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("n", [7, 1203])
def test_quality_is_the_mean_loss_and_the_class_that_fares_worst(n: int) -> None:
    """More samples than go through at once, the last piece smaller than the others."""
    box, x = box_of(F.cross_entropy), inputs(n)
    y = torch.arange(n) % 3
    box.module.train()
    state = {name: t.clone() for name, t in box.module.state_dict().items()}
    found = quality(box, Batch(x, y))
    assert box.module.training
    assert all(torch.equal(t, state[name]) for name, t in box.module.state_dict().items())
    box.module.eval()
    logits = box.module(x)
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, y).detach()), rel=1e-5)
    hits = logits.argmax(1) == y
    assert found.worst == min(float(hits[y == label].double().mean()) for label in range(3))


def test_other_weights_can_be_measured() -> None:
    box, samples = box_of(F.cross_entropy), Batch(inputs(50), torch.arange(50) % 3)
    old = Weights.of(box.module).copied()
    expected = quality(box, samples)
    with torch.no_grad():
        box.module.get_parameter("0.weight").mul_(-3)
    assert quality(box, samples, old) == expected
    assert quality(box, samples) != expected


def test_of_many_labels_the_worst_label_counts() -> None:
    box, x = box_of(F.binary_cross_entropy_with_logits), inputs(40)
    logits = box.logits(x)
    y = (logits > 0).float()
    assert quality(box, Batch(x, y)).worst == 1.0
    y[:10, 1] = 1 - y[:10, 1]
    y[:4, 2] = 1 - y[:4, 2]
    found = quality(box, Batch(x, y))
    assert found.worst == 0.75
    assert found.loss == pytest.approx(float(F.binary_cross_entropy_with_logits(logits, y).detach()), rel=1e-6)


def test_where_targets_are_numbers_only_the_loss_counts() -> None:
    box, x = box_of(F.mse_loss, outputs=1), inputs(40)
    y = torch.linspace(-1, 1, 40).unsqueeze(1)
    found = quality(box, Batch(x, y))
    assert found.worst == 1.0
    assert found.loss == pytest.approx(float(F.mse_loss(box.logits(x), y).detach()), rel=1e-6)


def test_targets_that_are_left_out_count_nowhere() -> None:
    box, x = box_of(F.cross_entropy), inputs(30)
    logits = box.logits(x)
    y = logits.argmax(1)
    y[:5] = (y[:5] + 1) % 3
    y[5:15] = IGNORED
    assert quality(box, Batch(x, y)).worst == pytest.approx(15 / 20)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_labels_that_the_model_has_no_output_for_are_refused(wrong: int) -> None:
    box, x = box_of(F.cross_entropy), inputs(4)
    with pytest.raises(DataError, match=rf"trusted samples: labels span \[.*{wrong}.*\], but the model has 3 outputs"):
        quality(box, Batch(x, torch.tensor([0, 1, wrong, 2])))


@pytest.mark.parametrize(
    ("logits", "y"),
    [
        (torch.zeros(2, 3), torch.tensor([2, IGNORED])),
        (torch.zeros(2, 1), torch.tensor([5, 7])),  # one output: a number, whatever its type
        (torch.zeros(2, 4, 3), torch.tensor([9, 9])),
        (torch.zeros(2, 3), torch.tensor([[9, 9], [9, 9]])),
        (torch.zeros(2, 3), torch.tensor([9.0, 9.0])),
    ],
)
def test_other_targets_are_not_class_numbers(logits: Tensor, y: Tensor) -> None:
    check_labels(logits, y, where="here")
