"""The first layer of every model: pixels in [0, 1] to zero mean and unit variance."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """Subtract the mean and divide by the standard deviation of each channel.

    The constants move with the model but are no part of its state dict: they belong to the data set, and a checkpoint
    made elsewhere has none.

    Args:
        mean: Of each channel, in pixel units of [0, 1].
        std: Of each channel, in pixel units of [0, 1], > 0.

    Shape:
        (n, channels, height, width) -> (n, channels, height, width).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pixels."""
        return (x - self.mean) / self.std
