"""Random crops and flips of a whole batch at once."""

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


def crop_and_flip(x: Tensor, *, padding: int = 4, flip: bool = True, rng: Generator) -> Tensor:
    """Shift each image by a random whole number of pixels, filling with zeros, and mirror half of them.

    Args:
        x: Images; not changed.
        padding: Largest shift in either direction, in pixels, >= 0.
        flip: Whether to mirror; do not where that destroys the meaning, as with digits.
        rng: A generator on the CPU; the draws, and so the result, are the same on every device.

    Shape:
        x (n, channels, height, width), any dtype and device; returns the same shape, dtype and device.

    Source:
        He et al., CVPR 2016, arXiv:1512.03385, section 4.2.
    """
    n, channels, height, width = x.shape
    shifts = torch.randint(0, 2 * padding + 1, (2, n), generator=rng)
    mirrored = (torch.rand(n, generator=rng) < 0.5) & flip
    rows = shifts[0, :, None] + torch.arange(height)
    columns = shifts[1, :, None] + torch.arange(width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns).to(x.device)
    padded = F.pad(x, [padding] * 4)
    rows = rows.to(x.device)[:, None, :, None].expand(n, channels, height, padded.shape[3])
    return padded.gather(2, rows).gather(3, columns[:, None, None, :].expand(n, channels, height, width))
