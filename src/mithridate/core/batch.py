"""What flows: a batch of samples with their targets."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, cast, overload

import torch
from torch import Tensor
from typing_extensions import TypeVar

from mithridate.core.errors import DataError

Inputs = Tensor | Mapping[str, Tensor] | Sequence[Tensor]
"""What a model takes: a tensor, or a mapping (keyword arguments) or sequence (positional ones) of tensors; the first
dimension of each counts the samples."""

T = TypeVar("T")
X_co = TypeVar("X_co", bound=Inputs, default=Tensor, covariant=True)


class Batch(NamedTuple, Generic[X_co]):
    """What a stream or a loop yields.

    Args:
        x: Inputs.
        y: Targets, whatever the criterion takes.

    Shape:
        x (n, ...): images (n, channels, height, width), tabular (n, features), or a mapping or sequence of tensors of n
        rows each. y (n, ...).
    """

    x: X_co
    y: Tensor

    @property
    def size(self) -> int:
        """How many samples."""
        return len(self.y)

    def to(self, device: torch.device | str) -> "Batch[X_co]":
        """The same batch on another device; tensors of inference mode are copied, since autograd takes none of them."""

        def moved(t: Tensor) -> Tensor:
            return t.to(device).clone() if t.is_inference() else t.to(device)

        return self.each(moved)

    def with_class_numbers(self) -> "Batch[X_co]":
        """The same batch, whose targets are int64 where they are whole numbers of any type, as losses take classes."""
        kind = self.y.dtype
        other = kind.is_floating_point or kind.is_complex or kind in {torch.bool, torch.int64}
        return self if other else Batch(self.x, self.y.long())

    def take(self, which: Tensor | slice) -> "Batch[X_co]":
        """Some of the samples, by position, slice or (n,) bool."""

        def chosen(t: Tensor) -> Tensor:
            return t[which.to(t.device) if isinstance(which, Tensor) else which]

        return self.each(chosen)

    def clone(self) -> "Batch[X_co]":
        """A copy that shares no memory."""
        return self.each(Tensor.clone)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch[X_co]":
        """The same batch with every tensor changed, inputs and targets."""
        x: Inputs = self.x
        return Batch(cast("X_co", each_tensor(x, change)), change(self.y))

    def split(self, size: int) -> "Iterator[Batch[X_co]]":
        """Pieces of `size` samples; the last may be smaller."""
        for start in range(0, self.size, size):
            yield self.take(slice(start, start + size))

    def finite(self) -> Tensor:
        """(n,) bool, on the CPU: the samples whose inputs and targets are free of NaN and infinity."""
        good = torch.ones(self.size, dtype=torch.bool)
        for t in [*tensors_of(self.x), self.y]:
            if t.is_floating_point():
                good &= torch.isfinite(t).flatten(1).all(1).cpu() if t.ndim > 1 else torch.isfinite(t).cpu()
        return good


AnyBatch = Batch[Any]
"""A batch of inputs of any kind."""


def tensors_of(x: Inputs) -> list[Tensor]:
    """The tensors that inputs are made of."""
    if isinstance(x, Tensor):
        return [x]
    return list(x.values() if isinstance(x, Mapping) else x)


@overload
def each_tensor(x: Tensor, change: Callable[[Tensor], T]) -> T: ...
@overload
def each_tensor(x: Mapping[str, Tensor], change: Callable[[Tensor], T]) -> dict[str, T]: ...
@overload
def each_tensor(x: Sequence[Tensor], change: Callable[[Tensor], T]) -> list[T]: ...
def each_tensor(x: Inputs, change: Callable[[Tensor], T]) -> T | dict[str, T] | list[T]:
    """What becomes of each tensor of inputs; several stay a mapping, or a list."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, Mapping):
        return {key: change(t) for key, t in x.items()}
    return [change(t) for t in x]


def check_batch(batch: AnyBatch, *, where: str = "batch") -> None:
    """Refuse what is no batch: at least one sample, and as many rows in every tensor as there are targets.

    Args:
        batch: What to check; its values are not looked at.
        where: Named in the message.

    Raises:
        DataError: No tensors, a tensor without rows, one that is sparse, complex or without values, or lengths that
            differ.
    """
    if not isinstance(batch, Batch):
        raise DataError(f"{where} is a {type(batch).__name__}; give a Batch(inputs, targets).")
    x, y = batch
    if not isinstance(x, Tensor | Mapping | Sequence) or isinstance(x, str):
        raise DataError(
            f"{where}: inputs are a {type(x).__name__}; give a tensor, or a mapping or sequence of tensors."
        )
    if isinstance(x, Tensor):
        named: dict[Any, Any] = {"inputs": x}
    else:
        named = dict(x) if isinstance(x, Mapping) else {f"inputs[{i}]": t for i, t in enumerate(x)}
    for name, t in {**named, "targets": y}.items():
        if not isinstance(t, Tensor) or t.ndim == 0:
            raise DataError(f"{where}: '{name}' is {_kind(t)}; it must be a tensor with one row a sample.")
        if t.layout is not torch.strided or t.is_meta or t.is_complex():
            what = "complex" if t.is_complex() else "on the device 'meta'" if t.is_meta else f"of layout {t.layout}"
            raise DataError(f"{where}: '{name}' is {what}; give a dense tensor of real numbers, with its values.")
    lengths = {str(name): len(t) for name, t in named.items()}
    if not lengths or len(y) == 0 or set(lengths.values()) != {len(y)}:
        counts = ", ".join(f"{length} in '{name}'" for name, length in lengths.items()) or "no inputs"
        raise DataError(f"{where}: {counts} and {len(y)} targets; a batch needs as many of each, at least one.")


def _kind(value: object) -> str:
    return "a single number" if isinstance(value, Tensor) else f"a {type(value).__name__}"
