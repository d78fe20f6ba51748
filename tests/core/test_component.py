"""What every component says of itself, and the sentence that refuses inputs which cannot be moved."""

import pytest
import torch

from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.component import Component, check_moves
from mithridate.core.errors import ConfigError

Y = torch.zeros(2)


def test_a_component_that_says_nothing_needs_nothing() -> None:
    assert Component.needs == frozenset()
    assert Component().lookback == 0
    Component().check_inputs(Batch({"ids": torch.zeros(2)}, Y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_can_be_moved(dtype: torch.dtype) -> None:
    check_moves(Batch(torch.zeros(2, 3, dtype=dtype), Y), who="pgd")


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        (Batch(torch.zeros(2, 3, dtype=torch.int64), Y), r"a tensor of torch\.int64"),
        (Batch({"x": torch.zeros(2, 3)}, Y), "a dict of tensors"),
        (Batch([torch.zeros(2, 3)], Y), "a list of tensors"),
    ],
    ids=str,
)
def test_other_inputs_cannot(batch: AnyBatch, what: str) -> None:
    with pytest.raises(ConfigError, match=rf"^pgd moves inputs .* these inputs are {what}\. Take a component that"):
        check_moves(batch, who="pgd")
