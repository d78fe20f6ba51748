"""GDA and GMM against scipy and scikit-learn, and covariances that cannot be inverted."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import mahalanobis
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.covariance import EmpiricalCovariance

from mithridate.core.errors import DataError
from mithridate.core.registry import build
from mithridate.core.watch import Detector, Observed
from mithridate.detectors.gaussian import squared_distances
from mithridate.detectors.gda import GDA
from mithridate.detectors.gmm import GMM

if TYPE_CHECKING:
    from tests.detectors.conftest import World

Array = NDArray[np.float64]


def fits(world: "World") -> tuple[list[Array], list[float], Array, list[Array]]:
    """Class means, frequencies, the shared covariance, the classes' own."""
    stored, labels = world.stored
    groups = [stored[labels == c] for c in range(3)]
    centred = np.concatenate([g - g.mean(0) for g in groups])
    shared = EmpiricalCovariance(assume_centered=True).fit(centred).covariance_
    own = [EmpiricalCovariance().fit(g).covariance_ for g in groups]
    return [g.mean(0) for g in groups], [len(g) / len(stored) for g in groups], shared, own


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_gda_mixture_is_the_density_of_the_mixture(world: "World", ridge: float) -> None:
    means, shares, shared, _ = fits(world)
    shared = shared + ridge * np.diag(shared).mean() * np.eye(6)
    z, _ = world.asked
    expected = logsumexp([multivariate_normal(m, shared).logpdf(z) + np.log(s) for m, s in zip(means, shares)], axis=0)  # noqa: B905  (three of each)
    assert world.scores(GDA(ridge=ridge)) == pytest.approx(expected, rel=1e-8)


def test_gda_best_is_minus_the_squared_distance_to_the_nearest_mean(world: "World") -> None:
    means, _, shared, _ = fits(world)
    inverse = np.linalg.inv(shared)
    expected = [-min(mahalanobis(z, m, inverse) ** 2 for m in means) for z in world.asked[0]]
    assert world.scores(GDA(likelihood="best", ridge=0.0)) == pytest.approx(np.array(expected), rel=1e-8)


@pytest.mark.parametrize("likelihood", ["mixture", "predicted"])
def test_gmm_has_a_covariance_for_every_class(world: "World", likelihood: Any) -> None:
    means, shares, shared, own = fits(world)
    ridge = 0.1 * np.diag(shared).mean() * np.eye(6)
    z, predicted = world.asked
    each = np.array([multivariate_normal(m, c + ridge).logpdf(z) for m, c in zip(means, own, strict=True)])
    mixture = logsumexp(each + np.log(shares)[:, None], axis=0)
    expected = mixture if likelihood == "mixture" else each[predicted, np.arange(len(z))]
    assert world.scores(GMM(likelihood=likelihood, ridge=0.1)) == pytest.approx(expected, rel=1e-8)


def test_the_ridge_has_no_unit(world: "World") -> None:
    """Features in other units rank the same."""
    seen = world.observed
    for detector in (GDA(likelihood="best", ridge=0.3), GMM(ridge=0.3)):
        one = world.fit(detector)
        large = detector.fit(Observed(8192 * seen.features, seen.logits, seen.y), rng=torch.Generator())
        assert torch.allclose(large["lower"], 8192 * one["lower"], rtol=1e-5)


@pytest.mark.parametrize("cls", [GDA, GMM])
def test_a_singular_covariance_names_the_ridge_and_the_ridge_mends_it(world: "World", cls: type[Detector]) -> None:
    seen = world.observed
    name = "gda" if cls is GDA else "gmm"
    dead = Observed(torch.cat([seen.features, torch.full((len(seen.y), 2), 0.3)], 1), seen.logits, seen.y)
    few = Observed(*(t[:9] for t in seen))
    wide = Observed(torch.cat([few.features] * 40, 1), few.logits, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]))
    wide = Observed(wide.features, torch.nn.functional.one_hot(wide.y, 3).float(), wide.y)
    for clean, rank in ((dead, "rank 6"), (wide, "rank [0-9]")):
        with pytest.raises(DataError, match=f"{name}.*{rank}.*raise the ridge"):
            build("detector", {"name": name, "ridge": 0.0}).fit(clean, rng=torch.Generator())
        fitted = build("detector", {"name": name, "ridge": 1e-6}).fit(clean, rng=torch.Generator())
        assert torch.isfinite(fitted["lower"]).all()
        assert float(fitted["lower"].diagonal(dim1=-2, dim2=-1).min()) > 0


@pytest.mark.parametrize("name", ["gda", "gmm"])
def test_a_class_of_one_is_an_error_that_names_it(world: "World", name: str) -> None:
    seen = world.observed
    right = (seen.y == 1) & (seen.predicted == seen.y)
    gone = right & (right.cumsum(0) > 1)
    rest = Observed(seen.features[~gone], seen.logits[~gone], seen.y[~gone])
    with pytest.raises(DataError, match=rf"{name}: of \d+ clean samples of class 1 the model classifies 1 as labelled"):
        build("detector", {"name": name}).fit(rest, rng=torch.Generator())


@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["", "tiny features, of which the ridge is no rounding error"])
def test_the_released_presets_leave_out_the_volume_and_put_the_ridge_on_the_sum(world: "World", scale: float) -> None:
    """Stated anew: (sum of outer products + 1e-10 I) / n, and minus the squared distance that it gives."""
    seen = world.observed
    stored, labels = world.stored
    z, predicted = world.asked
    stored, z = scale * stored, scale * z
    groups = [stored[labels == c] for c in range(3)]
    means = [g.mean(0) for g in groups]
    scatters = [(g - m).T @ (g - m) for g, m in zip(groups, means, strict=True)]
    shared = np.linalg.inv((sum(scatters) + 1e-10 * np.eye(6)) / len(stored))
    own = [np.linalg.inv((s + 1e-10 * np.eye(6)) / len(g)) for s, g in zip(scatters, groups, strict=True)]
    best = [-min((x - m) @ shared @ (x - m) for m in means) for x in z]
    of_predicted = [-(x - means[c]) @ own[c] @ (x - means[c]) for x, c in zip(z, predicted, strict=True)]
    for name, expected in (("gda", best), ("gmm", of_predicted)):
        detector = build("detector", {"name": name, "preset": "released"})
        fitted = detector.fit(Observed(scale * seen.features.double(), *seen[1:]), rng=torch.Generator())
        pair = (torch.as_tensor(z), fitted["means"], fitted["lower"])
        distances = -squared_distances(*pair)
        found = distances.amax(1) if name == "gda" else distances.gather(1, torch.as_tensor(predicted)[:, None])[:, 0]
        assert found.numpy() == pytest.approx(np.array(expected), rel=1e-8)
        if scale == 1:
            assert world.scores(detector) == pytest.approx(np.array(expected), rel=1e-8)


def test_presets_of_the_text() -> None:
    paper = [build("detector", {"name": name, "preset": "paper"}) for name in ("gda", "gmm")]
    assert [(d.likelihood, d.ridge) for d in paper] == [("mixture", 0.0)] * 2
