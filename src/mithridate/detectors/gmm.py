"""A Gaussian mixture of a model's features: a mean and a covariance of its own for every class."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Generator, Tensor

from mithridate.core.batch import Batch
from mithridate.core.features import observe
from mithridate.core.registry import register, settings
from mithridate.core.view import Memory, View
from mithridate.core.watch import Detector, Observed
from mithridate.detectors.gaussian import (
    Ridge,
    RidgeOn,
    cholesky,
    log_densities,
    log_frequencies,
    ridge_of,
    squared_distances,
    within_covariance,
)
from mithridate.detectors.stored import by_class


@register(
    "detector",
    "gmm",
    presets={
        "paper": {"likelihood": "mixture", "ridge": 0.0},
        "released": {"likelihood": "distance", "ridge": 1e-10, "ridge_on": "scatter"},
    },
)
@settings
class GMM(Detector):
    """How likely a sample's features are under Gaussians around the class means, each with its own covariance.

    Fitted to the clean samples that the model classifies as labelled; all is computed in float64. A class of fewer
    samples than there are features has a singular covariance, which only the ridge makes usable.

    Args:
        likelihood: `mixture`: the log density of the mixture with the classes' frequencies (the text); `predicted`:
            that of the predicted class alone; `distance`: that without its volume, minus the squared Mahalanobis
            distance to the predicted class's mean (the released code).
        ridge: Added to each covariance's diagonal, >= 0.
        ridge_on: `covariance`: the ridge is a multiple of the mean variance of a feature within classes, the same for
            all classes: one of few samples would else get the sharpest density; `scatter`: it is added as it is to each
            class's sum over samples, which is then divided by their number (the released code, 1e-10).

    Raises:
        DataError: (from `fit`) fewer than two correctly classified clean samples of a class, a feature that is not
            finite, or a covariance that is singular for want of a ridge.

    Source:
        Pang et al., NeurIPS 2021, section 4.1 and appendix B.3; Zheng and Hong, NeurIPS 2018 (its [97]).
    """

    likelihood: Literal["mixture", "predicted", "distance"] = "mixture"
    ridge: Ridge = 0.01
    ridge_on: RidgeOn = "covariance"

    def fit(self, clean: Observed, *, rng: Generator) -> Memory:
        """Class means, Cholesky factors of the classes' covariances, class frequencies."""
        classes = by_class(clean, where="gmm")
        unit = within_covariance(classes).diagonal().mean()
        return {
            "means": torch.stack([features.double().mean(0) for features in classes]),
            "lower": torch.stack(
                [
                    cholesky(
                        within_covariance([features]),
                        ridge_of(self.ridge, self.ridge_on, unit, len(features)),
                        where=f"gmm, class {label}",
                    )
                    for label, features in enumerate(classes)
                ]
            ),
            "log_frequencies": log_frequencies(classes),
        }

    def score(self, batch: Batch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        """(n,) float64: nats, or minus a squared distance for `distance`."""
        seen = observe(view.model.module, [batch])
        means, lower, shares = (fitted[name].to(seen.features.device) for name in ("means", "lower", "log_frequencies"))
        if self.likelihood == "distance":
            return -squared_distances(seen.features, means, lower).gather(1, seen.predicted[:, None]).squeeze(1)
        densities = log_densities(seen.features, means, lower)
        if self.likelihood == "predicted":
            return densities.gather(1, seen.predicted[:, None]).squeeze(1)
        return torch.logsumexp(shares + densities, 1)
