"""Climb a function of pixels inside a ball: FGSM, PGD, MIM and APGD, shared by attacks and by corrections."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from mithridate.maths.calculus import Slope
from mithridate.maths.norms import Ball, by_row

Optimiser = Literal["pgd", "fgsm", "mim", "apgd"]

Keep = Literal["last", "best"]
"""Which iterate an ascent returns."""

StepSchedule = Literal["constant", "cosine"]
"""How the length of a step goes on from the first."""

MOMENTUM, ENOUGH = 0.75, 0.75
"""APGD's alpha, the weight of a step against the last move, and rho, the share of steps that should have risen."""


class Climbed(NamedTuple):
    """Where an ascent ended.

    Args:
        x: Inputs.
        start: The function's value where it began, one number; None if nobody computed values.
        end: Its value at `x`; None as `start`.
    """

    x: Tensor
    start: float | None = None
    end: float | None = None


def climb(
    x: Tensor,
    slope_at: Callable[[Tensor], Slope],
    ball: Ball,
    *,
    into_domain: Callable[[Tensor], Tensor],
    value_at: Callable[[Tensor], Tensor] | None = None,
    optimiser: Optimiser = "pgd",
    steps: int = 10,
    step_size: float | None = None,
    schedule: StepSchedule = "constant",
    decay: float = 1.0,
    keep: Keep = "last",
    start: Tensor | None = None,
    random_start: bool = False,
    mask: Tensor | None = None,
    rng: Generator | None = None,
) -> Climbed:
    """Ascend inside a ball around `x` and inside the domain of valid inputs.

    Args:
        x: The ball's centre, (n, ...), valid inputs.
        slope_at: Pixels to the function's slope there; its value is needed by `apgd` and `best` alone. A value a sample
            lets each sample have its own best and its own step; one value for all, and they share them.
        ball: The budget of one sample.
        into_domain: Inputs to the nearest valid ones, such as pixels clamped to [0, 1].
        value_at: Pixels to the function's value: what the last iterate came to, without a slope. Unset: it is taken
            from its slope if it is needed, and is not computed otherwise.
        optimiser: `pgd` takes `steps` steps; `fgsm` one step as long as the radius; `mim` adds momentum; `apgd` begins
            with steps of 2 * eps, halves them where progress stops, and goes on from the best iterate then.
        steps: Number of steps, one slope each; 0 returns the start. `fgsm` makes one at most.
        step_size: Length of one step in the unit of the inputs, the first if they fall; None: all together are as long
            as 2 * eps. Unused by `fgsm`; with `apgd`, the first, and None is 2 * eps.
        schedule: Of the steps of `pgd` and `mim`: `constant`, or `cosine`, falling over half a wave, which comes higher
            in as many steps.
        decay: MIM's momentum factor mu, >= 0.
        keep: The `last` iterate or the `best` one, the start among them; `apgd` always keeps the best.
        start: Where to begin; `x` if None.
        random_start: Begin at a uniform draw from the ball instead (needs `rng`; not together with `start`).
        mask: (n,) bool, the samples that may move; all if None.
        rng: Randomness for `random_start`.

    Returns:
        Inputs of the same shape, inside the ball and inside the domain, and the values at both ends.

    Source:
        Goodfellow et al., ICLR 2015 (FGSM); Madry et al., ICLR 2018 (PGD); Dong et al., CVPR 2018 (MIM); Pang et al.,
        NeurIPS 2021, Appendix B.2, Eqs. (15)-(18), and section 4.1 for the step size; Croce and Hein, ICML 2020,
        arXiv:2003.01690, section 3, Algorithm 1 and Eq. (2) (APGD).
    """
    moves = torch.ones(len(x), dtype=torch.bool, device=x.device) if mask is None else mask
    moving = by_row(moves, x)
    current = x if start is None else start
    if random_start:
        if rng is None:
            raise ValueError("random_start needs rng")
        current = torch.where(moving, into_domain(x + ball.sample(x, rng)), x)
    if steps == 0:
        return Climbed(current.detach())

    def inside(stepped: Tensor, current: Tensor) -> Tensor:
        return torch.where(moving, into_domain(x + ball.project(stepped - x)), current)

    def look(current: Tensor) -> _Point:
        slope = slope_at(current)  # a diverged model has no direction; the climb stays where it is
        return _Point(current, torch.nan_to_num(slope.gradient), slope.value)

    def end(current: Tensor, *, needed: bool) -> _Point:
        if value_at is None and needed:
            return look(current)
        return _Point(current, torch.zeros_like(current), None if value_at is None else value_at(current))

    if optimiser == "apgd":
        length = 2 * ball.eps if step_size is None else step_size
        first, last = _adapting(look(current), steps, length, ball, inside, look, end)
        return Climbed(last.x.detach(), _mean(first.value), _mean(last.value))
    if optimiser == "fgsm":
        steps, step_size = 1, ball.eps
    lengths = _lengths(steps, step_size, schedule, ball.eps)
    first = best = point = look(current)
    velocity = torch.zeros_like(x)
    for number in range(steps):
        g = point.gradient
        if optimiser == "mim":
            mass = by_row(g.abs().flatten(1).sum(1), x)
            g = velocity = decay * velocity + g / mass.clamp_min(torch.finfo(g.dtype).tiny)
        current = inside(point.x + lengths[number] * ball.direction(g), point.x)
        point = look(current) if number + 1 < steps else end(current, needed=keep == "best")
        if keep == "best":
            best = _better(best, point)
    last = best if keep == "best" else point
    return Climbed(last.x.detach(), _mean(first.value), _mean(last.value))


def _lengths(steps: int, first: float | None, schedule: StepSchedule, eps: float) -> list[float]:
    """Of each step; if the first is not given, all of them together are 2 * eps."""
    if schedule == "constant":
        return [2 * eps / steps if first is None else first] * steps
    start = 4 * eps / (steps + 1) if first is None else first
    return [start * (1 + math.cos(math.pi * number / steps)) / 2 for number in range(steps)]


class _Point(NamedTuple):
    """One iterate of an ascent."""

    x: Tensor
    gradient: Tensor
    value: Tensor | None

    @property
    def values(self) -> Tensor:
        """The function's value, one a sample (n,)."""
        if self.value is None:
            raise ValueError("this ascent keeps its best iterate, and its function has a slope but no value")
        return self.value.detach().expand(len(self.x))


def _adapting(
    point: _Point,
    steps: int,
    length: float,
    ball: Ball,
    inside: Callable[[Tensor, Tensor], Tensor],
    look: Callable[[Tensor], _Point],
    end: Callable[..., _Point],
) -> tuple[_Point, _Point]:
    """APGD: the first iterate, and the best."""
    first = best = point
    lengths = torch.full_like(point.values, length)
    before, rose, since = (lengths, best.values), torch.zeros_like(lengths), 0
    previous = point.x
    checkpoints = _checkpoints(steps)
    for number in range(1, steps + 1):
        x = point.x
        current = inside(x + by_row(lengths, x) * ball.direction(point.gradient), x)
        if number > 1:
            current = inside(x + MOMENTUM * (current - x) + (1 - MOMENTUM) * (x - previous), x)
        was, previous = point.values, x
        point = look(current) if number < steps else end(current, needed=True)
        rose = rose + (point.values > was)
        best = _better(best, point)
        if number in checkpoints:
            stuck = (lengths == before[0]) & (best.values == before[1])
            halved = (rose < ENOUGH * (number - since)) | stuck
            before, since = (lengths, best.values), number
            lengths = torch.where(halved, lengths / 2, lengths)
            point, rose = _chosen(halved, best, point), torch.zeros_like(rose)
    return first, best


def _checkpoints(steps: int) -> set[int]:
    """After which steps APGD looks whether it still gets on: their distance shrinks along the way."""
    at, distance, found = 0.22, 0.22, set[int]()
    while at <= 1:
        found.add(math.ceil(at * steps))
        distance = max(distance - 0.03, 0.06)
        at += distance
    return found


def _better(best: _Point, point: _Point) -> _Point:
    """Sample by sample, the one whose value is higher; one that is not finite never is."""
    return _chosen(point.values > best.values, point, best)


def _chosen(first: Tensor, one: _Point, other: _Point) -> _Point:
    """`one` where `first` (n,) says so, else `other`."""
    wide = by_row(first, one.x)
    return _Point(
        torch.where(wide, one.x, other.x),
        torch.where(wide, one.gradient, other.gradient),
        torch.where(first, one.values, other.values),
    )


def _mean(values: Tensor | None) -> float | None:
    return None if values is None else float(values.mean())
