"""Rows that no rule takes."""

import pytest
import torch

from mithridate.core.errors import DataError
from mithridate.core.usable_rows import LARGEST, check_rows, unusable


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_unusable_rows_of_every_dtype(dtype: torch.dtype) -> None:
    rows = torch.ones(5, 2, dtype=dtype)
    rows[1, 0], rows[2, 1], rows[3, 0], rows[4, 1] = torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max
    assert unusable(rows).tolist() == [False, True, True, True, dtype == torch.float64]


def test_a_row_up_to_the_largest_entry_is_taken() -> None:
    rows = torch.tensor([[LARGEST, 0.0], [-LARGEST, 1.0], [1.01 * LARGEST, 0.0]], dtype=torch.float64)
    assert unusable(rows).tolist() == [False, False, True]
    ids = torch.arange(2)
    check_rows(rows[:2], clients=ids, weights=None, trusted=None, where="here")
    with pytest.raises(DataError, match=r"^here: client 7 sent NaN, infinite or larger entries"):
        check_rows(rows, clients=5 + torch.arange(3), weights=None, trusted=None, where="here")
