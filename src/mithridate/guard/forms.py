"""Batches as people's loops have them, and as components take them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.errors import DataError
from mithridate.core.targets import IGNORED

LABELS = ("labels", "label", "targets", "target")
"""Names that targets have in batches that are mappings."""


def opened(batch: object) -> tuple[AnyBatch, Callable[[AnyBatch], Any]]:
    """A loop's batch as a `Batch`, and a function that brings a `Batch` into the form that the loop's has.

    Args:
        batch: A `Batch`, a pair (inputs, targets), or a mapping with the targets under `labels`.

    Raises:
        DataError: It is none of these.
    """
    if isinstance(batch, Batch):
        return batch, lambda screened: screened
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        named = hasattr(batch, "_fields")
        kind: Callable[..., Any] = type(batch)
        pair = Batch(batch[0], batch[1])
        return pair, lambda screened: kind(*screened) if named else kind(list(screened))
    if isinstance(batch, Mapping):
        name = next((name for name in LABELS if isinstance(batch.get(name), Tensor)), None)
        if name is not None:
            rows = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.ndim and len(v) == len(batch[name])}
            others = {k: v for k, v in batch.items() if k not in rows}
            targets = rows.pop(name)
            return Batch(rows, targets), lambda screened: {**screened.x, name: screened.y, **others}
    kind_of = type(batch).__name__
    raise DataError(
        f"the guard cannot tell inputs from targets in a {kind_of}; give a pair (inputs, targets), a mapping with a "
        "tensor under 'labels', or mithridate.Batch(x, y)."
    )


@dataclass(frozen=True)
class OpenedBatches:
    """Batches as a loop has them, as components take them; to be gone through as often as those can be.

    Args:
        batches: A list or a loader, whose batches are of the forms that `opened` takes.
    """

    batches: Iterable[object]

    def __iter__(self) -> Iterator[AnyBatch]:
        return (opened(batch)[0] for batch in self.batches)


def called(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AnyBatch | None:
    """What a model was called with, as a batch for the record; None if there is no tensor in it.

    Targets are what it was given as `labels`; -100, which no loss counts, where it was given none.

    Args:
        args: Positional arguments; of two or more, the inputs are a sequence.
        kwargs: Named ones.
    """
    if not kwargs and len(args) == 1 and isinstance(args[0], Mapping):
        kwargs, args = args[0], ()
    named = {k: v.detach() for k, v in kwargs.items() if isinstance(v, Tensor) and v.ndim}
    placed = [v.detach() for v in args if isinstance(v, Tensor) and v.ndim]
    targets = next((named.pop(name) for name in LABELS if name in named), None)
    if not named and not placed:
        return None
    size = len(placed[0]) if placed else len(next(iter(named.values())))
    y = torch.full((size,), IGNORED) if targets is None or len(targets) != size else targets
    if named:
        named |= {f"input_{i}": v for i, v in enumerate(placed)}
        return Batch({k: v for k, v in named.items() if len(v) == size}, y)
    placed = [v for v in placed if len(v) == size]
    return Batch(placed[0] if len(placed) == 1 else placed, y)
