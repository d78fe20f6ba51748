"""A model whose features are the pixels themselves, so that every score has an oracle in numpy."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mithridate.core.batch import Batch
from mithridate.core.features import observe
from mithridate.core.model import WhiteBox
from mithridate.core.view import Memory, Need, View
from mithridate.core.watch import Detector, Observed

SIZE, CLASSES = 6, 3


@dataclass(frozen=True)
class World:
    """Images of six pixels, bright in two of them by class; the model answers by the brightest pair."""

    model: nn.Module
    clean: Batch
    fresh: Batch

    @property
    def observed(self) -> Observed:
        return observe(self.model, [self.clean])

    def view(self, detector: Detector, **things: Any) -> View:
        held: dict[Need, Any] = {Need.MODEL: WhiteBox(self.model, F.cross_entropy)}
        return View(0, {}, held | {Need[name]: thing for name, thing in things.items()}, detector.needs, "it")

    def fit(self, detector: Detector, seed: int = 0) -> Memory:
        return detector.fit(self.observed, rng=torch.Generator().manual_seed(seed))

    def scores(self, detector: Detector, batch: Batch | None = None) -> NDArray[np.float64]:
        found = detector.score(batch or self.fresh, self.view(detector), self.fit(detector))
        return found.double().numpy()

    @property
    def stored(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Features and labels of the clean samples that are classified as labelled."""
        right = self.observed.right()
        return right.features.double().numpy(), right.y.numpy()

    @property
    def asked(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Features and predicted classes of the fresh samples."""
        seen = observe(self.model, [self.fresh])
        return seen.features.double().numpy(), seen.predicted.numpy()


def images(n: int, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    y = rng.choice(CLASSES, n, p=[0.5, 0.3, 0.2])
    x = rng.uniform(0.1, 0.5, (n, SIZE)) * rng.uniform(0.5, 1, (SIZE,))
    for i, label in enumerate(y):
        x[i, 2 * label : 2 * label + 2] += 0.15
    return Batch(torch.tensor(x, dtype=torch.float32).view(n, 1, 1, SIZE), torch.tensor(y))


def pairs() -> Tensor:
    return torch.eye(CLASSES).repeat_interleave(2, dim=1)


@pytest.fixture(scope="session")
def world() -> World:
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIZE, CLASSES, bias=False))
    with torch.no_grad():
        model.get_parameter("1.weight").copy_(20 * pairs())
    world = World(model, images(300, 0), images(25, 1))
    assert 250 < len(world.stored[1]) < 300  # some are wrong, or nobody would see that these are left out
    return world
