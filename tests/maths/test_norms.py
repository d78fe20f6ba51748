"""Projections, directions, draws and clips, against numpy and against a constrained optimiser."""

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Generator, Tensor
from torch.testing import assert_close

from mithridate.maths.norms import Ball, Norm, clip_rows, sample_norms

NORMS: tuple[Norm, ...] = ("linf", "l2")
norms = st.sampled_from(NORMS)
radii = st.floats(0.0, 3.0)
values = st.floats(-2.0, 2.0, width=32)
images = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.just(2), st.just(3)), elements=values).map(
    torch.from_numpy
)
"""(n, 2, 3): a few samples, more than one axis a sample."""


def rng(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def numpy_norms(x: Tensor, norm: Norm) -> NDArray[np.float64]:
    flat = x.double().numpy().reshape(len(x), -1)
    return np.abs(flat).max(1) if norm == "linf" else np.sqrt((flat**2).sum(1))  # type: ignore[no-any-return]  # numpy gives Any here


@settings(deadline=None)
@given(images, norms)
def test_sample_norms(x: Tensor, norm: Norm) -> None:
    least = float(torch.finfo(x.dtype).smallest_normal)  # below it, a float has fewer digits
    np.testing.assert_allclose(sample_norms(x, norm).numpy(), numpy_norms(x, norm), rtol=1e-6, atol=1e-6 * least)


# The ball.


@settings(deadline=None)
@given(images, norms, radii)
def test_projection_lies_inside_and_stays_there(delta: Tensor, norm: Norm, eps: float) -> None:
    ball = Ball(norm, eps)
    once = ball.project(delta)
    assert (numpy_norms(once, norm) <= eps * (1 + 1e-6)).all()
    assert ball.holds(once)
    assert_close(ball.project(once), once, rtol=1e-6, atol=0)


def test_a_length_equal_to_the_radius_is_inside() -> None:
    delta = torch.zeros(1, 2, 3)
    delta[0, 0, 0] = 1.14453125
    assert torch.equal(Ball("l2", 1.14453125).project(delta), delta)
    assert torch.equal(clip_rows(delta.flatten(1), 1.14453125, "l2"), delta.flatten(1))


@settings(deadline=None)
@given(images, norms, radii)
def test_projection_leaves_the_inside_alone(delta: Tensor, norm: Norm, eps: float) -> None:
    projected = Ball(norm, eps).project(delta)
    for row, lengths in enumerate(zip(sample_norms(delta, norm), numpy_norms(delta, norm), strict=True)):
        if max(lengths) <= eps:
            assert torch.equal(projected[row], delta[row])
        elif min(lengths) > eps * (1 + 1e-6):
            assert not torch.equal(projected[row], delta[row])


@given(norms, st.integers(0, 2**20), st.floats(0.1, 2.0))
@settings(max_examples=20, deadline=None)
def test_projection_is_the_nearest_point(norm: Norm, seed: int, eps: float) -> None:
    """Against scipy's constrained minimum of the distance."""
    target = torch.randn(1, 4, generator=rng(seed), dtype=torch.float64)
    goal = target[0].numpy()
    projected = Ball(norm, eps).project(target)[0].numpy()
    found = minimize(
        lambda z: ((z - goal) ** 2).sum(),
        np.zeros(4),
        jac=lambda z: 2 * (z - goal),
        method="SLSQP",
        bounds=[(-eps, eps)] * 4 if norm == "linf" else None,
        constraints=[{"type": "ineq", "fun": lambda z: eps**2 - (z**2).sum(), "jac": lambda z: -2 * z}]
        if norm == "l2"
        else (),
        options={"ftol": 1e-14},
    )
    np.testing.assert_allclose(projected, found.x, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_shrinks_only_the_samples_that_are_too_long(norm: Norm) -> None:
    delta = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [-6.0, 0.1]])
    expected = {
        "linf": torch.tensor([[1.0, 1.0], [0.3, 0.4], [0.0, 0.0], [-1.0, 0.1]]),
        "l2": torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0], [-6.0 / 36.01**0.5, 0.1 / 36.01**0.5]]),
    }
    assert_close(Ball(norm, 1.0).project(delta), expected[norm])


@settings(deadline=None)
@given(images, norms)
def test_a_ball_without_radius_holds_zero_only(delta: Tensor, norm: Norm) -> None:
    ball = Ball(norm, 0.0)
    assert not ball.project(delta).any()
    assert not ball.sample(delta, rng()).any()
    assert ball.holds(torch.zeros_like(delta))
    assert ball.holds(delta) == (float(numpy_norms(delta, norm).max()) <= 1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_holds_looks_at_every_sample(norm: Norm) -> None:
    delta = torch.zeros(5, 3, 2, 2)
    delta[3, 1, 0, 1] = 0.25
    assert Ball(norm, 0.25).holds(delta)
    assert Ball(norm, 0.25).holds(-delta)
    assert not Ball(norm, 0.2499).holds(delta)
    assert not Ball(norm, 0.2499).holds(-delta)
    delta[4, 0, 0, 0] = torch.nan
    assert not Ball(norm, 0.25).holds(delta)


@pytest.mark.parametrize("norm", NORMS)
def test_holds_forgives_float_rounding_of_pixels(norm: Norm) -> None:
    """x + delta - x is what the guard can measure."""
    x, eps = torch.rand(64, 3, 16, 16, generator=rng()), 8 / 255
    delta = Ball(norm, eps).project(torch.randn(x.shape, generator=rng(1)))
    assert Ball(norm, eps).holds((x + delta) - x)


@settings(deadline=None)
@given(images, norms, st.sampled_from((1e-30, 1e-20, 1.0, 1e20)))
def test_direction_has_length_one_and_climbs_best(gradient: Tensor, norm: Norm, scale: float) -> None:
    """<g, d> of the unit ball's best point is the dual norm of g, however small or large g is."""
    gradient = torch.where(gradient.abs() < 1e-3, torch.zeros_like(gradient), gradient)
    g = gradient * scale
    d = Ball(norm, 0.1).direction(g)
    for row in range(len(g)):
        if not gradient[row].any():
            assert not d[row].any()
            continue
        assert_close(float(sample_norms(d, norm)[row]), 1.0)
        exact = g[row].double()
        dual = exact.abs().sum() if norm == "linf" else exact.square().sum().sqrt()
        assert_close((exact * d[row].double()).sum(), dual, rtol=1e-6, atol=0)


# Draws.


@pytest.mark.parametrize("norm", NORMS)
def test_a_draw_is_inside_fresh_and_repeatable(norm: Norm) -> None:
    like = torch.zeros(100, 2, 3, dtype=torch.float64)
    ball, generator = Ball(norm, 0.5), rng(3)
    first, second = ball.sample(like, generator), ball.sample(like, generator)
    assert first.dtype == like.dtype
    assert ball.holds(first)
    assert len(torch.unique(first.flatten(1), dim=0)) == 100
    assert not torch.equal(first, second)
    assert torch.equal(first, ball.sample(like, rng(3)))


@pytest.mark.parametrize("shape", [(2,), (1, 3, 2)])
def test_an_l2_draw_is_uniform_in_the_ball(shape: tuple[int, ...]) -> None:
    """The share of the volume within a radius, r^d, is uniform on [0, 1]; directions have no preference."""
    n, eps = 20_000, 0.7
    draws = Ball("l2", eps).sample(torch.zeros(n, *shape, dtype=torch.float64), rng(5))
    d = draws[0].numel()
    volume = (sample_norms(draws, "l2") / eps) ** d
    sorted_volume = volume.sort().values
    gap = (sorted_volume - torch.linspace(0, 1, n, dtype=torch.float64)).abs().max()
    assert float(gap) < 1.95 / n**0.5, "Kolmogorov-Smirnov at the 0.1 % level"
    assert_close(float(volume.mean()), 0.5, atol=0.01, rtol=0)
    assert float((draws.flatten(1) / eps).mean(0).abs().max()) < 0.02


def test_a_linf_draw_is_uniform_in_the_cube() -> None:
    draws = Ball("linf", 0.7).sample(torch.zeros(20_000, 2, dtype=torch.float64), rng(5)) / 0.7
    for column in draws.T:
        gap = (column.sort().values - torch.linspace(-1, 1, len(column), dtype=torch.float64)).abs().max()
        assert float(gap) < 2 * 1.95 / len(column) ** 0.5
    assert abs(float((draws[:, 0] * draws[:, 1]).mean())) < 0.02


# Clipping of updates.

How = Literal["scale", "project"]
HOWS: tuple[How, ...] = ("scale", "project")
matrices = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=5), elements=st.floats(-100, 100, width=32)
).map(torch.from_numpy)
bounds = st.floats(1e-3, 200)


def numpy_clip(rows: Tensor, bound: float, norm: Norm, how: How) -> NDArray[np.float64]:
    """One row at a time, as a textbook has it."""
    out = rows.double().numpy().copy()
    for i, row in enumerate(out):
        if how == "project" and norm == "linf":
            out[i] = np.clip(row, -bound, bound)
        elif (length := np.linalg.norm(row, np.inf if norm == "linf" else 2)) > bound:
            out[i] = row * (bound / length)
    return out


@settings(deadline=None)
@given(matrices, bounds, norms, st.sampled_from(HOWS))
def test_clip_rows(rows: Tensor, bound: float, norm: Norm, how: How) -> None:
    before = rows.clone()
    clipped = clip_rows(rows, bound, norm, how=how)
    assert torch.equal(rows, before), "the input is left alone"
    np.testing.assert_allclose(clipped.numpy(), numpy_clip(rows, bound, norm, how), rtol=1e-5, atol=1e-30)
    assert (numpy_norms(clipped, norm) <= bound * (1 + 1e-6)).all()
    for row, length in enumerate(sample_norms(rows, norm)):
        if float(length) <= bound:
            assert torch.equal(clipped[row], rows[row]), "a short row is bit-identical"


@settings(deadline=None)
@given(matrices, bounds, norms, st.sampled_from(HOWS))
def test_rows_are_clipped_independently(rows: Tensor, bound: float, norm: Norm, how: How) -> None:
    alone = torch.cat([clip_rows(row.unsqueeze(0), bound, norm, how=how) for row in rows])
    assert_close(clip_rows(rows, bound, norm, how=how), alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("norm", NORMS)
def test_no_bound_is_the_identity_bit_for_bit(norm: Norm, how: How) -> None:
    rows = torch.randn(5, 9, generator=rng()) * torch.tensor([[1e-38], [1e-3], [1.0], [1e30], [0.0]])
    rows[1, 2] = torch.inf
    rows[2, 3] = -0.0
    clipped = clip_rows(rows, torch.inf, norm, how=how)
    assert torch.equal(clipped, rows)
    assert torch.equal(clipped.signbit(), rows.signbit())


def test_scaling_keeps_the_direction_and_projecting_keeps_the_small_entries() -> None:
    rows = torch.tensor([[4.0, -1.0, 0.5]])
    assert_close(clip_rows(rows, 2.0, "linf", how="scale"), torch.tensor([[2.0, -0.5, 0.25]]))
    assert_close(clip_rows(rows, 2.0, "linf", how="project"), torch.tensor([[2.0, -1.0, 0.5]]))
    assert torch.equal(clip_rows(rows, 2.0, "linf"), clip_rows(rows, 2.0, "linf", how="scale"))


@settings(deadline=None)
@given(matrices, bounds)
def test_the_two_ways_agree_in_l2(rows: Tensor, bound: float) -> None:
    assert torch.equal(clip_rows(rows, bound, "l2", how="scale"), clip_rows(rows, bound, "l2", how="project"))


@pytest.mark.parametrize("bound", [0.1, 1.0, 1e9])
@pytest.mark.parametrize(("norm", "order"), [("l2", 2.0), ("linf", float("inf"))])
def test_one_row_is_clipped_as_torch_clips_a_gradient(norm: Norm, order: float, bound: float) -> None:
    row = torch.randn(1, 50, generator=rng())
    parameter = torch.nn.Parameter(torch.zeros(50))
    parameter.grad = row[0].clone()
    torch.nn.utils.clip_grad_norm_([parameter], bound, norm_type=order)
    # torch divides by length + 1e-6 and so ends a little below the bound.
    assert_close(clip_rows(row, bound, norm)[0], parameter.grad, rtol=2e-6, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_row_too_long_for_float32_squares_is_still_clipped_to_the_bound(norm: Norm) -> None:
    """The case that a bound exists for: an exploded update keeps its direction and gets the bound's length."""
    rows = torch.tensor([[3e30, -4e30], [3e-30, 4e-30]])
    clipped = clip_rows(rows, 1.0, norm)
    expected = torch.tensor([[0.6, -0.8]]) if norm == "l2" else torch.tensor([[0.75, -1.0]])
    assert_close(clipped[:1], expected)
    assert torch.equal(clipped[1], rows[1])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_large_values_are_rounded_by_more_and_still_held_to_their_ball(norm: Norm) -> None:
    x = 1000 * torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    ball = Ball(norm, 0.15)
    delta = 0.15 * ball.direction(torch.randn(50, 30, generator=torch.Generator().manual_seed(2)))
    there_and_back = (x + delta) - x
    assert not ball.holds(there_and_back)
    assert ball.holds(there_and_back, x)
    assert not ball.holds(1.2 * there_and_back, x)
