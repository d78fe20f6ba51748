"""One rule of how much worse a model may become: what is measured, what it is compared with, which limits break."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import ttest_rel
from torch import Tensor, nn

from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.model import WhiteBox
from mithridate.core.past import Weights
from mithridate.core.targets import IGNORED, check_labels
from mithridate.core.tolerance import (
    BEST,
    START,
    PairedTest,
    Quality,
    Tolerance,
    chances,
    flips,
    in_equal_parts,
    quality,
)

STATES = [Quality(1.0, 0.5), Quality(0.8, 0.4), Quality(0.9, 0.7), Quality(math.nan, 0.1), Quality(2.0, 0.2)]


def test_the_best_loss_and_the_best_worst_class_are_kept_each_for_itself() -> None:
    tolerance = Tolerance(reference="best")
    memory: dict[str, Tensor] = {}
    assert [tolerance.compared_with(memory, kept)[:2] for kept in STATES] == [
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
    assert tolerance.compared_with(memory, Quality(3.0, 0.1))[:2] == (3.0, 0.2)


def test_the_start_stays_and_the_previous_one_is_not_noted() -> None:
    memory: dict[str, Tensor] = {}
    assert [Tolerance(reference="start").compared_with(memory, kept) for kept in STATES] == [Quality(1.0, 0.5)] * 5
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
    for state in (Quality(1 / 3, 2 / 7), Quality(math.inf, 0.0), Quality(0.1, 0.5, (True, False), (0.9, 0.3))):
        assert Quality.read(state.note()) == state
        assert state.note().dtype == torch.float64


# The paired test.


def paired(level: float, test: PairedTest = "flips", **fields: Any) -> Tolerance:
    return Tolerance(max_loss_rise=math.inf, max_accuracy_drop=math.inf, level=level, test=test, **fields)


def of(right: Sequence[bool], chance: Sequence[float] | None = None, groups: Sequence[int] | None = None) -> Quality:
    """A quality with so many samples; the chances say by default what is right."""
    chance = [float(hit) for hit in right] if chance is None else chance
    return Quality(0.0, 0.0, tuple(right), tuple(chance), tuple(groups or [0] * len(right)))


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (5, 0), (7, 0), (9, 2), (12, 12), (3, 8), (40, 25)])
def test_flips_are_tested_as_coins(lost: int, won: int) -> None:
    """The p-value is the share of all ways in which the samples that differ can fall that lose as many, or more."""
    n = lost + won
    expected = sum(math.comb(n, k) for k in range(lost, n + 1)) / 2**n if lost > won else 1.0
    p, words = flips([-1] * lost + [1] * won + [0] * 50)
    assert p == pytest.approx(expected, rel=1e-12)
    assert words == f"{lost} lost, {won} won"


def test_chances_are_tested_by_students_t() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 10, 97):
        before = rng.random(n)
        now = (before - 0.1 * rng.random(n)).clip(0, 1)
        expected = ttest_rel(before, now, alternative="greater").pvalue
        assert chances(list(now - before))[0] == pytest.approx(expected, rel=1e-9)
    assert chances([0.1, 0.2, -0.1])[0] == 1.0  # nothing to refuse
    assert chances([0.0, 0.0])[0] == 1.0
    assert chances([-0.1, -0.1])[0] == 0.0
    assert chances([-0.5])[0] == 1.0  # one sample shows nothing


@pytest.mark.parametrize("test", ["flips", "chances"])
def test_equally_good_models_are_refused_as_rarely_as_the_level_says(test: PairedTest) -> None:
    """Over many pairs of models that are right on each sample equally often; all tests together: twice the level."""
    rng, n, trials, level = np.random.default_rng(1), 200, 400, 0.05
    groups = [i % 4 for i in range(n)]
    refused = 0
    for _ in range(trials):
        chance = rng.random(n)
        one, other = (of((rng.random(n) < chance).tolist(), list(rng.normal(chance, 0.1)), groups) for _ in range(2))
        refused += bool(paired(level, test).faults(one, other))
    assert refused / trials <= 2 * level + 3 * math.sqrt(2 * level / trials)
    assert refused > 0


@pytest.mark.parametrize("test", ["flips", "chances"])
def test_what_passes_shrinks_with_the_number_of_samples(test: PairedTest) -> None:
    """Two samples lost of a hundred may be chance; the same share of a thousand is not."""
    for n, refused in ((100, False), (1000, True)):
        now = [i % 50 > 0 for i in range(n)]
        assert bool(paired(0.01, test).faults(of([True] * n), of(now))) is refused


def test_seven_lost_and_none_won_are_refused_at_one_in_a_hundred() -> None:
    for lost, refused in ((6, False), (7, True)):
        faults = paired(0.01).faults(of([True] * 100), of([i >= lost for i in range(100)]))
        assert bool(faults) is refused
    assert faults == [
        "trusted samples: 7 lost, 0 won, p = 0.0078, level 0.01",
        "trusted samples of class 0: 7 lost, 0 won, p = 0.0078, level 0.01",
    ]


def test_a_class_that_pays_for_another_is_found() -> None:
    groups = [i % 4 for i in range(200)]
    before, now = [group != 1 for group in groups], [group != 3 for group in groups]
    (fault,) = paired(0.01).faults(of(before, groups=groups), of(now, groups=groups))
    assert "of class 3: 50 lost, 0 won" in fault


@pytest.mark.parametrize(("test", "kept"), [("flips", 1), ("chances", 2)])
def test_the_best_state_of_a_paired_test_is_the_one_that_was_most_right_or_most_sure(
    test: PairedTest, kept: int
) -> None:
    states = [
        of([True, False, False], [0.6, 0.4, 0.4]),
        of([True, True, False], [0.6, 0.6, 0.1]),
        of([False, True, False], [0.4, 0.9, 0.4]),
        of([True, False, True], [0.5, 0.1, 0.6]),
    ]
    memory: dict[str, Tensor] = {}
    for state in states:
        best = paired(0.1, test, reference="best").compared_with(memory, state)
    assert (best.right, best.chances) == (states[kept].right, states[kept].chances)


def test_a_level_alone_is_a_limit_and_needs_targets_that_can_be_hit() -> None:
    assert not paired(0.01).off
    assert paired(0.0).off
    paired(0.01).check_targets(torch.tensor([0, 3]))
    paired(0.01).check_targets(torch.tensor([[0.0, 1.0]]))
    paired(0.0).check_targets(torch.tensor([0.5]))
    with pytest.raises(ConfigError, match=r"level = 0\.01.*set level = 0"):
        paired(0.01).check_targets(torch.tensor([0.5]))


# What is measured.


def test_chances_are_the_probabilities_of_the_right_answers() -> None:
    box, x = box_of(F.cross_entropy), inputs(30)
    y = torch.arange(30) % 3
    y[4] = IGNORED
    logits = box.logits(x)
    found = quality(box, Batch(x, y))
    expected = [float(logits[i].softmax(0)[y[i]]) for i in range(30) if i != 4]
    assert found.chances == pytest.approx(expected, rel=1e-5)
    assert found.right == tuple(bool(logits[i].argmax() == y[i]) for i in range(30) if i != 4)
    many = (x[:, :3] > 0).float()
    found = quality(box_of(F.binary_cross_entropy_with_logits), Batch(x, many))
    assert found.chances == pytest.approx(
        (many * logits.sigmoid() + (1 - many) * (-logits).sigmoid()).flatten().tolist()
    )
    assert found.groups == tuple([0, 1, 2] * 30)


def test_equal_parts_are_always_the_same() -> None:
    samples = Batch(inputs(12), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 0]))
    assert in_equal_parts(samples, 7).y.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert in_equal_parts(samples, None) is samples
    assert in_equal_parts(samples, 12) is samples


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
    found = quality(box, Batch(x, y))
    hit, known = logits.argmax(1) == y, y != IGNORED
    assert found.worst == min(float(hit[known & (y == c)].double().mean()) for c in torch.unique(y[known]))
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-6)


@pytest.mark.parametrize("left_out", [[100], [2, 5, 100]], ids=["a whole piece", "some of each piece"])
def test_pieces_in_which_targets_are_left_out_count_as_the_others_do(left_out: list[int]) -> None:
    """101 samples go through the model as 100 and one."""
    box, x = box_of(F.cross_entropy), inputs(101)
    y = torch.arange(101) % 3
    y[left_out] = IGNORED
    known = y != IGNORED
    found, expected = quality(box, Batch(x, y)), quality(box, Batch(x[known], y[known]))
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert (found.worst, found.right, found.groups) == (expected.worst, expected.right, expected.groups)


def test_where_nothing_counts_there_is_no_loss() -> None:
    found = quality(box_of(F.cross_entropy), Batch(inputs(4), torch.full((4,), IGNORED)))
    assert math.isnan(found.loss)
    assert (found.worst, found.right) == (1.0, ())


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
