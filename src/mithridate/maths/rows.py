"""What aggregators compute from a matrix of updates (client, parameter), in float64, a slice of columns at a time.

A model's rows are long, so nothing larger than the matrix itself is formed: no (client, client, parameter), and
no second copy in float64. Squares of float32 entries do not overflow in float64; lengths of float64 rows do not
either, and distances between float64 rows beyond 1e154 become infinite, which orders them rightly.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mithridate.maths.norms import sample_norms

ENTRIES = 1 << 20
"""How many entries are in float64 at a time."""


def columns(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The matrix in slices of columns: where each one lies, and its entries in float64."""
    n, width = rows.shape
    step = max(ENTRIES // max(n, 1), 1)
    for start in range(0, width, step):
        where = slice(start, start + step)
        yield where, rows[:, where].double()


def lengths(rows: Tensor, centre: Tensor | None = None) -> Tensor:
    """The l2 length of each row, or its distance from a point: (n, P), (P,) -> (n,) float64; it does not overflow."""
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for where, part in columns(rows):
        moved = part if centre is None else part - centre[where]
        total = torch.hypot(total, sample_norms(moved, "l2"))
    return total


def squared_distances(rows: Tensor) -> Tensor:
    """Squared l2 distances between all rows: (n, P) -> (n, n) float64, symmetric, exactly zero for identical rows.

    Differences are summed: the Gram matrix is several times faster, but its rounding depends on where the rows lie.
    """
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for _, part in columns(rows):
        total += torch.cdist(part, part, compute_mode="donot_use_mm_for_euclid_dist").square()
    return total


def blend(shares: Tensor, rows: Tensor) -> Tensor:
    """The sum of the rows, each times its share: (n,) and (n, P) -> (P,) float64."""
    shares = shares.to(rows.device)
    return torch.cat([shares @ part for _, part in columns(rows)])


def mixtures(shares: Tensor, rows: Tensor) -> Tensor:
    """Several blends at once, in the rows' dtype: (m, n) and (n, P) -> (m, P)."""
    shares = shares.to(rows.device)
    blends = rows.new_empty(len(shares), rows.shape[1])
    for where, part in columns(rows):
        blends[:, where] = (shares @ part).to(rows.dtype)
    return blends


def by_column(rows: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
    """A rule applied to each sorted column: (n, P) -> (P,) float64; sorting costs n log n a column.

    Args:
        rows: (n, P).
        rule: (n, p) float64, each column ascending -> (p,).
    """
    return torch.cat([rule(part.sort(dim=0).values) for _, part in columns(rows)])


def middle(ordered: Tensor) -> Tensor:
    """The median of sorted columns, (n, p) -> (p,); of an even number the mean of the two in the middle."""
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
