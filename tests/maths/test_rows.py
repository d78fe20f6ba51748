"""Rows are measured and mixed a slice of columns at a time, without overflow, as if at once."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mithridate.maths import rows as module
from mithridate.maths.rows import blend, by_column, columns, lengths, middle, mixtures, squared_distances

MATRIX = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("entries", [1, 5, 10, 24, 1 << 20])
def test_slices_cover_every_column_once_and_change_nothing(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = MATRIX.numpy().astype(np.float64)
    monkeypatch.setattr(module, "ENTRIES", entries)
    parts = list(columns(MATRIX))
    assert torch.equal(torch.cat([part for _, part in parts], dim=1), MATRIX.double())
    assert all(torch.equal(MATRIX[:, where].double(), part) for where, part in parts)
    assert max(part.numel() for _, part in parts) <= max(entries, len(MATRIX))
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0], dtype=torch.float64)
    point = MATRIX[3]
    assert np.allclose(lengths(MATRIX), np.sqrt((whole**2).sum(1)))
    assert np.allclose(lengths(MATRIX, point), [np.sqrt(((row - whole[3]) ** 2).sum()) for row in whole])
    expected = [[((a - b) ** 2).sum() for b in whole] for a in whole]
    assert np.allclose(squared_distances(MATRIX), expected)
    assert np.allclose(blend(shares, MATRIX), sum(s * row for s, row in zip(shares.numpy(), whole, strict=True)))
    assert np.allclose(mixtures(shares.repeat(2, 1), MATRIX)[1], blend(shares, MATRIX), atol=1e-6)
    assert np.allclose(by_column(MATRIX, middle), np.median(whole, axis=0))


def test_distances_are_symmetric_and_exactly_zero_between_equal_rows_wherever_they_lie() -> None:
    far = torch.randn(1, 50, dtype=torch.float64).repeat(3, 1) * 1e9
    far[2] += 1.0
    made = squared_distances(far)
    assert torch.equal(made, made.T)
    assert float(made[0, 1]) == 0
    assert float(made[0, 2]) == pytest.approx(50, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_overflows(dtype: torch.dtype) -> None:
    large = 1e38 if dtype == torch.float32 else 1e299
    rows = torch.tensor([[large, -large], [1.0, 2.0], [1.0, 2.5]], dtype=dtype)
    assert lengths(rows).isfinite().all()
    assert float(lengths(rows)[0]) == pytest.approx(large * 2**0.5)
    made = squared_distances(rows)
    assert not made.isnan().any()
    assert float(made[1, 2]) == pytest.approx(0.25)
    assert made[0].argsort().tolist()[0] == 0


@hypothesis_settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=9))
def test_the_middle_is_the_median(values: list[int]) -> None:
    ordered = torch.tensor(sorted(values), dtype=torch.float64).unsqueeze(1)
    assert float(middle(ordered)) == np.median(values)
