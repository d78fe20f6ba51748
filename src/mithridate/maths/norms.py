"""Balls for perturbed inputs and bounds for updates, in the l-infinity and l2 norms."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

Norm = Literal["linf", "l2"]

ROUNDING = 1e-5
"""Relative slack when a ball is checked: x + delta - x is not delta in float32."""


def sample_norms(delta: Tensor, norm: Norm) -> Tensor:
    """Length of each sample's perturbation: (n, ...) -> (n,)."""
    flat = delta.flatten(1)
    lengths: Tensor = torch.linalg.vector_norm(flat, ord=torch.inf if norm == "linf" else 2, dim=1)
    info = torch.finfo(flat.dtype)
    exact = lengths.isfinite() & (lengths > (info.tiny / info.eps) ** 0.5)  # else the squares over- or underflow
    if norm == "linf" or bool(exact.all()):
        return lengths
    largest = torch.linalg.vector_norm(flat, ord=torch.inf, dim=1)
    unit = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return torch.where(exact, lengths, torch.linalg.vector_norm(flat / unit.unsqueeze(1), dim=1) * unit)


def by_row(values: Tensor, like: Tensor) -> Tensor:
    """One value a row, (n,), as (n, 1, ...), to be combined with a tensor of n rows shaped as `like` is."""
    return values.view(-1, *[1] * (like.ndim - 1))


def shrink(lengths: Tensor, bound: float) -> Tensor:
    """The factor that brings each length down to a bound; exactly 1 within it, where a quotient would be rounded."""
    return torch.where(lengths > bound, bound / lengths.clamp_min(torch.finfo(lengths.dtype).tiny), 1.0).clamp(max=1.0)


@dataclass(frozen=True)
class Ball:
    """The perturbations that an attack may use on one sample.

    Args:
        norm: `linf` (largest change of a value) or `l2` (Euclidean length over all values).
        eps: Radius, in the unit of the inputs (of images: pixels in [0, 1]); >= 0.
    """

    norm: Norm
    eps: float

    def project(self, delta: Tensor) -> Tensor:
        """The nearest perturbation inside the ball, sample by sample."""
        if self.norm == "linf":
            return delta.clamp(-self.eps, self.eps)
        lengths = sample_norms(delta, "l2")
        return delta * by_row(shrink(lengths, self.eps), delta)

    def holds(self, delta: Tensor, moved: Tensor | None = None) -> bool:
        """Whether every sample's perturbation lies inside, up to rounding.

        Args:
            delta: Perturbations (n, ...).
            moved: What was perturbed: a large value is rounded by more than a pixel is. None: pixels.
        """
        slack = ROUNDING * max(1.0, self.eps)
        if moved is not None and moved.numel():
            rounded = 2 * torch.finfo(moved.dtype).eps * float(moved.abs().max())  # of x + delta, and of - x
            slack += rounded * (1.0 if self.norm == "linf" else moved[0].numel() ** 0.5)
        return bool((sample_norms(delta, self.norm) <= self.eps + slack).all())

    def direction(self, gradient: Tensor) -> Tensor:
        """The steepest step of length one: the sign (linf) or each sample's unit gradient (l2); zero stays zero."""
        if self.norm == "linf":
            return gradient.sign()
        lengths = by_row(sample_norms(gradient, "l2"), gradient)
        return torch.where(lengths > 0, gradient / lengths.clamp_min(torch.finfo(gradient.dtype).tiny), 0.0)

    def sample(self, like: Tensor, rng: Generator) -> Tensor:
        """A uniform draw from the ball, one a sample, shaped like `like`.

        Source:
            l2: a Gaussian direction times u^(1/d), the standard construction of a uniform point of a ball.
        """
        if self.norm == "linf":
            noise = torch.rand(like.shape, generator=rng, dtype=like.dtype).to(like.device)
            return (2 * noise - 1) * self.eps
        noise = torch.randn(like.shape, generator=rng, dtype=like.dtype).to(like.device)
        radius = torch.rand(len(like), generator=rng, dtype=like.dtype).to(like.device) ** (1 / like[0].numel())
        return self.direction(noise) * by_row(radius, like) * self.eps


def clip_rows(rows: Tensor, bound: float, norm: Norm, *, how: Literal["scale", "project"] = "scale") -> Tensor:
    """Each row of a (client, parameter) matrix, no longer than `bound`.

    Args:
        rows: (clients, parameters).
        bound: Largest allowed length, > 0; infinity leaves every row as it is, bit for bit.
        norm: In which norm a row is measured.
        how: `scale` shortens the whole row; `project` takes the nearest point of the ball, which for linf clamps each
            entry alone. The two agree in l2.

    Source:
        Pang et al., NeurIPS 2021, section 4.2 and Appendix C (Clip_eta); Pascanu et al., ICML 2013, Algorithm 1.
    """
    if bound == torch.inf:
        return rows
    if how == "project" and norm == "linf":
        return rows.clamp(-bound, bound)
    lengths = sample_norms(rows, norm)
    return rows * shrink(lengths, bound).unsqueeze(1)
