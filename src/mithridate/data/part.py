"""Some samples of a stream, and batches of them."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from mithridate.core.batch import AnyBatch, Batch

T = TypeVar("T")

Arrays = NDArray[Any] | Mapping[str, NDArray[Any]]
"""Inputs: an array, or a mapping of arrays."""


@dataclass(frozen=True, eq=False)
class Part:
    """Some samples of a stream, kept as arrays.

    Args:
        name: Which part.
        x: Inputs: an array, or a mapping of arrays. Bytes are pixels, and batches of them are float32 in [0, 1]; all
            other arrays keep their dtype in batches.
        y: Targets; whole numbers of any type are int64 in batches.

    Shape:
        x (n, channels, height, width), (n, ...), or a mapping of arrays of n rows each; y (n, ...).
    """

    name: str
    x: Any
    y: NDArray[Any]

    def __len__(self) -> int:
        return len(self.y)

    def take(self, name: str, index: NDArray[np.int64]) -> "Part":
        """A new part of some of the samples, read-only.

        Args:
            name: What it is called.
            index: Positions of the samples, in the wanted order.
        """

        def chosen(array: NDArray[Any]) -> NDArray[Any]:
            rows = array[index]
            rows.flags.writeable = False
            return rows

        return Part(name, each_array(self.x, chosen), chosen(self.y))

    def hash_into(self, digest: "hashlib._Hash") -> None:
        """Add all samples in their order to a hash, the same on every machine.

        Args:
            digest: Of `hashlib`.
        """
        arrays = self.x if isinstance(self.x, Mapping) else {"": self.x}
        for name, array in [*arrays.items(), ("targets", self.y)]:
            digest.update(json.dumps([name, array.dtype.name, array.shape]).encode())
            digest.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).data)

    def batch(self, index: slice | NDArray[np.int64], device: torch.device | str = "cpu") -> AnyBatch:
        """Some samples in the given order.

        Args:
            index: Positions of the samples in this part.
            device: Where the batch goes.
        """

        def tensor(array: NDArray[Any]) -> Tensor:
            chosen = array[index]
            if chosen.dtype == np.uint8:
                return torch.from_numpy(chosen.astype(np.float32) / np.float32(255))
            return torch.from_numpy(chosen.copy())

        batch: AnyBatch = Batch(each_array(self.x, tensor), torch.from_numpy(self.y[index].copy()))
        return batch.with_class_numbers().to(device)

    def all(self, device: torch.device | str = "cpu") -> AnyBatch:
        """Every sample, in the order of the part."""
        return self.batch(slice(None), device)

    def batches(
        self,
        batch_size: int,
        *,
        rng: Generator | None = None,
        drop_last: bool = False,
        device: torch.device | str = "cpu",
    ) -> Iterator[AnyBatch]:
        """Every sample once.

        Args:
            batch_size: Samples a batch, >= 1; the last may be smaller.
            rng: Draws a new order; None keeps that of the part.
            drop_last: Leave out a last batch that is smaller (BatchNorm cannot train on a single value).
            device: Where the batches go.
        """
        order = np.arange(len(self)) if rng is None else torch.randperm(len(self), generator=rng).numpy()
        end = len(self) // batch_size * batch_size if drop_last else len(self)
        for start in range(0, end, batch_size):
            yield self.batch(order[start : min(start + batch_size, end)], device)


@dataclass(frozen=True, eq=False)
class Loader:
    """A part as batches that can be iterated again and again.

    Args:
        part: Whose samples.
        batch_size: Samples a batch, >= 1; the last may be smaller.
        device: Where the batches go.
    """

    part: Part
    batch_size: int
    device: torch.device | str = "cpu"

    def __iter__(self) -> Iterator[AnyBatch]:
        return self.part.batches(self.batch_size, device=self.device)


@overload
def each_array(x: NDArray[Any], change: Callable[[NDArray[Any]], T]) -> T: ...
@overload
def each_array(x: Mapping[str, NDArray[Any]], change: Callable[[NDArray[Any]], T]) -> dict[str, T]: ...
def each_array(x: Arrays, change: Callable[[NDArray[Any]], T]) -> T | dict[str, T]:
    """What becomes of each array of inputs; several stay a mapping."""
    return {key: change(array) for key, array in x.items()} if isinstance(x, Mapping) else change(x)
