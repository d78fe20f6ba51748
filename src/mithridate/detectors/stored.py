"""Clean samples that detectors compare with: those that the model classifies as labelled, and distances to them."""

import torch
from torch import Tensor

from mithridate.core.errors import DataError
from mithridate.core.watch import Observed


def right_features(clean: Observed, *, where: str) -> Observed:
    """Only the samples that the model classifies as labelled.

    Args:
        clean: What the model makes of clean samples.
        where: The detector, named in the message.

    Raises:
        DataError: A feature is not finite.
    """
    right = clean.right()
    if not torch.isfinite(right.features).all():
        raise DataError(f"{where}: features of clean samples are not finite; the model has diverged, train it again.")
    return right


def by_class(clean: Observed, *, where: str) -> list[Tensor]:
    """Features (m, features) of the correctly classified samples, one entry a class.

    Args:
        clean: What the model makes of clean samples.
        where: The detector, named in the message.

    Raises:
        DataError: A class has fewer than two of them, or a feature is not finite.
    """
    right = right_features(clean, where=where)
    classes = [right.features[right.y == label] for label in range(clean.logits.shape[1])]
    for label, features in enumerate(classes):
        if len(features) < 2:
            raise DataError(
                f"{where}: of {int((clean.y == label).sum())} clean samples of class {label} the model classifies "
                f"{len(features)} as labelled, and 2 are needed; give more clean samples of that class, or train the "
                "model longer."
            )
    return classes


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (n, m) float64, by differences: by products, equal samples would not be at distance 0."""
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")
