"""Gaussian discriminant analysis of a model's features: one mean a class, one covariance for all."""

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
    "gda",
    presets={
        "paper": {"likelihood": "mixture", "ridge": 0.0},
        "released": {"likelihood": "best", "ridge": 1e-10, "ridge_on": "scatter"},
    },
)
@settings
class GDA(Detector):
    """How likely a sample's features are under Gaussians around the class means that share one covariance.

    Fitted to the clean samples that the model classifies as labelled; all is computed in float64.

    Args:
        likelihood: `mixture`: the log density of the mixture with the classes' frequencies (the text's "likelihood");
            `best`: minus the squared Mahalanobis distance to the nearest class mean (the released code).
        ridge: Added to the covariance's diagonal, >= 0.
        ridge_on: `covariance`: the ridge is a multiple of the mean variance of a feature within classes, so that
            features in other units need no other one; `scatter`: it is added as it is to the sum over samples, which is
            then divided by their number (the released code, 1e-10).

    Raises:
        DataError: (from `fit`) fewer than two correctly classified clean samples of a class, a feature that is not
            finite, or a covariance that is singular for want of a ridge.

    Source:
        Pang et al., NeurIPS 2021, section 4.1 and appendix B.3; Lee et al., NeurIPS 2018, arXiv:1807.03888, Eq. (2).
    """

    likelihood: Literal["mixture", "best"] = "mixture"
    ridge: Ridge = 0.01
    ridge_on: RidgeOn = "covariance"

    def fit(self, clean: Observed, *, rng: Generator) -> Memory:
        """Class means, the shared covariance's Cholesky factor, class frequencies."""
        classes = by_class(clean, where="gda")
        covariance = within_covariance(classes)
        added = ridge_of(self.ridge, self.ridge_on, covariance.diagonal().mean(), sum(map(len, classes)))
        return {
            "means": torch.stack([features.double().mean(0) for features in classes]),
            "lower": cholesky(covariance, added, where="gda"),
            "log_frequencies": log_frequencies(classes),
        }

    def score(self, batch: Batch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        """(n,) float64: nats for `mixture`, minus a squared distance for `best`."""
        features = observe(view.model.module, [batch]).features
        means, lower, shares = (fitted[name].to(features.device) for name in ("means", "lower", "log_frequencies"))
        if self.likelihood == "best":
            return -squared_distances(features, means, lower).amin(1)
        return torch.logsumexp(shares + log_densities(features, means, lower), 1)
