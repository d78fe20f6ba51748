"""Which rounds of a federation a rule can work on."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from mithridate.core.errors import DataError

LARGEST = 1e300
"""The largest entry that a row may hold: sums and differences of such entries do not overflow in float64."""


def unusable(rows: Tensor) -> Tensor:
    """Which rows no rule takes, since an entry is NaN, infinite or beyond `LARGEST`: (n, P) -> (n,) bool."""
    limit = min(LARGEST, torch.finfo(rows.dtype).max)
    return ~(rows.abs() <= limit).all(1)  # a comparison with NaN is false


def check_rows(rows: Tensor, *, clients: Tensor, weights: Tensor | None, trusted: Tensor | None, where: str) -> None:
    """Refuse a round that no rule can work on.

    Args:
        rows: (n, P), floating point.
        clients: Their ids, (n,) int64.
        weights: How much each counts, (n,); None for alike.
        trusted: The server's own update, (P,); None for none.
        where: Named in the message.

    Raises:
        DataError: Rows are no matrix of floats or hold unusable entries; ids are not one a row, int64 and distinct;
            weights are not one a row, finite, >= 0 and somewhere positive; the trusted update does not fit the rows.
    """
    if rows.ndim != 2 or rows.shape[1] == 0 or not rows.is_floating_point():
        raise DataError(
            f"{where}: rows are {rows.dtype} of shape {tuple(rows.shape)}; make them a matrix of floats (client, "
            "parameter)."
        )
    n, width = rows.shape
    if clients.shape != (n,) or clients.dtype != torch.int64:
        raise DataError(
            f"{where}: {n} rows, but client ids are {clients.dtype} of shape {tuple(clients.shape)}; give one int64 a "
            "row."
        )
    twice = [client for client, count in Counter(clients.tolist()).items() if count > 1]
    if twice:
        raise DataError(f"{where}: {_named(twice)} sent more than one row; keep one row a client.")
    bad = clients[unusable(rows).to(clients.device)].tolist()
    if bad:
        raise DataError(
            f"{where}: {_named(bad)} sent NaN, infinite or larger entries than {LARGEST:g}; leave those rows out "
            "(`unusable` finds them)."
        )
    if weights is not None:
        if weights.shape != (n,):
            raise DataError(f"{where}: {n} rows, but weights of shape {tuple(weights.shape)}; give one weight a row.")
        odd = clients[~(weights.isfinite() & (weights >= 0)).to(clients.device)].tolist()
        if odd:
            raise DataError(
                f"{where}: {_named(odd)} have a negative or non-finite weight; weights are finite and >= 0."
            )
        if n and not bool((weights > 0).any()):
            raise DataError(f"{where}: all {n} weights are zero; leave them unset to count all clients alike.")
    if trusted is not None and (trusted.shape != (width,) or bool(unusable(trusted.unsqueeze(0)))):
        raise DataError(
            f"{where}: the trusted update has shape {tuple(trusted.shape)} or holds NaN, infinite or larger entries "
            f"than {LARGEST:g}; it must be one finite row of {width}, like the clients'."
        )


def _named(clients: Sequence[int]) -> str:
    return f"client{'s' if len(clients) > 1 else ''} {', '.join(map(str, clients))}"
