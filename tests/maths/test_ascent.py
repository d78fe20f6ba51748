"""Climbing inside a ball: every optimiser goes up, stays inside, and is the published update rule."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mithridate.maths import ascent
from mithridate.maths.ascent import Climbed, Optimiser
from mithridate.maths.calculus import Slope
from mithridate.maths.norms import Ball, Norm

OPTIMISERS: tuple[Optimiser, ...] = ("pgd", "fgsm", "mim", "apgd")
BALLS = (Ball("linf", 0.1), Ball("l2", 0.4))
BALL_NAMES = ("linf", "l2")


def pixels(x: Tensor) -> Tensor:
    return x.clamp(0, 1)


def climbed(x: Tensor, gradient_at: Callable[[Tensor], Tensor], ball: Ball, **options: Any) -> Climbed:
    """A climb up a slope; whoever compares values is told those of `height`."""

    def slope_at(x: Tensor) -> Slope:
        return Slope(gradient_at(x), height(x) if x.shape[1:] == TOP.shape[1:] else None)

    return ascent.climb(x, slope_at, ball, **{"into_domain": pixels, **options})


def climb(x: Tensor, gradient_at: Callable[[Tensor], Tensor], ball: Ball, **options: Any) -> Tensor:
    return climbed(x, gradient_at, ball, **options).x


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 5, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 4, 4, generator=rng(seed), dtype=torch.float64)


TOP = images(seed=1)
WEIGHT = 0.5 + images(seed=2)


def height(x: Tensor) -> Tensor:
    """A concave function of each sample, highest at TOP."""
    return -(WEIGHT * (x - TOP).square()).flatten(1).sum(1)


def slope(x: Tensor) -> Tensor:
    return -2 * WEIGHT * (x - TOP)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("ball", BALLS, ids=BALL_NAMES)
def test_every_sample_gains_height(optimiser: Optimiser, ball: Ball) -> None:
    x = images()
    found = climb(x, slope, ball, optimiser=optimiser, steps=20)
    gain = height(found) - height(x)
    # A step along the gradient gains at most its first-order gain over the ball, and here most of it.
    first_order = (slope(x) * ball.direction(slope(x)) * ball.eps).flatten(1).sum(1)
    assert bool((gain > 0.3 * first_order).all())
    assert bool((gain <= first_order).all())


@pytest.mark.parametrize("ball", BALLS, ids=BALL_NAMES)
def test_more_steps_climb_higher_than_one(ball: Ball) -> None:
    x = images()
    one, many = climb(x, slope, ball, steps=1), climb(x, slope, ball, steps=40)
    assert float(height(many).sum()) > float(height(one).sum())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_free_climb_reaches_the_top(norm: Norm) -> None:
    found = climb(images(), slope, Ball(norm, 10.0), steps=400, step_size=0.01 if norm == "linf" else 0.02)
    assert float((found - TOP).abs().max()) < 0.03


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(OPTIMISERS),
    st.sampled_from(["linf", "l2"]),
    st.floats(0, 2),
    st.integers(0, 4),
    st.floats(0.001, 3) | st.none(),
    st.booleans(),
    st.integers(0, 1000),
)
def test_nothing_leaves_the_ball_or_the_range_of_pixels(
    optimiser: Optimiser, norm: Norm, eps: float, steps: int, step_size: float | None, random_start: bool, seed: int
) -> None:
    x = images(seed=seed)
    ball = Ball(norm, eps)
    found = climb(
        x, slope, ball, optimiser=optimiser, steps=steps, step_size=step_size, random_start=random_start, rng=rng(seed)
    )
    lengths = (found - x).flatten(1).norm(p=torch.inf if norm == "linf" else 2, dim=1)
    assert float(lengths.max()) <= eps + 1e-9
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


@pytest.mark.parametrize("ball", BALLS, ids=BALL_NAMES)
def test_fgsm_is_one_step_as_long_as_the_radius(ball: Ball) -> None:
    x = images()
    calls = 0

    def counted(at: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return slope(at)

    found = climb(x, counted, ball, optimiser="fgsm", steps=7, step_size=0.001)
    assert calls == 1
    assert torch.allclose(found, (x + ball.eps * ball.direction(slope(x))).clamp(0, 1), rtol=0, atol=1e-12)


def test_pgd_is_its_formula() -> None:
    """Madry et al.: x <- proj(x + alpha sign(grad)), here for a wandering objective."""
    x, eps, alpha = images(), 0.1, 0.04

    def wave(at: Tensor) -> Tensor:
        return torch.cos(37 * at)

    current = x
    for _ in range(6):
        current = torch.minimum(torch.maximum(current + alpha * wave(current).sign(), x - eps), x + eps).clamp(0, 1)
    found = climb(x, wave, Ball("linf", eps), steps=6, step_size=alpha)
    assert float((found - current).abs().max()) < 1e-12


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_mim_is_its_formula(decay: float) -> None:
    """Dong et al., Algorithm 1: g <- mu g + grad / |grad|_1, sample by sample; x <- x + alpha sign(g)."""
    x, eps, alpha = images(), 0.1, 0.03

    def wave(at: Tensor) -> Tensor:
        return torch.cos(37 * at) * torch.arange(1.0, 6, dtype=at.dtype).view(5, 1, 1, 1)

    current, g = x, torch.zeros_like(x)
    for _ in range(6):
        now = wave(current)
        g = decay * g + now / now.abs().sum((1, 2, 3), keepdim=True)
        current = torch.minimum(torch.maximum(current + alpha * g.sign(), x - eps), x + eps).clamp(0, 1)
    found = climb(x, wave, Ball("linf", eps), optimiser="mim", steps=6, step_size=alpha, decay=decay)
    assert float((found - current).abs().max()) < 1e-12
    as_pgd = climb(x, wave, Ball("linf", eps), steps=6, step_size=alpha)
    assert torch.equal(found, as_pgd) is (decay == 0)


def test_an_unset_step_size_is_twice_the_radius_over_the_steps() -> None:
    x = torch.full((2, 1, 2, 2), 0.5, dtype=torch.float64)
    for steps in (5, 10):
        trail: list[Tensor] = []

        def uphill(at: Tensor, trail: list[Tensor] = trail) -> Tensor:
            trail.append(at)
            return torch.ones_like(at)

        climb(x, uphill, Ball("linf", 0.2), steps=steps)
        assert float((trail[1] - trail[0]).max()) == pytest.approx(2 * 0.2 / steps)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_no_steps_return_the_start(optimiser: Optimiser) -> None:
    def forbidden(x: Tensor) -> Tensor:
        raise AssertionError("no gradient is needed")

    x = images()
    assert torch.equal(climb(x, forbidden, BALLS[0], optimiser=optimiser, steps=0), x)
    begin = x * 0.99
    assert torch.equal(climb(x, forbidden, BALLS[0], optimiser=optimiser, steps=0, start=begin), begin)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("ball", BALLS, ids=BALL_NAMES)
def test_masked_samples_stay_bit_for_bit(optimiser: Optimiser, random_start: bool, ball: Ball) -> None:
    x = images()
    mask = torch.tensor([True, False, True, False, False])
    found = climb(x, slope, ball, optimiser=optimiser, steps=3, mask=mask, random_start=random_start, rng=rng())
    assert (found != x).flatten(1).any(1).tolist() == mask.tolist()
    if not random_start:
        free = climb(x, slope, ball, optimiser=optimiser, steps=3)
        assert torch.equal(found[mask], free[mask])  # neighbours do not matter


def test_the_climb_begins_at_the_start_inside_the_ball_of_the_centre() -> None:
    x = images()
    begin = (x + 0.08).clamp(0, 1)
    trail: list[Tensor] = []

    def downhill(at: Tensor) -> Tensor:
        trail.append(at)
        return -torch.ones_like(at)

    found = climb(x, downhill, Ball("linf", 0.1), steps=20, step_size=0.02, start=begin)
    assert torch.equal(trail[0], begin)
    assert torch.allclose(found, (x - 0.1).clamp(0, 1), atol=1e-12)


@pytest.mark.parametrize("ball", BALLS, ids=BALL_NAMES)
def test_a_random_start_is_drawn_from_the_generator_alone(ball: Ball) -> None:
    x = images()

    def begin(seed: int) -> Tensor:
        trail: list[Tensor] = []

        def note(at: Tensor) -> Tensor:
            trail.append(at)
            return slope(at)

        climb(x, note, ball, steps=1, random_start=True, rng=rng(seed))
        return trail[0]

    state = torch.get_rng_state()
    assert torch.equal(begin(1), begin(1))
    assert not torch.equal(begin(1), begin(2))
    assert not torch.equal(begin(1), x)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="needs rng"):
        climb(x, slope, ball, random_start=True)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("ball", BALLS, ids=BALL_NAMES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_makes_no_pixel_that_is_not(
    optimiser: Optimiser, ball: Ball, value: float
) -> None:
    def broken(at: Tensor) -> Tensor:
        g = slope(at)
        g[0, 0, 0, 0] = value
        g[1] = value
        return g

    found = climb(images(), broken, ball, optimiser=optimiser, steps=3)
    assert bool(found.isfinite().all())
    others = climb(images(), slope, ball, optimiser=optimiser, steps=3)
    assert torch.equal(found[2:], others[2:])


def test_inputs_are_not_written_to() -> None:
    x, begin = images(), images() * 0.99
    kept: list[Tensor] = [x.clone(), begin.clone()]
    options: list[dict[str, Any]] = [{}, {"start": begin}, {"random_start": True, "rng": rng()}]
    for option in options:
        climb(x, slope, BALLS[0], steps=2, **option)
    assert torch.equal(x, kept[0])
    assert torch.equal(begin, kept[1])


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("ball", BALLS, ids=BALL_NAMES)
def test_a_climb_ends_in_the_domain_that_it_is_given(optimiser: Optimiser, ball: Ball) -> None:
    """Bounds of its own for every feature, far from those of pixels; or none at all."""
    x = 10 * images() - 5
    low, high = x.amin(0) - 0.02, x.amax(0) + 0.02

    def uphill(x: Tensor) -> Tensor:
        return torch.ones_like(x)

    held = climb(x, uphill, ball, into_domain=lambda x: x.clamp(low, high), optimiser=optimiser)
    free = climb(x, uphill, ball, into_domain=lambda x: x, optimiser=optimiser)
    assert bool((held <= high).all())
    assert bool((held == high).any())
    assert bool((free > high).any())
    assert ball.holds(free - x)
    assert ball.holds(held - x)


def test_a_random_start_lies_in_the_domain() -> None:
    x = images() - 3
    held = climb(x, torch.zeros_like, BALLS[0], into_domain=lambda x: x.clamp(-3, -2.9), random_start=True, rng=rng())
    assert float(held.max()) <= -2.9 < float(x.max())
    assert float(held.min()) >= -3


# Keeping the best, and APGD.


@pytest.mark.parametrize("value_of", ["each sample", "all samples"])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("ball", BALLS, ids=BALL_NAMES)
def test_the_best_iterate_is_the_best_of_all_that_were_looked_at(
    optimiser: Optimiser, ball: Ball, value_of: str
) -> None:
    """Of a function with many tops, by sample or as a whole; and no worse than the start."""
    x, seen = images(), list[Tensor]()

    def values(x: Tensor) -> Tensor:
        each = (40 * x).sin().flatten(1).sum(1)
        return each if value_of == "each sample" else each.mean()

    def slope_at(x: Tensor) -> Slope:
        seen.append(values(x))
        return Slope(40 * (40 * x).cos(), values(x))

    def value_at(x: Tensor) -> Tensor:
        seen.append(values(x))
        return values(x)

    found = ascent.climb(
        x, slope_at, ball, into_domain=pixels, value_at=value_at, optimiser=optimiser, steps=12, keep="best"
    )
    assert torch.equal(values(found.x), torch.stack(seen).amax(0))
    assert found.end == pytest.approx(float(values(found.x).mean()))
    assert found.start == pytest.approx(float(values(x).mean()))
    assert len(seen) == (2 if optimiser == "fgsm" else 13), "a slope a step, and the value of the last iterate"


def test_keeping_the_best_needs_values() -> None:
    for options in ({"keep": "best"}, {"optimiser": "apgd"}):
        with pytest.raises(ValueError, match="no value"):
            ascent.climb(images(), lambda x: Slope(slope(x)), BALLS[0], into_domain=pixels, **options)  # type: ignore[arg-type]


def test_values_at_both_ends_cost_no_slope() -> None:
    slopes: list[Tensor] = []

    def slope_at(x: Tensor) -> Slope:
        slopes.append(x)
        return Slope(slope(x), height(x))

    found = ascent.climb(images(), slope_at, BALLS[0], into_domain=pixels, value_at=height, steps=3)
    assert len(slopes) == 3
    assert (found.start, found.end) == (float(height(images()).mean()), float(height(found.x).mean()))
    without = ascent.climb(images(), slope_at, BALLS[0], into_domain=pixels, steps=3)
    assert without.end is None


def apgd_as_published(start: float, f: Callable[[float], float], df: Callable[[float], float], steps: int) -> float:
    """Croce and Hein, Algorithm 1, for one pixel between 0 and 1 and a ball that holds all of it: eps = 1."""
    marks, p, before = [0], 0.22, 0.0
    while p <= 1:
        marks.append(math.ceil(p * steps))
        p, before = p + max(p - before - 0.03, 0.06), p

    def project(z: float) -> float:
        return min(max(z, 0.0), 1.0)

    def sign(z: float) -> float:
        return float((z > 0) - (z < 0))

    eta = 2.0
    x = [start, project(start + eta * sign(df(start)))]
    best = max(x, key=f) if f(x[1]) > f(x[0]) else x[0]
    etas, bests, rises = {0: eta}, {0: f(start)}, [f(x[1]) > f(x[0])]
    if 1 in marks:
        raise AssertionError("choose more steps: the first is no checkpoint here")
    for k in range(1, steps):
        z = project(x[k] + eta * sign(df(x[k])))
        new = project(x[k] + 0.75 * (z - x[k]) + 0.25 * (x[k] - x[k - 1]))
        rises.append(f(new) > f(x[k]))
        if f(new) > f(best):
            best = new
        x.append(new)
        if k + 1 in marks:
            last = marks[marks.index(k + 1) - 1]
            halve = sum(rises[last : k + 1]) < 0.75 * (k + 1 - last) or (etas[last] == eta and bests[last] == f(best))
            etas[k + 1], bests[k + 1] = eta, f(best)
            if halve:
                eta, x[-1] = eta / 2, best
    return best


@pytest.mark.parametrize("steps", [10, 20, 57])
def test_apgd_is_the_published_algorithm(steps: int) -> None:
    starts = torch.linspace(0.03, 0.97, 13, dtype=torch.float64).view(-1, 1, 1, 1)

    def value_at(x: Tensor) -> Tensor:
        return ((9 * x).sin() + (23 * x).cos() - (x - 0.4).square()).flatten(1).sum(1)

    def gradient(x: Tensor) -> Tensor:
        return 9 * (9 * x).cos() - 23 * (23 * x).sin() - 2 * (x - 0.4)

    found = ascent.climb(
        starts,
        lambda x: Slope(gradient(x), value_at(x)),
        Ball("linf", 1.0),
        into_domain=pixels,
        value_at=value_at,
        optimiser="apgd",
        steps=steps,
    )

    def point(x: float) -> Tensor:
        return torch.tensor([[[[x]]]], dtype=torch.float64)

    expected = [
        apgd_as_published(float(s), lambda x: float(value_at(point(x))), lambda x: float(gradient(point(x))), steps)
        for s in starts.flatten()
    ]
    assert found.x.flatten().tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("ball", BALLS, ids=BALL_NAMES)
def test_apgd_comes_higher_than_steps_that_overshoot(ball: Ball) -> None:
    """On a narrow top, where a step of 2 eps / C jumps to and fro."""
    x = images()
    top = x + 0.3 * ball.project(torch.randn(x.shape, generator=rng(4), dtype=x.dtype))

    def value_at(x: Tensor) -> Tensor:
        return -(x - top).abs().flatten(1).sum(1)

    def slope_at(x: Tensor) -> Slope:
        return Slope(-(x - top).sign(), value_at(x))

    ends = {
        o: ascent.climb(x, slope_at, ball, into_domain=lambda x: x, value_at=value_at, optimiser=o, steps=20).end
        for o in ("pgd", "apgd")
    }
    assert ends["pgd"] is not None
    assert ends["apgd"] is not None
    assert ends["apgd"] > ends["pgd"]


@pytest.mark.parametrize("steps", [0, 1])
def test_apgd_of_no_step_and_of_one(steps: int) -> None:
    x = images()
    found = climbed(x, slope, BALLS[0], value_at=height, optimiser="apgd", steps=steps)
    if steps == 0:
        assert torch.equal(found.x, x)
    else:
        one = pixels(x + BALLS[0].project(0.2 * slope(x).sign()))
        better = height(one) > height(x)
        assert torch.equal(found.x, torch.where(better.view(-1, 1, 1, 1), one, x))


@pytest.mark.parametrize("optimiser", ["pgd", "mim"])
@pytest.mark.parametrize(("schedule", "first"), [("constant", None), ("cosine", None), ("cosine", 0.05)])
def test_steps_that_fall_begin_as_told_or_are_twice_the_radius_together(
    optimiser: Optimiser, schedule: Any, first: float | None
) -> None:
    x = torch.full((1, 1, 1, 1), 0.0, dtype=torch.float64)
    trail: list[float] = []

    def slope_at(at: Tensor) -> Slope:
        trail.append(float(at))
        return Slope(torch.ones_like(at))

    end = ascent.climb(
        x,
        slope_at,
        Ball("linf", 9.0),
        into_domain=lambda x: x,
        optimiser=optimiser,
        steps=7,
        step_size=first,
        schedule=schedule,
    )
    lengths = torch.tensor([*trail, float(end.x)]).diff()
    if first is None:
        assert float(end.x) == pytest.approx(9.0), "a path of twice the radius, held by the ball"
    else:
        assert float(lengths[0]) == pytest.approx(first)
    if schedule == "cosine" and first is not None:
        expected = [first * (1 + math.cos(math.pi * k / 7)) / 2 for k in range(7)]
        assert lengths.tolist() == pytest.approx(expected, rel=1e-5)
    assert sum(ascent._lengths(7, None, schedule, 9.0)) == pytest.approx(18.0)
