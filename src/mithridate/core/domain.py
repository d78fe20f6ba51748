"""What a valid input is."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mithridate.core.batch import Batch, check_batch
from mithridate.core.errors import DataError

TOLERANCE = 1e-4
"""How far outside its domain a value may lie, as a share of the domain's width: float arithmetic is not exact."""


class Domain(NamedTuple):
    """What a valid input is: each value lies in [low, high]. Attacks and corrections stay inside it.

    Args:
        low: A number, or a tensor shaped like one sample (one bound a feature); -inf for none.
        high: A number, or a tensor shaped like one sample; inf for none.
    """

    low: Tensor | float = -math.inf
    high: Tensor | float = math.inf

    def clamp(self, x: Tensor) -> Tensor:
        """The nearest valid inputs: (n, ...) -> (n, ...)."""
        return x.clamp(self._bound(self.low, x), self._bound(self.high, x))  # type: ignore[arg-type,call-overload,unused-ignore]  # torch takes two numbers or two tensors

    def holds(self, x: Tensor) -> bool:
        """Whether all inputs are valid, up to `TOLERANCE`; NaN is not."""
        return bool(self.inside(x).all())

    def inside(self, x: Tensor) -> Tensor:
        """Which samples are valid, up to `TOLERANCE`, those with NaN not: (n, ...) -> (n,) bool.

        Raises:
            DataError: The bounds are of another shape than a sample.
        """
        dtype = x.dtype if x.is_floating_point() else torch.float64
        low, high = (torch.as_tensor(b, dtype=dtype, device=x.device) for b in self)
        for bound in (low, high):
            if bound.ndim and bound.shape != x.shape[1:]:
                raise DataError(
                    f"inputs have the shape {tuple(x.shape[1:])}, and the domain's bounds {tuple(bound.shape)}: give "
                    "one bound a value of a sample, or one for all."
                )
        slack = TOLERANCE * torch.nan_to_num(high - low, nan=0.0, posinf=0.0)
        low, high = low - slack, high + slack
        if low.ndim == high.ndim == 0 and x.numel():
            least, most = torch.aminmax(x.reshape(len(x), -1), dim=1)  # of which NaN makes NaN
            return (least >= low) & (most <= high)
        return ((x >= low) & (x <= high)).reshape(len(x), -1).all(1)

    def _bound(self, bound: Tensor | float, x: Tensor) -> Tensor | float:
        mixed = isinstance(self.low, Tensor) or isinstance(self.high, Tensor)
        return torch.as_tensor(bound, dtype=x.dtype, device=x.device) if mixed else bound


PIXELS = Domain(0.0, 1.0)
"""The domain of images."""


def check_domain(batch: Batch, domain: Domain, *, where: str = "batch") -> None:
    """Refuse inputs that no stream with this domain yields.

    Args:
        batch: Samples with a float tensor of inputs.
        domain: What a valid input is.
        where: Named in the message.

    Raises:
        DataError: It is no batch (see `check_batch`), or inputs are not one tensor of floats, not finite or outside the
            domain.
    """
    check_batch(batch, where=where)
    x = batch.x
    if not isinstance(x, Tensor) or not x.is_floating_point():
        what = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise DataError(
            f"{where}: inputs are {what}, and must be one tensor of floats; divide bytes by 255 so that pixels lie in "
            "[0, 1]."
        )
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
        raise DataError(f"{where}: {bad} of {len(x)} samples hold NaN or infinity; drop them before they come here.")
    if not domain.holds(x):
        plain = not any(isinstance(bound, Tensor) and bound.ndim for bound in domain)
        bounds = f"[{float(domain.low):.4g}, {float(domain.high):.4g}]" if plain else "(bounds for each feature)"
        bad = int((~domain.inside(x)).sum())
        raise DataError(
            f"{where}: {bad} of {len(x)} samples lie outside the domain {bounds}, for inputs span "
            f"[{float(x.min()):.4g}, {float(x.max()):.4g}]; scale them. Normalisation (mean, std) of images belongs "
            "inside the model, not in the stream."
        )
