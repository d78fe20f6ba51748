"""Gaussians fitted to features, in float64."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mithridate.core.errors import DataError

Ridge = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Added to a diagonal; `RidgeOn` says to which."""

RidgeOn = Literal["covariance", "scatter"]
"""`covariance`: in units of a mean variance; `scatter`: as it is, to the sum over samples that is then divided by n."""


def ridge_of(ridge: float, on: RidgeOn, variance: Tensor, samples: int) -> Tensor:
    """What a covariance's diagonal gains.

    Args:
        ridge: >= 0.
        on: What it is added to.
        variance: The mean variance of a feature, a scalar.
        samples: How many the covariance is of.
    """
    return ridge * variance if on == "covariance" else torch.full_like(variance, ridge / samples)


def within_covariance(classes: list[Tensor]) -> Tensor:
    """Covariance (features, features) around the classes' own means, over all samples; maximum likelihood, float64."""
    centred = torch.cat([features.double() - features.double().mean(0) for features in classes])
    return centred.T @ centred / len(centred)


def cholesky(covariance: Tensor, added: Tensor, *, where: str) -> Tensor:
    """Lower triangle L with L L^T = covariance + added * I.

    Args:
        covariance: (features, features) float64.
        added: To the diagonal, a scalar >= 0.
        where: The detector, named in the message.

    Raises:
        DataError: The sum is singular: more features than samples, features that never vary, and too small a ridge.
    """
    size = len(covariance)
    filled = covariance + added * torch.eye(size, dtype=covariance.dtype, device=covariance.device)
    values = torch.linalg.eigvalsh(filled)
    # The rounding errors of a sum of so many products: an eigenvalue below them is zero for all that we know.
    rank = int((values > size * torch.finfo(values.dtype).eps * values[-1]).sum())
    if rank < size:
        raise DataError(
            f"{where}: the covariance of the {size} features has rank {rank} with a ridge of {float(added):.3g} "
            "(features that never vary, or fewer clean samples than features); raise the ridge, 0.01 of the covariance "
            "say, or give more clean samples."
        )
    lower: Tensor = torch.linalg.cholesky(filled)
    return lower


def squared_distances(features: Tensor, means: Tensor, lower: Tensor) -> Tensor:
    """Squared Mahalanobis distance of each sample to each class mean.

    Args:
        features: (n, features).
        means: (classes, features) float64.
        lower: Cholesky factor of each class's covariance, (classes, features, features), or of the one that all
            share, (features, features).

    Returns:
        (n, classes) float64.
    """
    offsets = (features.double()[None] - means[:, None]).transpose(1, 2)
    white: Tensor = torch.linalg.solve_triangular(lower, offsets, upper=False)
    return white.square().sum(1).T


def log_densities(features: Tensor, means: Tensor, lower: Tensor) -> Tensor:
    """Log density of each sample under each class's Gaussian, (n, classes); arguments as in `squared_distances`."""
    log_volume = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * means.shape[1] * math.log(2 * math.pi)
    densities: Tensor = -0.5 * squared_distances(features, means, lower) - log_volume
    return densities


def log_frequencies(classes: list[Tensor]) -> Tensor:
    """Log of each class's share of the samples (classes,) float64."""
    counts = torch.tensor([len(features) for features in classes], dtype=torch.float64, device=classes[0].device)
    return (counts / counts.sum()).log()
