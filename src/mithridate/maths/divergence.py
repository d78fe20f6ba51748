"""Distances between two predictive distributions, one number a sample."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Divergence = Literal["kl", "kl_reverse", "js", "tv", "l2"]
"""`kl`: KL(old || now); `kl_reverse`: KL(now || old); `js`: Jensen-Shannon; `tv`: total variation; `l2`: of logits."""


def divergence(old: Tensor, now: Tensor, kind: Divergence = "kl") -> Tensor:
    """How far two models' answers to the same samples lie apart.

    Args:
        old: Logits of the one model.
        now: Logits of the other.
        kind: Which distance. KL, JS are in nats (JS at most log 2), TV lies in [0, 1], l2 has the unit of logits.

    Shape:
        old and now (n, classes), -inf where a class is impossible; returns (n,), >= 0 up to rounding, and infinite for
        a KL where what is certain not to be in the one answer may be in the other. Of (n, ..., classes), several
        answers to each sample, the mean over these counts; `l2` takes all outputs of a sample as one vector.

    Source:
        Zhu et al., ICML 2023, Definition 3.3 (KL; the released code takes KL(old || now)) and Fig. 7 (JS).
    """
    if kind == "l2":
        moved = torch.where(old == now, 0.0, old - now)  # inf - inf is NaN
        lengths: Tensor = torch.linalg.vector_norm(moved.unsqueeze(1).flatten(1), dim=1)
        return lengths
    each = _of_distributions(F.log_softmax(old, -1), F.log_softmax(now, -1), kind)
    return each.flatten(1).mean(1) if each.ndim > 1 else each


def _of_distributions(p: Tensor, q: Tensor, kind: Divergence) -> Tensor:
    """Of log-distributions (..., classes): (...)."""
    if kind == "tv":
        return 0.5 * (p.exp() - q.exp()).abs().sum(-1)
    if kind == "kl":
        return _kl(p, q)
    if kind == "kl_reverse":
        return _kl(q, p)
    neither = (p == -math.inf) & (q == -math.inf)  # logaddexp has no derivative there
    middle = torch.logaddexp(p.masked_fill(neither, 0.0), q.masked_fill(neither, 0.0)) - math.log(2)
    middle = middle.masked_fill(neither, -math.inf)
    return 0.5 * (_kl(p, middle) + _kl(q, middle))


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of two log-distributions; a class of probability 0 in p adds nothing (0 log 0 = 0)."""
    return (p.exp() * torch.where(p == -math.inf, 0.0, p - q)).sum(-1)
