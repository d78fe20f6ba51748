"""Local intrinsic dimensionality against a plain loop, known dimensions, and the corners where a log has no value."""

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from mithridate.core.batch import Batch
from mithridate.core.errors import DataError
from mithridate.core.registry import build
from mithridate.detectors.lid import LID, RESOLUTION, dimensionality

if TYPE_CHECKING:
    from tests.detectors.conftest import World


@pytest.mark.parametrize("neighbours", [2, 12, 60])
def test_against_a_loop(world: "World", neighbours: int) -> None:
    stored, _ = world.stored
    expected = []
    for z in world.asked[0]:
        r = sorted(math.dist(z, s) for s in stored)[:neighbours]
        expected.append(1 / (sum(math.log(ri / r[-1]) for ri in r) / neighbours))
    assert world.scores(LID(neighbours=neighbours)) == pytest.approx(np.array(expected), rel=1e-6)


@pytest.mark.parametrize("dimension", [1, 3, 8])
def test_it_finds_the_dimension_of_a_cloud(dimension: int) -> None:
    rng = np.random.default_rng(0)
    cloud = rng.normal(size=(20_000, dimension))
    centres = rng.normal(size=(50, dimension)) * 0.2
    nearest = np.sort(np.linalg.norm(cloud[None] - centres[:, None], axis=2), 1)[:, :100]
    assert float(dimensionality(torch.tensor(nearest)).mean()) == pytest.approx(dimension, rel=0.12)


def test_a_sample_that_is_stored_has_a_finite_score(world: "World") -> None:
    right = world.observed.predicted == world.clean.y
    scores = world.scores(LID(neighbours=20), Batch(world.clean.x[right], world.clean.y[right]))
    assert np.isfinite(scores).all()
    assert (scores < 0).all()


def test_corners() -> None:
    r = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.5, 1.0, 2.0]], dtype=torch.float64)
    found = dimensionality(r)
    floor = math.log(RESOLUTION)
    assert float(found[0]) == pytest.approx(-3 / (floor + math.log(0.5)))
    assert float(found[1]) == pytest.approx(-1 / floor)
    assert float(found[2]) == math.inf
    assert float(found[3]) == pytest.approx(-3 / (math.log(0.25) + math.log(0.5)))


def test_how_many_neighbours_are_taken(world: "World") -> None:
    """Unset: the paper's share of what is stored."""
    assert (LID()._count(10_000), LID()._count(1000), LID()._count(50)) == (600, 60, 10)
    paper = build("detector", {"name": "lid", "preset": "paper"})
    assert (paper.neighbours, paper.stored) == (600, 10_000)
    assert np.array_equal(world.scores(LID()), world.scores(LID(neighbours=round(0.06 * len(world.stored[1])))))


def test_too_few_samples_is_an_error_that_counts_the_right_ones(world: "World") -> None:
    correct = len(world.stored[1])
    assert len(world.fit(LID(neighbours=correct - 1))["features"]) == correct
    with pytest.raises(DataError, match=f"more than {correct} stored samples; {correct} of 300 .* {correct} as label"):
        world.fit(LID(neighbours=correct))
    with pytest.raises(DataError, match="stored = 20"):
        world.fit(LID(neighbours=30, stored=20))


def test_what_is_stored_is_drawn(world: "World") -> None:
    one, two = (world.fit(LID(stored=40), seed=seed)["features"] for seed in (0, 1))
    assert one.shape == (40, 6)
    assert not torch.equal(one, two)
