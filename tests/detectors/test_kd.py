"""Kernel density against scikit-learn's, what the bandwidth means, and that nothing underflows."""

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.neighbors import KernelDensity as SklearnDensity

from mithridate.core.batch import Batch
from mithridate.core.errors import DataError
from mithridate.core.registry import build
from mithridate.core.watch import Observed
from mithridate.detectors.kd import KernelDensity

if TYPE_CHECKING:
    from tests.detectors.conftest import World


@pytest.mark.parametrize("bandwidth", [0.01, 0.2, 10.0])
def test_against_scikit_learn(world: "World", bandwidth: float) -> None:
    """Its kernel is exp(-d^2 / 2h^2), normalised: h = sigma / sqrt(2), and the volume is taken off again.

    In one leaf: over several, its bounds are off by tens of nats where the bandwidth is small.
    """
    stored, labels = world.stored
    asked, predicted = world.asked
    h = bandwidth / np.sqrt(2)
    volume = stored.shape[1] * (np.log(h) + 0.5 * np.log(2 * np.pi))
    expected = [
        SklearnDensity(bandwidth=h, leaf_size=len(stored)).fit(stored[labels == c]).score_samples(z[None])[0] + volume
        for z, c in zip(asked, predicted, strict=True)
    ]
    assert world.scores(KernelDensity(bandwidth=bandwidth)) == pytest.approx(np.array(expected), rel=1e-6, abs=1e-9)


def test_only_the_predicted_class_counts(world: "World") -> None:
    """A sample that lies on a clean one of another class than the predicted one gains nothing from it."""
    x, _ = world.clean
    wrong = int((world.observed.predicted != world.clean.y).nonzero()[0])
    one = Batch(x[wrong : wrong + 1], world.clean.y[wrong : wrong + 1])
    stored, labels = world.stored
    label = int(world.observed.predicted[wrong])
    distances = cdist(x[wrong].double().view(1, -1).numpy(), stored[labels == label])
    expected = np.log(np.exp(-((distances / 0.3) ** 2)).mean())
    assert world.scores(KernelDensity(bandwidth=0.3), one)[0] == pytest.approx(expected)


def test_small_bandwidths_do_not_underflow(world: "World") -> None:
    """At the paper's 0.01 a plain sum of float64 kernels is 0 for a far sample; the log still ranks."""
    near, far = torch.full((1, 1, 1, 6), 0.6), torch.full((1, 1, 1, 6), 1.0)
    batch = Batch(torch.cat([near, far]), torch.tensor([0, 0]))
    scores = world.scores(KernelDensity(bandwidth=0.001), batch)
    assert np.isfinite(scores).all()
    assert scores[1] < scores[0] < -1e3


def test_the_measured_bandwidth_is_the_median_gap_and_scales_with_the_features(world: "World") -> None:
    stored, labels = world.stored
    gaps = []
    for c in range(3):
        d = cdist(stored[labels == c], stored[labels == c])
        np.fill_diagonal(d, np.inf)
        gaps += list(d.min(1))
    fitted = world.fit(KernelDensity())
    assert float(fitted["bandwidth"]) == pytest.approx(float(np.sort(gaps)[(len(gaps) - 1) // 2]))
    seen = world.observed
    larger = Observed(7 * seen.features, seen.logits, seen.y)
    again = KernelDensity().fit(larger, rng=torch.Generator().manual_seed(0))
    assert float(again["bandwidth"]) == pytest.approx(7 * float(fitted["bandwidth"]), rel=1e-6)


def test_what_is_stored_is_drawn_per_class_from_the_correct_ones(world: "World") -> None:
    fitted = world.fit(KernelDensity(per_class=20))
    assert torch.bincount(fitted["classes"]).tolist() == [20, 20, 20]
    stored, labels = world.stored
    for c in range(3):
        mine = fitted["features"][fitted["classes"] == c].double().numpy()
        assert (cdist(mine, stored[labels == c]).min(1) == 0).all()
    other = world.fit(KernelDensity(per_class=20), seed=1)
    assert not torch.equal(fitted["features"], other["features"])


def test_presets_are_the_text_and_the_code() -> None:
    assert build("detector", {"name": "kd", "preset": "paper"}).bandwidth == 0.01
    assert build("detector", {"name": "kd", "preset": "released"}).bandwidth ** -2 == pytest.approx(0.01)


def test_errors_say_what_is_missing(world: "World") -> None:
    seen = world.observed
    keep = seen.y != 2
    without = Observed(seen.features[keep], seen.logits[keep], seen.y[keep])
    with pytest.raises(DataError, match=r"of 0 clean samples of class 2 the model classifies 0 .* 2 are needed"):
        KernelDensity().fit(without, rng=torch.Generator())
    twins = Observed(torch.zeros_like(seen.features), seen.logits, seen.y)
    with pytest.raises(DataError, match="set `bandwidth`"):
        KernelDensity().fit(twins, rng=torch.Generator())
    assert KernelDensity(bandwidth=1.0).fit(twins, rng=torch.Generator())["features"].abs().sum() == 0
    broken = Observed(seen.features * torch.nan, seen.logits, seen.y)
    with pytest.raises(DataError, match="not finite"):
        KernelDensity(bandwidth=1.0).fit(broken, rng=torch.Generator())
