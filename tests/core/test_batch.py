"""A batch is checked and cut as one, whatever its inputs are; a domain says what a valid input is."""

import math
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from mithridate.core.batch import AnyBatch, Batch, check_batch, tensors_of
from mithridate.core.domain import PIXELS, TOLERANCE, Domain, check_domain
from mithridate.core.errors import DataError


def rng(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(n: int = 4, *, dtype: torch.dtype = torch.float32) -> Batch:
    x = torch.rand(n, 3, 4, 4, generator=rng(), dtype=dtype)
    return Batch(x, torch.randint(10, (n,), generator=rng(1)))


def sentences(n: int = 4) -> AnyBatch:
    """Token ids and their mask, as a mapping."""
    ids = torch.randint(30, (n, 6), generator=rng())
    return Batch({"input_ids": ids, "attention_mask": ids.gt(5)}, torch.arange(n) % 2)


def pairs(n: int = 4) -> AnyBatch:
    """Two tensors, as positional arguments; targets are numbers."""
    return Batch([torch.rand(n, 2, generator=rng()), torch.rand(n, 3, 3, generator=rng(1))], torch.linspace(-1, 1, n))


KINDS: dict[str, AnyBatch] = {"tensor": batch_of(), "mapping": sentences(), "sequence": pairs()}


# Structure.


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_any_kind_are_a_batch(kind: str) -> None:
    check_batch(KINDS[kind])
    check_batch(KINDS[kind].take(slice(1)))


BAD_STRUCTURE: dict[str, tuple[Any, str]] = {
    "empty": (Batch(torch.rand(0, 3, 4, 4), torch.zeros(0, dtype=torch.int64)), "0 in 'inputs' and 0 targets"),
    "lengths": (Batch(torch.rand(4, 3), torch.zeros(3)), "4 in 'inputs' and 3 targets"),
    "one label without its axis": (Batch(torch.rand(4, 2), torch.tensor(0)), "'targets' is a single number"),
    "no tensors": (Batch({}, torch.zeros(3)), "no inputs and 3 targets"),
    "a mapping whose tensors differ": (
        Batch({"ids": torch.zeros(4, 2), "mask": torch.zeros(3, 2)}, torch.zeros(4)),
        "4 in 'ids', 3 in 'mask' and 4 targets",
    ),
    "a sequence whose tensors differ": (
        Batch([torch.zeros(4), torch.zeros(5)], torch.zeros(4)),
        "4 in '0', 5 in '1' and 4 targets",
    ),
    "a list in a mapping": (Batch({"ids": [1, 2]}, torch.zeros(2)), "'ids' is a list; it must be a tensor"),
    "a number in a sequence": (Batch([torch.tensor(1.0)], torch.zeros(1)), "'0' is a single number"),
    "text": (Batch("abc", torch.zeros(3)), "inputs are a str; give a tensor"),
    "nothing": (Batch(None, torch.zeros(3)), "inputs are a NoneType"),
    "targets that are no tensor": (Batch(torch.zeros(2, 2), [0, 1]), "'targets' is a list"),  # type: ignore[arg-type]  # on purpose: what is refused
}


@pytest.mark.parametrize("case", BAD_STRUCTURE)
def test_what_is_no_batch_is_refused_with_place_and_reason(case: str) -> None:
    batch, reason = BAD_STRUCTURE[case]
    with pytest.raises(DataError, match=rf"^loop step 3: .*{reason}"):
        check_batch(batch, where="loop step 3")


def test_structure_says_nothing_of_values() -> None:
    check_batch(Batch(torch.full((2, 3), math.nan), torch.tensor([-100, 99])))


# Cutting and moving.


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_taken_from_all_tensors_alike(kind: str) -> None:
    batch = KINDS[kind]
    for which, rows in (
        (slice(1, 3), [1, 2]),
        (torch.tensor([3, 0, 3]), [3, 0, 3]),
        (torch.tensor([True, False, False, True]), [0, 3]),
        (slice(0), []),
    ):
        taken = batch.take(which)
        assert taken.size == len(rows)
        for part, whole in zip([*tensors_of(taken.x), taken.y], [*tensors_of(batch.x), batch.y], strict=True):
            assert torch.equal(part, whole[rows])
        assert type(taken.x) is type(batch.x)
    if kind == "mapping":
        assert list(batch.take(slice(2)).x) == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_the_whole(kind: str) -> None:
    batch = KINDS[kind]
    pieces = list(batch.split(3))
    assert [piece.size for piece in pieces] == [3, 1]
    for i, whole in enumerate(tensors_of(batch.x)):
        assert torch.equal(torch.cat([tensors_of(piece.x)[i] for piece in pieces]), whole)
    assert torch.equal(torch.cat([piece.y for piece in pieces]), batch.y)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_shares_no_memory(kind: str) -> None:
    batch = KINDS[kind]
    copied = batch.clone()
    for mine, theirs in zip([*tensors_of(copied.x), copied.y], [*tensors_of(batch.x), batch.y], strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_moves_as_one(kind: str) -> None:
    moved = KINDS[kind].to("meta")
    assert {t.device.type for t in [*tensors_of(moved.x), moved.y]} == {"meta"}


def test_a_sample_is_finite_if_all_of_it_is() -> None:
    def with_nan(batch: AnyBatch, change: Any) -> list[bool]:
        changed = batch.clone()
        change(changed)
        return changed.finite().tolist()

    assert with_nan(batch_of(), lambda b: b.x[2, 1, 0, 3].fill_(math.nan)) == [True, True, False, True]
    assert with_nan(pairs(), lambda b: b.x[1][0, 2, 2].fill_(-math.inf)) == [False, True, True, True]
    assert with_nan(pairs(), lambda b: b.y[3].fill_(math.inf)) == [True, True, True, False]  # a target is one too
    assert with_nan(Batch(torch.zeros(2, 3), torch.zeros(2, 5)), lambda b: b.y[1, 4].fill_(math.nan)) == [True, False]
    assert sentences().finite().tolist() == [True] * 4  # whole numbers always are
    assert batch_of().take(slice(0)).finite().tolist() == []


# Domains.


def with_pixel(value: float) -> Batch:
    batch = batch_of()
    batch.x[2, 1, 0, 3] = value
    return batch


def with_labels(labels: Tensor) -> Batch:
    return Batch(batch_of().x, labels)


def test_a_good_batch_passes() -> None:
    check_domain(batch_of(), PIXELS, n_classes=10)
    check_domain(batch_of(1, dtype=torch.float64), PIXELS)
    check_domain(Batch(100 * torch.randn(4, 7, generator=rng()), torch.zeros(4)), Domain())  # z-scores, no bounds


BAD_VALUES: dict[str, tuple[AnyBatch, str]] = {
    "empty": (Batch(torch.rand(0, 3, 4, 4), torch.zeros(0, dtype=torch.int64)), "0 in 'inputs' and 0 targets"),
    "lengths": (with_labels(torch.zeros(3, dtype=torch.int64)), "4 in 'inputs' and 3 targets"),
    "a column of labels": (with_labels(torch.zeros(4, 1, dtype=torch.int64)), r"int64 of shape \(4, 1\)"),
    "bytes": (
        Batch(torch.zeros(4, 3, 4, 4, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)),
        "divide bytes by 255",
    ),
    "a mapping": (sentences(), "inputs are dict, and must be one tensor of floats"),
    "nan": (with_pixel(torch.nan), "1 of 4 samples hold NaN"),
    "infinite": (with_pixel(-torch.inf), "1 of 4 samples hold NaN or infinity"),
    "too bright": (with_pixel(1.5), r"1\.5\], outside the domain \[0, 1\]"),
    "too dark": (with_pixel(-0.25), r"\[-0\.25, .*outside the domain \[0, 1\]"),
    "normalised outside": (Batch(torch.randn(4, 3, 4, 4), torch.zeros(4, dtype=torch.int64)), "inside the model"),
    "float labels": (with_labels(torch.zeros(4)), r"labels are torch\.float32.*int64"),
    "int32 labels": (with_labels(torch.zeros(4, dtype=torch.int32)), r"labels are torch\.int32"),
    "label too large": (with_labels(torch.tensor([0, 1, 10, 2])), r"\[0, 10\], but the model has 10 classes"),
    "label negative": (with_labels(torch.tensor([0, -1, 3, 2])), r"labels span \[-1, 3\]"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_bad_batch_is_refused_with_place_and_reason(case: str) -> None:
    batch, reason = BAD_VALUES[case]
    with pytest.raises(DataError, match=rf"^stream step 3: .*{reason}"):
        check_domain(batch, PIXELS, n_classes=10, where="stream step 3")


def test_class_numbers_are_only_checked_where_the_classes_are_known() -> None:
    check_domain(with_labels(torch.tensor([0, 1, 99, 2])), PIXELS)


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
    with pytest.raises(DataError, match=r"outside the domain \[low to high, low to high\]"):
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
