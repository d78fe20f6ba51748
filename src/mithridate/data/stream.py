"""A stream: one image set divided into burn-in, victim, validation, trusted and test parts that share no image."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Generator

from mithridate.core.batch import PIXELS, Batch, Domain
from mithridate.core.errors import DataError
from mithridate.core.registry import settings
from mithridate.core.seeding import derived_seed, generator
from mithridate.data.augment import crop_and_flip
from mithridate.data.catalogue import DatasetInfo, dataset_info
from mithridate.data.images import ImageSet, load_images

_TRAINING = ("victim", "trusted", "burn_in")
_HELD_OUT = ("validation", "test")


@settings
class StreamSettings:
    """Which images a run sees, and in what portions. A size of None is chosen by data set, as stated.

    Args:
        name: The image set; one of `DATASETS`.
        burn_in: Images to learn from before the stream, >= 0. None: 700 for digits; else all that the victim and
            trusted parts leave of the training split.
        victim: Images of the victim stream, >= 1: the accumulative batches and the trigger batch. None: 550 for
            digits, else 10,000 of the training split.
        validation: The attacker's own images S_val, >= 0. None: 100 for digits, else 500 of the test split.
        trusted: Images that the defender knows to be clean, >= 0. None: 97 for digits, else 500 of the training split.
        test: Images on which accuracy is reported, >= 1. None: the rest of the test split (350 of digits).
        batch_size: Images in one batch of the stream, >= 1. None: 50 for digits, else 100.
        augment: Whether burn-in batches are randomly cropped and, where a mirrored image keeps its class, flipped.
        augment_stream: Whether the victim's batches are, too, before anyone poisons them.
        seed: Decides which image goes to which part.
    """

    name: str = "digits"
    burn_in: Annotated[int, Field(ge=0)] | None = None
    victim: Annotated[int, Field(ge=1)] | None = None
    validation: Annotated[int, Field(ge=0)] | None = None
    trusted: Annotated[int, Field(ge=0)] | None = None
    test: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None
    augment: bool = True
    augment_stream: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        dataset_info(self.name)

    def resolved(self, rows: Mapping[str, int] | None = None) -> "StreamSettings":
        """The same settings with a number in place of every None.

        Args:
            rows: Images that each split really holds; by default as many as the full set.

        Raises:
            DataError: The parts need more images than there are.
        """
        info = dataset_info(self.name)
        rows = info.splits if rows is None else rows
        sizes = {part: getattr(self, part) for part in _TRAINING + _HELD_OUT}
        for part in ("burn_in", "victim", "validation", "trusted"):
            if sizes[part] is None:
                sizes[part] = getattr(info.sizes, part)
        for split, parts in _pools(info).items():
            taken = sum(sizes[part] or 0 for part in parts)
            for part in parts:
                if sizes[part] is None:
                    sizes[part] = rows[split] - taken
            wanted = ", ".join(f"{part} {sizes[part]}" for part in parts)
            if any(sizes[part] < 0 for part in parts) or sum(sizes[part] for part in parts) > rows[split]:
                raise DataError(
                    f"{self.name}: the split '{split}' has {rows[split]} images, too few for {wanted}; ask for fewer."
                )
            if "test" in parts and sizes["test"] == 0:
                raise DataError(
                    f"{self.name}: no image of the split '{split}' is left to test on ({wanted}); ask for fewer."
                )
        return replace(self, **sizes, batch_size=self.batch_size or info.sizes.batch_size)


def _pools(info: DatasetInfo) -> dict[str, tuple[str, ...]]:
    """The parts that are cut from each split."""
    if len(info.splits) == 1:
        return dict.fromkeys(info.splits, _TRAINING[:-1] + _HELD_OUT + _TRAINING[-1:])
    return {"train": _TRAINING, "test": _HELD_OUT}


@dataclass(frozen=True, eq=False)
class Part:
    """Some images of a stream, kept as bytes; batches of them are float32 in [0, 1].

    Args:
        name: Which part.
        x: Pixels, uint8.
        y: Class numbers, int64.

    Shape:
        x (n, channels, height, width); y (n,).
    """

    name: str
    x: NDArray[np.uint8]
    y: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, index: slice | NDArray[np.int64], device: torch.device | str = "cpu") -> Batch:
        """Some images in the given order.

        Args:
            index: Which ones, by position in this part.
            device: Where the batch goes.
        """
        x = torch.from_numpy(self.x[index].astype(np.float32) / np.float32(255))
        return Batch(x, torch.from_numpy(self.y[index].copy())).to(device)

    def all(self, device: torch.device | str = "cpu") -> Batch:
        """Every image, in the order of the part."""
        return self.batch(slice(None), device)

    def batches(
        self,
        batch_size: int,
        *,
        rng: Generator | None = None,
        drop_last: bool = False,
        device: torch.device | str = "cpu",
    ) -> Iterator[Batch]:
        """Every image once.

        Args:
            batch_size: Images a batch, >= 1; the last may be smaller.
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
    """A part as batches that can be gone through again and again.

    Args:
        part: Whose images.
        batch_size: Images a batch, >= 1; the last may be smaller.
        device: Where the batches go.
    """

    part: Part
    batch_size: int
    device: torch.device | str = "cpu"

    def __iter__(self) -> Iterator[Batch]:
        return self.part.batches(self.batch_size, device=self.device)


@dataclass(frozen=True, eq=False)
class Stream:
    """One image set in parts that share no image.

    Args:
        settings: How it was divided, resolved: no field is None.
        info: What is known of the image set.
        burn_in: What the model learns from before the stream.
        victim: What it learns from in the stream.
        validation: The attacker's own images; in no reported accuracy.
        trusted: What the defender knows to be clean.
        test: What accuracy is reported on.
        fingerprint: 16 hex digits that name the burn-in images and their order.
    """

    settings: StreamSettings
    info: DatasetInfo
    burn_in: Part
    victim: Part
    validation: Part
    trusted: Part
    test: Part
    fingerprint: str

    @property
    def domain(self) -> Domain:
        """What a valid input is: pixels in [0, 1]."""
        return PIXELS

    @property
    def batch_size(self) -> int:
        """Images in one batch of the victim stream."""
        return cast("int", self.settings.batch_size)

    def require(self, steps: int) -> None:
        """Refuse a run that is longer than the victim stream.

        Args:
            steps: Accumulative batches; the trigger batch comes on top.

        Raises:
            DataError: They do not fit.
        """
        if (steps + 1) * self.batch_size > len(self.victim):
            fit = len(self.victim) // self.batch_size - 1
            what = f"at most {fit} fit" if fit >= 0 else "not even the trigger batch fits"
            raise DataError(
                f"{self.info.name}: {steps} accumulative batches and the trigger batch of {self.batch_size} images "
                f"need {(steps + 1) * self.batch_size}, and the victim part has {len(self.victim)}; {what}. Use fewer "
                "steps, a smaller batch_size or a larger victim part."
            )

    def victim_batch(self, step: int, seed: int, device: torch.device | str = "cpu") -> Batch:
        """One clean batch of the victim stream; it depends on the arguments alone, so a resumed run sees the same.

        Args:
            step: Which one, from 0.
            seed: Draws the order of the stream, and the augmentation if `augment_stream`.
            device: Where the batch goes.

        Raises:
            DataError: The stream is shorter.
        """
        self.require(step)
        order = np.random.default_rng(derived_seed("victim order", seed)).permutation(len(self.victim))
        batch = self.victim.batch(order[step * self.batch_size : (step + 1) * self.batch_size], device)
        if self.settings.augment_stream:
            batch = self.augmented(batch, generator("victim augmentation", seed, step))
        return batch

    def victim_batches(self, steps: int, *, seed: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """The batches of the accumulative phase in order: `victim_batch` of 0 to steps - 1."""
        self.require(steps)
        return (self.victim_batch(step, seed, device) for step in range(steps))

    def trigger_batch(self, steps: int, seed: int, device: torch.device | str = "cpu") -> Batch:
        """The batch after the last accumulative one.

        Args:
            steps: Accumulative batches before it.
            seed: As in `victim_batch`.
            device: Where the batch goes.
        """
        return self.victim_batch(steps, seed, device)

    def augmented(self, batch: Batch, rng: Generator) -> Batch:
        """A batch randomly cropped, and flipped where this image set allows it.

        Args:
            batch: The batch; not changed.
            rng: A generator on the CPU.
        """
        x = crop_and_flip(batch.x, padding=self.info.crop_padding, flip=self.info.flip, rng=rng)
        return Batch(x, batch.y)


def open_stream(stream: StreamSettings, *, data_root: Path | None = None, cache: Path | None = None) -> Stream:
    """Load an image set and divide it.

    Sets with a train and a test split give burn-in, victim and trusted images from the first, validation and test
    images from the second; a set with one split gives all parts from it.

    Args:
        stream: Which images, in what portions.
        data_root: As in `load_images`.
        cache: As in `load_images`.

    Raises:
        ConfigError: Unknown data set.
        DataError: The data are not to be had, or are too few.
    """
    info = dataset_info(stream.name)
    pools = _pools(info)
    held = {split: load_images(info.name, split, data_root=data_root, cache=cache) for split in pools}
    resolved = stream.resolved({split: len(images) for split, images in held.items()})
    parts: dict[str, Part] = {}
    fingerprint = ""
    for split, names in pools.items():
        order = np.random.default_rng(derived_seed("parts", split, stream.seed)).permutation(len(held[split]))
        *first, last = names
        start = 0
        chosen: dict[str, NDArray[np.int64]] = {}
        for name in first:
            chosen[name] = order[start : start + getattr(resolved, name)]
            start += len(chosen[name])
        # The last part is cut from the far end: its images stay the same when another part grows into unused ones.
        chosen[last] = order[len(order) - getattr(resolved, last) :]
        for name, index in chosen.items():
            parts[name] = _part(name, held[split], index)
        if "burn_in" in chosen:
            fingerprint = _fingerprint(held[split], chosen["burn_in"])
    return Stream(settings=resolved, info=info, fingerprint=fingerprint, **parts)


def _part(name: str, images: ImageSet, index: NDArray[np.int64]) -> Part:
    x, y = images.x[index], images.y[index]
    x.flags.writeable = False
    y.flags.writeable = False
    return Part(name, x, y)


def _fingerprint(images: ImageSet, index: NDArray[np.int64]) -> str:
    digest = hashlib.sha256(images.fingerprint.encode())
    digest.update(np.ascontiguousarray(index, dtype="<i8").data)
    return digest.hexdigest()[:16]
