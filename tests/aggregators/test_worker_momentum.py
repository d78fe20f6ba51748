"""Worker momentum by client id: what is kept, for whom, and what is not."""

import pytest
import torch

from mithridate.aggregators.worker_momentum import CLIENTS, ROWS, with_momentum
from mithridate.core.aggregator import Context
from mithridate.core.errors import CheckpointError
from mithridate.core.view import Memory


def context(clients: list[int], memory: Memory) -> Context:
    return Context(clients=torch.tensor(clients), rng=torch.Generator(), memory=memory)


def test_each_client_has_its_own_past_and_keeps_it_while_absent() -> None:
    memory: Memory = {}
    first = with_momentum(torch.tensor([[1.0], [2.0]]), context([7, 3], memory), 0.5)
    assert first.tolist() == [[1.0], [2.0]]
    second = with_momentum(torch.tensor([[10.0], [20.0]]), context([5, 3], memory), 0.5)
    assert second.tolist() == [[10.0], [11.0]]
    third = with_momentum(torch.tensor([[0.0], [0.0], [0.0]]), context([3, 5, 7], memory), 0.5)
    assert third.tolist() == [[5.5], [5.0], [0.5]]
    kept = dict(zip(memory[CLIENTS].tolist(), memory[ROWS].flatten().tolist(), strict=True))
    assert kept == {3: 5.5, 5: 5.0, 7: 0.5}


def test_without_momentum_nothing_is_kept_and_the_rows_come_back() -> None:
    memory: Memory = {}
    rows = torch.randn(3, 2)
    assert with_momentum(rows, context([1, 2, 3], memory), 0.0) is rows
    assert not memory


def test_what_is_given_is_not_written_to_and_what_is_kept_is_not_handed_out() -> None:
    memory: Memory = {}
    rows = torch.ones(2, 2)
    with_momentum(rows, context([1, 2], memory), 0.5)
    made = with_momentum(3 * rows, context([1, 2], memory), 0.5)
    assert torch.equal(rows, torch.ones(2, 2))
    made.zero_()
    assert torch.equal(memory[ROWS], 2 * torch.ones(2, 2))


def test_the_dtype_is_that_of_the_rows() -> None:
    memory: Memory = {}
    with_momentum(torch.ones(2, 2).double(), context([1, 2], memory), 0.5)
    assert with_momentum(torch.ones(2, 2), context([1, 2], memory), 0.5).dtype == torch.float32


def test_notes_of_another_model_are_refused() -> None:
    memory: Memory = {}
    with_momentum(torch.ones(2, 2), context([1, 2], memory), 0.5)
    with pytest.raises(CheckpointError, match="has 2 parameters and this round's rows have 3"):
        with_momentum(torch.ones(2, 3), context([1, 2], memory), 0.5)
