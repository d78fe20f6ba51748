"""Targets that are probabilities, and not class numbers: one outside [0, 1] would make a loss without a lower bound."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

_OF_CLASSES = (F.cross_entropy, nn.CrossEntropyLoss)
_OF_LABELS = (F.binary_cross_entropy, F.binary_cross_entropy_with_logits, nn.BCELoss, nn.BCEWithLogitsLoss)


def improbable(criterion: object, y: Tensor) -> Tensor | None:
    """Which targets hold a number outside [0, 1] where the criterion reads it as a probability.

    That is known of torch's cross-entropies, and of a `partial` of one; of a function of the user's own it is not.
    Rows need not sum to 1: with many labels they do not, and torch counts a sample as much as its row sums to.

    Args:
        criterion: (logits, targets) -> mean loss.
        y: Targets: (n, classes, ...) probabilities of classes, (n, ...) of labels that may hold at once.

    Returns:
        (n,) bool; None where targets are no probabilities.
    """
    while isinstance(criterion, partial):
        criterion = criterion.func
    kind = criterion if criterion in (*_OF_CLASSES, *_OF_LABELS) else type(criterion)
    if not y.is_floating_point() or not (kind in _OF_LABELS or (kind in _OF_CLASSES and y.ndim > 1)):
        return None
    outside = ~((y >= 0) & (y <= 1))
    return outside.flatten(1).any(1) if y.ndim > 1 else outside
