"""A batch is checked, cut and moved as one, whatever its inputs are."""

import math
from typing import Any

import pytest
import torch
from torch import Generator

from mithridate.core.batch import AnyBatch, Batch, check_batch, tensors_of
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
        r"4 in 'inputs\[0\]', 5 in 'inputs\[1\]' and 4 targets",
    ),
    "a list in a mapping": (Batch({"ids": [1, 2]}, torch.zeros(2)), "'ids' is a list; it must be a tensor"),
    "a number in a sequence": (Batch([torch.tensor(1.0)], torch.zeros(1)), r"'inputs\[0\]' is a single number"),
    "sparse": (Batch(torch.eye(3).to_sparse(), torch.zeros(3)), "'inputs' is of layout torch.sparse_coo"),
    "complex": (Batch(torch.zeros(3, 2, dtype=torch.complex64), torch.zeros(3)), "'inputs' is complex"),
    "without values": (Batch(torch.zeros(3, 2), torch.zeros(3, device="meta")), "'targets' is on the device 'meta'"),
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
