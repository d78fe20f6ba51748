"""Gaussians fitted to features, in float64."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mithridate.core.errors import DataError

Ridge = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Added to a covariance's diagonal, in units of a mean variance."""


def within_covariance(classes: list[Tensor]) -> Tensor:
    """Covariance (features, features) around the classes' own means, over all samples; maximum likelihood, float64."""
    centred = torch.cat([features.double() - features.double().mean(0) for features in classes])
    return centred.T @ centred / len(centred)


def cholesky(covariance: Tensor, ridge: float, unit: Tensor, *, where: str) -> Tensor:
    """Lower triangle L with L L^T = covariance + ridge * unit * I.

    Args:
        covariance: (features, features) float64.
        ridge: Added to the diagonal, in units of `unit`, >= 0.
        unit: A variance, a scalar.
        where: The detector, named in the message.

    Raises:
        DataError: The sum is singular: more features than samples, features that never vary, and too small a ridge.
    """
    size = len(covariance)
    filled = covariance + ridge * unit * torch.eye(size, dtype=covariance.dtype, device=covariance.device)
    values = torch.linalg.eigvalsh(filled)
    # The rounding errors of a sum of so many products: an eigenvalue below them is zero for all that we know.
    rank = int((values > size * torch.finfo(values.dtype).eps * values[-1]).sum())
    if rank < size:
        raise DataError(
            f"{where}: the covariance of the {size} features has rank {rank} with ridge = {ridge:g} (features that "
            "never vary, or fewer clean samples than features); raise the ridge, 0.01 say, or give more clean samples."
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
    """Log density of each sample under each class's Gaussian, (n, classes) float64; arguments as above."""
    log_volume = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * means.shape[1] * math.log(2 * math.pi)
    densities: Tensor = -0.5 * squared_distances(features, means, lower) - log_volume
    return densities


def log_frequencies(classes: list[Tensor]) -> Tensor:
    """Log of each class's share of the samples (classes,) float64."""
    counts = torch.tensor([len(features) for features in classes], dtype=torch.float64, device=classes[0].device)
    return (counts / counts.sum()).log()
