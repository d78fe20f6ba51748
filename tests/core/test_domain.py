"""A domain says what a valid input is, and batches are held to it."""

import math
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.domain import PIXELS, TOLERANCE, Domain, check_domain
from mithridate.core.errors import DataError


def rng(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(n: int = 4, *, dtype: torch.dtype = torch.float32) -> Batch:
    x = torch.rand(n, 3, 4, 4, generator=rng(), dtype=dtype)
    return Batch(x, torch.randint(10, (n,), generator=rng(1)))


def with_pixel(value: float) -> Batch:
    batch = batch_of()
    batch.x[2, 1, 0, 3] = value
    return batch


def with_labels(labels: Tensor) -> Batch:
    return Batch(batch_of().x, labels)


def test_a_good_batch_passes() -> None:
    check_domain(batch_of(), PIXELS)
    check_domain(batch_of(1, dtype=torch.float64), PIXELS)
    check_domain(Batch(100 * torch.randn(4, 7, generator=rng()), torch.zeros(4)), Domain())  # z-scores, no bounds


BAD_VALUES: dict[str, tuple[AnyBatch, str]] = {
    "empty": (Batch(torch.rand(0, 3, 4, 4), torch.zeros(0, dtype=torch.int64)), "0 in 'inputs' and 0 targets"),
    "lengths": (with_labels(torch.zeros(3, dtype=torch.int64)), "4 in 'inputs' and 3 targets"),
    "bytes": (
        Batch(torch.zeros(4, 3, 4, 4, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)),
        "divide bytes by 255",
    ),
    "a mapping": (
        Batch({"ids": torch.zeros(4, 6)}, torch.zeros(4)),
        "inputs are dict, and must be one tensor of floats",
    ),
    "nan": (with_pixel(torch.nan), "1 of 4 samples hold NaN"),
    "infinite": (with_pixel(-torch.inf), "1 of 4 samples hold NaN or infinity"),
    "too bright": (with_pixel(1.5), r"1 of 4 samples lie outside the domain \[0, 1\], .*, 1\.5\]"),
    "too dark": (with_pixel(-0.25), r"outside the domain \[0, 1\], for inputs span \[-0\.25, "),
    "normalised outside": (Batch(torch.randn(4, 3, 4, 4), torch.zeros(4, dtype=torch.int64)), "inside the model"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_bad_batch_is_refused_with_place_and_reason(case: str) -> None:
    batch, reason = BAD_VALUES[case]
    with pytest.raises(DataError, match=rf"^stream step 3: .*{reason}"):
        check_domain(batch, PIXELS, where="stream step 3")


def test_targets_are_left_to_model_and_criterion() -> None:
    check_domain(with_labels(torch.tensor([0, -1, 99, 2])), PIXELS)
    check_domain(with_labels(torch.rand(4, 3)), PIXELS)


@pytest.mark.parametrize(("edge", "sign"), [(0.0, -1), (1.0, 1)])
def test_pixels_may_leave_the_range_by_rounding_only(edge: float, sign: int) -> None:
    check_domain(with_pixel(edge + sign * 0.9 * TOLERANCE), PIXELS)
    with pytest.raises(DataError):
        check_domain(with_pixel(edge + sign * 1.1 * TOLERANCE), PIXELS)


def test_a_domain_may_have_bounds_of_its_own_for_every_feature() -> None:
    domain = Domain(torch.tensor([-1.0, 0.0, -math.inf]), torch.tensor([1.0, 10.0, math.inf]))
    inside = torch.tensor([[-1.0, 10.0, 1e9], [0.5, 0.0, -1e9]])
    assert domain.holds(inside)
    assert torch.equal(domain.clamp(inside), inside)
    outside = torch.tensor([[-1.5, 10.0, 0.0], [0.0, 12.0, 5.0]])
    assert not domain.holds(outside)
    assert torch.equal(domain.clamp(outside), torch.tensor([[-1.0, 10.0, 0.0], [0.0, 10.0, 5.0]]))
    with pytest.raises(DataError, match=r"2 of 2 samples lie outside the domain \(bounds for each feature\), "):
        check_domain(Batch(outside, torch.zeros(2)), domain)
    assert not domain.holds(torch.full((1, 3), math.nan))


def test_a_tolerance_is_a_share_of_the_width() -> None:
    wide = Domain(-500.0, 500.0)
    assert wide.holds(torch.tensor([500 + 900 * TOLERANCE]))
    assert not wide.holds(torch.tensor([500 + 1100 * TOLERANCE]))
    half = Domain(0.0)  # bounded on one side: no width, no tolerance
    assert half.holds(torch.tensor([0.0, 1e30]))
    assert not half.holds(torch.tensor([-1e-6]))


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (torch.tensor(0.0), 1.0), (0.0, torch.ones(3))], ids=str)
def test_a_clamped_input_keeps_its_dtype(bounds: tuple[Any, Any]) -> None:
    x = torch.tensor([[-1.0, 0.5, 2.0]], dtype=torch.float64)
    clamped = Domain(*bounds).clamp(x)
    assert clamped.dtype == torch.float64
    assert clamped.tolist() == [[0.0, 0.5, 1.0]]
