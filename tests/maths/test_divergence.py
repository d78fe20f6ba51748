import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from torch.nn import functional as F

from mithridate.maths.divergence import Divergence, divergence

KINDS: tuple[Divergence, ...] = ("kl", "kl_reverse", "js", "tv", "l2")


def logits(seed: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_against_scipy() -> None:
    old, now = logits(0), logits(1)
    p, q = F.softmax(old, 1).numpy(), F.softmax(now, 1).numpy()
    expected = {
        "kl": entropy(p, q, axis=1),
        "kl_reverse": entropy(q, p, axis=1),
        "js": jensenshannon(p, q, axis=1) ** 2,
        "tv": np.abs(p - q).sum(1) / 2,
        "l2": np.linalg.norm(old.numpy() - now.numpy(), axis=1),
    }
    for kind in KINDS:
        np.testing.assert_allclose(divergence(old, now, kind).numpy(), expected[kind], rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_of_several_answers_to_a_sample_the_mean_counts_and_l2_takes_them_as_one(kind: Divergence) -> None:
    old, now = (torch.stack([logits(seed), logits(seed + 1), logits(seed + 2)], 1) for seed in (0, 3))
    each = torch.stack([divergence(old[:, k], now[:, k], kind) for k in range(3)])
    expected = each.square().sum(0).sqrt() if kind == "l2" else each.mean(0)
    torch.testing.assert_close(divergence(old, now, kind), expected)
    for shape in ((0, 5), (0, 3, 5)):  # of no sample there is none
        assert divergence(torch.zeros(shape), torch.zeros(shape), kind).shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 50), shift=st.floats(-5, 5))
def test_equal_answers_have_no_distance_and_shifted_logits_are_equal_answers(
    kind: Divergence, seed: int, shift: float
) -> None:
    old = logits(seed)
    assert float(divergence(old, old, kind).abs().max()) < 1e-12
    if kind != "l2":
        assert float(divergence(old, old + shift, kind).abs().max()) < 1e-12


def test_certain_answers_stay_finite_and_bounded() -> None:
    old, now = torch.tensor([[200.0, -200.0]]), torch.tensor([[-200.0, 200.0]])
    assert float(divergence(old, now, "js")) == pytest.approx(math.log(2))
    assert float(divergence(old, now, "tv")) == pytest.approx(1)
    assert float(divergence(old, now, "kl")) == pytest.approx(400)


def by_definition(old: list[float], now: list[float], kind: Divergence) -> float:
    """One sample's divergence in Python's own doubles, term by term, with 0 log 0 = 0."""
    if kind == "l2":
        return math.sqrt(sum((0.0 if a == b else a - b) ** 2 for a, b in zip(old, now, strict=True)))

    def probabilities(z: list[float]) -> list[float]:
        weights = [math.exp(value - max(z)) for value in z]
        return [weight / sum(weights) for weight in weights]

    def kl(p: list[float], q: list[float]) -> float:
        pairs = [(a, b) for a, b in zip(p, q, strict=True) if a > 0]
        return math.inf if any(b == 0 for _, b in pairs) else sum(a * math.log(a / b) for a, b in pairs)

    p, q = probabilities(old), probabilities(now)
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return {
        "kl": kl(p, q),
        "kl_reverse": kl(q, p),
        "js": (kl(p, middle) + kl(q, middle)) / 2,
        "tv": sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
    }[kind]


IMPOSSIBLE = {
    "in both": ([0.3, -math.inf, 1.0], [-0.2, -math.inf, 0.9]),
    "in the old one": ([0.3, -math.inf, 1.0], [-0.2, 0.1, 0.9]),
    "in the current one": ([0.3, 0.1, 1.0], [-0.2, -math.inf, 0.9]),
    "in each another one": ([0.3, -math.inf, 1.0], [-math.inf, 0.1, 0.9]),
    "all but one, the same": ([-math.inf, 2.0, -math.inf], [-math.inf, 2.0, -math.inf]),
    "all but one, another": ([-math.inf, 2.0, -math.inf], [2.0, -math.inf, -math.inf]),
    "by rounding": ([0.0, -5000.0, 1.0], [0.0, -4000.0, 1.0]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", IMPOSSIBLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_classes_are_counted_as_the_definition_says(case: str, kind: Divergence, dtype: torch.dtype) -> None:
    old, now = IMPOSSIBLE[case]
    found = float(divergence(torch.tensor([old], dtype=dtype), torch.tensor([now], dtype=dtype), kind))
    assert found == pytest.approx(by_definition(old, now, kind), rel=64 * torch.finfo(dtype).eps, abs=1e-12)


@pytest.mark.parametrize("kind", ["kl", "kl_reverse", "js"])
def test_an_impossible_class_leaves_the_gradient_finite(kind: Divergence) -> None:
    old, now = torch.tensor([[0.3, -math.inf, 1.0]]), torch.tensor([[-0.2, -math.inf, 0.9]], requires_grad=True)
    (slope,) = torch.autograd.grad(divergence(old, now, kind).sum(), now)
    assert bool(slope.isfinite().all())
    assert float(slope.abs().max()) > 0
