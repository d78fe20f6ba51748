"""What flows: a batch of samples with their targets."""

from typing import NamedTuple

import torch
from torch import Tensor

from mithridate.core.errors import DataError

PIXEL_TOLERANCE = 1e-4
"""How far outside [0, 1] a pixel may lie before a batch is refused: float arithmetic is not exact."""


class Batch(NamedTuple):
    """What a stream yields.

    Shape:
        x (n, channels, height, width) float, pixels in [0, 1]; y (n,) int64.
    """

    x: Tensor
    y: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(self.x.to(device), self.y.to(device))


def check_batch(batch: Batch, *, n_classes: int | None = None, where: str = "batch") -> None:
    """Refuse a batch that must not reach a model.

    Args:
        batch: What to check.
        n_classes: Labels must lie in [0, n_classes); None skips that check.
        where: Named in the message.

    Raises:
        DataError: Wrong shape, empty, lengths differ, pixels are not float, not finite or outside [0, 1], labels are
            not int64 or out of range.
    """
    x, y = batch
    if x.ndim < 2 or y.ndim != 1:
        raise DataError(
            f"{where}: images of shape {tuple(x.shape)} and labels of shape {tuple(y.shape)}; a batch is "
            "(n, channels, height, width) and (n,)."
        )
    if len(x) == 0 or len(x) != len(y):
        raise DataError(f"{where}: {len(x)} images and {len(y)} labels; a batch needs as many of each, at least one.")
    if not x.is_floating_point():
        raise DataError(
            f"{where}: pixels are {x.dtype}; convert to float and divide by 255 so that they lie in [0, 1]."
        )
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
        raise DataError(
            f"{where}: {bad} of {len(x)} images hold NaN or infinite pixels; drop them before they come here."
        )
    low, high = float(x.min()), float(x.max())
    if low < -PIXEL_TOLERANCE or high > 1 + PIXEL_TOLERANCE:
        raise DataError(
            f"{where}: pixels span [{low:.4g}, {high:.4g}], outside [0, 1]; scale them. Normalisation (mean, std) "
            "belongs inside the model, not in the stream."
        )
    if y.dtype != torch.int64:
        raise DataError(f"{where}: labels are {y.dtype}; class numbers must be int64.")
    if n_classes is not None and (int(y.min()) < 0 or int(y.max()) >= n_classes):
        raise DataError(
            f"{where}: labels span [{int(y.min())}, {int(y.max())}], but the model has {n_classes} classes "
            f"(0 to {n_classes - 1})."
        )
