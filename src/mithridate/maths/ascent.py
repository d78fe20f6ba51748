"""Climb a function of pixels inside a ball: FGSM, PGD and MIM, shared by attacks and by corrections (which descend)."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Generator, Tensor

from mithridate.maths.norms import Ball

Optimiser = Literal["pgd", "fgsm", "mim"]


def climb(
    x: Tensor,
    gradient_at: Callable[[Tensor], Tensor],
    ball: Ball,
    *,
    into_domain: Callable[[Tensor], Tensor],
    optimiser: Optimiser = "pgd",
    steps: int = 10,
    step_size: float | None = None,
    decay: float = 1.0,
    start: Tensor | None = None,
    random_start: bool = False,
    mask: Tensor | None = None,
    rng: Generator | None = None,
) -> Tensor:
    """Ascend inside a ball around `x` and inside the domain of valid inputs.

    Args:
        x: The ball's centre, (n, ...), valid inputs.
        gradient_at: Pixels to the gradient that is followed upwards, shaped like `x`.
        ball: The budget of one sample.
        into_domain: Inputs to the nearest valid ones, such as pixels clamped to [0, 1].
        optimiser: `pgd` takes `steps` steps; `fgsm` one step as long as the radius; `mim` adds momentum.
        steps: Number of steps; 0 returns the start. Unused by `fgsm`.
        step_size: Length of one step in the unit of the inputs; None is 2 * eps / steps. Unused by `fgsm`.
        decay: MIM's momentum factor mu, >= 0.
        start: Where to begin; `x` if None.
        random_start: Begin at a uniform draw from the ball instead (needs `rng`; not together with `start`).
        mask: (n,) bool, the samples that may move; all if None.
        rng: Randomness for `random_start`.

    Returns:
        Inputs of the same shape, inside the ball and inside the domain.

    Source:
        Goodfellow et al., ICLR 2015 (FGSM); Madry et al., ICLR 2018 (PGD); Dong et al., CVPR 2018 (MIM); Pang et al.,
        NeurIPS 2021, Appendix B.2, Eqs. (15)-(18), and section 4.1 for the step size.
    """
    if optimiser == "fgsm":
        steps, length = min(steps, 1), ball.eps
    else:
        length = step_size if step_size is not None else 2 * ball.eps / max(steps, 1)
    moves = torch.ones(len(x), dtype=torch.bool, device=x.device) if mask is None else mask
    moves = moves.view(-1, *[1] * (x.ndim - 1))
    current = x if start is None else start
    if random_start:
        if rng is None:
            raise ValueError("random_start needs rng")
        current = torch.where(moves, into_domain(x + ball.sample(x, rng)), x)
    velocity = torch.zeros_like(x)
    for _ in range(steps):
        g = torch.nan_to_num(gradient_at(current))  # a diverged model has no direction; the climb stays where it is
        if optimiser == "mim":
            mass = g.abs().flatten(1).sum(1).view(-1, *[1] * (x.ndim - 1))
            g = velocity = decay * velocity + g / mass.clamp_min(torch.finfo(g.dtype).tiny)
        stepped = current + length * ball.direction(g)
        stepped = into_domain(x + ball.project(stepped - x))
        current = torch.where(moves, stepped, current)
    return current.detach()
