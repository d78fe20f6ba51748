"""Memorization Discrepancy: how far a model's answer to a sample has moved since an earlier self."""

import torch
from torch import Tensor, nn

from mithridate.core import Weights, frozen_statistics
from mithridate.divergence import Divergence, divergence


def memorization_discrepancy(model: nn.Module, old: Weights, x: Tensor, *, kind: Divergence = "kl") -> Tensor:
    """Distance between what an old and the current model say of each sample, both in eval mode.

    Args:
        model: The current model; any module that gives logits. Not changed.
        old: An earlier state of the same model.
        x: Samples (n, channels, height, width).
        kind: Which distance.

    Returns:
        (n,); poisoned samples, which were optimised on the current model, tend to score higher than clean ones.

    Raises:
        CheckpointError: `old` is of another architecture or class count.

    Source:
        Zhu et al., ICML 2023, Definition 3.3, Eq. (5).
    """
    with torch.no_grad():
        before = old.logits(model, x)
        with frozen_statistics(model, "eval"):
            now = model(x)
        return divergence(before, now, kind)
