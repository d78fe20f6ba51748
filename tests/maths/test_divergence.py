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
