"""Which test samples are measured between start and trigger."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mithridate.data.part import Part
from mithridate.simulation.evaluation import Evaluation, spread_over_classes
from mithridate.simulation.online import OnlineRun

UNEVEN = np.repeat([0, 1, 2, 5], [600, 300, 97, 3])


def part(y: NDArray[np.int64] | NDArray[np.float32]) -> Part:
    return Part("test", np.arange(len(y), dtype=np.float32)[:, None], y)


@pytest.mark.parametrize("size", [1, 7, 10, 100, 334, 999, 1000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_class_has_its_share_to_less_than_one_sample(size: int, seed: int) -> None:
    y = np.random.default_rng(9).permutation(UNEVEN)
    chosen = spread_over_classes(y, size, seed)
    assert len(chosen) == len(set(chosen.tolist())) == size
    assert (np.diff(chosen) > 0).all()
    for label in np.unique(y):
        share = size * (y == label).sum() / len(y)
        assert abs((y[chosen] == label).sum() - share) < 1


@pytest.mark.parametrize(
    "y",
    [np.linspace(0, 1, 50, dtype=np.float32), np.zeros((50, 4), dtype=np.int64), np.arange(50) % 5],
    ids=["numbers", "a class a token", "classes"],
)
def test_the_seed_draws_the_subset_and_every_sample_has_a_chance(y: NDArray[np.float32]) -> None:
    draws = [spread_over_classes(y, 10, seed) for seed in range(60)]
    assert np.array_equal(draws[3], spread_over_classes(y, 10, 3))
    assert len({tuple(d.tolist()) for d in draws}) > 50
    times = np.bincount(np.concatenate(draws), minlength=50)
    assert times.min() >= 2  # 12 are expected
    assert times.max() <= 26


def test_classes_that_are_missing_from_the_subset_are_counted() -> None:
    run = OnlineRun(evaluate_size=100)
    cpu = torch.device("cpu")
    assert Evaluation.of(part(np.arange(1000) % 10), run, 0, cpu).classes_unread == 0
    unread = [Evaluation.of(part(UNEVEN), run, seed, cpu).classes_unread for seed in range(30)]
    assert set(unread) == {0, 1}  # a class of 3 in 1000 is among 100 three times in ten
    assert Evaluation.of(part(np.arange(1000) % 10), replace(run, evaluate_size=4), 0, cpu).classes_unread == 6
    assert Evaluation.of(part(UNEVEN), replace(run, evaluate_size=None), 0, cpu).classes_unread == 0
    assert Evaluation.of(part(np.linspace(0, 1, 1000, dtype=np.float32)), run, 0, cpu).classes_unread == 0
