"""A stream: a data set divided into burn-in, victim, validation, trusted and test parts."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator

from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.domain import PIXELS, Domain
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.registry import make
from mithridate.core.seeding import derived_seed, generator
from mithridate.data.arrays import Bounds, array_samples, npz_samples
from mithridate.data.augment import crop_and_flip
from mithridate.data.catalogue import DatasetInfo, dataset_info
from mithridate.data.division import pools
from mithridate.data.folder import folder_samples
from mithridate.data.images import load_images
from mithridate.data.part import Loader, Part
from mithridate.data.samples import LONE, Samples
from mithridate.data.settings import ARRAYS, OWN, StreamSettings
from mithridate.data.tables import parquet_samples, saved_samples

__all__ = ["Loader", "Part", "Stream", "StreamSettings", "open_stream"]


@dataclass(frozen=True, eq=False)
class Stream:
    """One data set in parts that share no sample, but for a victim part inside the burn-in part (`overlap`).

    Args:
        settings: How it was divided, resolved: each size is a number of samples.
        info: What models need to know of the samples.
        burn_in: What the model learns from before the stream.
        victim: What it learns from in the stream.
        validation: The attacker's own samples; in no reported accuracy.
        trusted: What the defender knows to be clean.
        test: What accuracy is reported on.
        fingerprint: 16 hex digits that name the burn-in samples, their order and what models are told of them.
        domain: What a valid input is; [0, 1] for images.
    """

    settings: StreamSettings
    info: DatasetInfo
    burn_in: Part
    victim: Part
    validation: Part
    trusted: Part
    test: Part
    fingerprint: str
    domain: Domain = PIXELS

    @classmethod
    def from_arrays(
        cls,
        x: object,
        y: object,
        *,
        x_test: object = None,
        y_test: object = None,
        classes: Sequence[str] | None = None,
        domain: Bounds | None = None,
        name: str = ARRAYS,
        **settings: object,
    ) -> "Stream":
        """A stream of arrays or tensors in memory; they are copied, and checked once.

        Args:
            x: Inputs. Images are bytes, or floats in [0, 1]; rows of floats and of token ids have two dimensions; a
                mapping holds arrays with a row a sample. With a `domain`, floats of any shape that are no images.
            y: Targets: class numbers 0, 1, ..., k - 1; floats; many labels.
            x_test: Inputs of samples for the validation and test parts; unset: they are cut from `x`, too.
            y_test: Targets of those samples.
            classes: Names by class number; unset: the numbers.
            domain: What a valid input is, if it is no image: a `Domain`, its least and largest value, or `observed` for
                those of the data, feature by feature. Unset: [0, 1] of images, any number of other inputs.
            name: What messages call the data.
            settings: Fields of `StreamSettings`: burn_in, victim, validation, trusted, test, batch_size, seed and those
                of augmentation.

        Shape:
            x: images (n, c, h, w), (n, h, w) or, with 1 or 3 channels, (n, h, w, c); rows (n, features). y: (n,) or
            (n, k). Floats become float32, whole numbers int64.

        Raises:
            ConfigError: Unknown settings, or such as do not fit.
            DataError: Arrays are unequal in length, of a type that is not taken, hold NaN or lie outside their domain,
                labels are no class numbers, or there are too few samples.
        """
        if (x_test is None) != (y_test is None):
            raise DataError(f"{name}: x_test and y_test come together; give both, or none.")
        bounds_setting = {} if isinstance(domain, Domain) else {"domain": domain}
        plan = make(StreamSettings, {"name": ARRAYS, **bounds_setting, **settings}, where="Stream.from_arrays")
        bounds = domain if isinstance(domain, Domain) else plan.domain
        splits = {LONE: (x, y)} if x_test is None else {"train": (x, y), "test": (x_test, y_test)}
        return _divided(array_samples(splits, name=name, classes=classes, domain=bounds), plan)

    @property
    def batch_size(self) -> int:
        """Samples in one batch of the victim stream."""
        return cast("int", self.settings.batch_size)

    def require(self, steps: int) -> None:
        """Refuse a run that is longer than the victim stream.

        Args:
            steps: Accumulative batches; the trigger batch comes on top.

        Raises:
            DataError: They do not fit.
        """
        passes = self.settings.passes
        most = passes * (len(self.victim) // self.batch_size)
        if steps + 1 > most:
            what = f"at most {most - 1} fit" if most > 0 else "not even the trigger batch fits"
            over = "" if passes == 1 else f" in each of {passes} passes"
            raise DataError(
                f"{self.info.name}: {steps} accumulative batches and the trigger batch of {self.batch_size} samples "
                f"need {(steps + 1) * self.batch_size}, and the victim part has {len(self.victim)}{over}; {what}. Use "
                "fewer steps, a smaller batch_size, a larger victim part or more passes."
            )

    def victim_batch(self, step: int, seed: int, device: torch.device | str = "cpu") -> AnyBatch:
        """One clean batch of the victim stream; it depends on the arguments alone, so a resumed run sees the same.

        A pass takes as many whole batches as the victim part holds; the next pass begins with the batch after them.

        Args:
            step: Which one, from 0.
            seed: Draws the order of the stream, and the augmentation if `augment_stream`.
            device: Where the batch goes.

        Raises:
            DataError: The stream is shorter.
        """
        self.require(step)
        number, place = divmod(step, len(self.victim) // self.batch_size)
        again = [number] if number and self.settings.reshuffle else []
        order = _victim_order(len(self.victim), seed, *again)
        batch = self.victim.batch(order[place * self.batch_size : (place + 1) * self.batch_size], device)
        if self.settings.augment_stream:
            batch = self.augmented(batch, generator("victim augmentation", seed, step))
        return batch

    def victim_batches(self, steps: int, *, seed: int, device: torch.device | str = "cpu") -> Iterator[AnyBatch]:
        """The batches of the accumulative phase in order: `victim_batch` of 0 to steps - 1.

        Args:
            steps: How many, >= 0.
            seed: Draws the order of the stream, and the augmentation if `augment_stream`.
            device: Where the batches go.

        Raises:
            DataError: The victim part is too short for them and the trigger batch.
        """
        self.require(steps)
        return (self.victim_batch(step, seed, device) for step in range(steps))

    def trigger_batch(self, steps: int, seed: int, device: torch.device | str = "cpu") -> AnyBatch:
        """The batch after the last accumulative one.

        Args:
            steps: Accumulative batches before it.
            seed: Draws the order of the stream, and the augmentation if `augment_stream`.
            device: Where the batch goes.
        """
        return self.victim_batch(steps, seed, device)

    def augmented(self, batch: AnyBatch, rng: Generator) -> AnyBatch:
        """A batch of images randomly cropped, and flipped where their class allows it.

        Args:
            batch: The batch; not changed.
            rng: A generator on the CPU.

        Raises:
            ConfigError: Samples are no images.
        """
        if not self.info.images:
            raise ConfigError(f"{self.info.name} holds no images, which alone are augmented; leave augmentation out.")
        x = crop_and_flip(batch.x, padding=self.info.crop_padding, flip=self.info.flip, rng=rng)
        return Batch(x, batch.y)


def open_stream(
    stream: StreamSettings, *, data_root: str | Path | None = None, cache: str | Path | None = None
) -> Stream:
    """Load a data set and divide it; see `StreamSettings`.

    Args:
        stream: Which samples, in what portions.
        data_root: Folder that mirrors hub repositories, for image sets by name; see `load_images`.
        cache: Folder for decoded images, for image sets by name; see `load_images`.

    Raises:
        ConfigError: Unknown data set, or settings that do not fit what it holds.
        DataError: The data are not to be had, are not what they should be, or are too few.
    """
    return _divided(_samples(stream, data_root, cache), stream)


def _samples(stream: StreamSettings, data_root: str | Path | None, cache: str | Path | None) -> Samples:
    """Everything that the settings lead to."""
    split, name = stream.split, stream.label
    if stream.name == ARRAYS:
        raise ConfigError(
            f"[data] name = '{ARRAYS}': these samples were given to Stream.from_arrays, and are nowhere on disk. Write "
            "them by `np.savez(path, x=x, y=y)`, and use name = 'npz'."
        )
    if stream.name in OWN:
        path = Path(cast("str", stream.path))
        match stream.name:
            case "folder":
                return folder_samples(path, split, name=name)
            case "npz":
                return npz_samples(path, split, name=name, domain=stream.domain)
            case "saved":
                return saved_samples(path, split, stream.columns, name=name)
            case _:
                return parquet_samples(path, split, stream.columns, name=name)
    info = dataset_info(stream.name)
    wanted = list(info.splits) if split is None else [split]
    image_sets = {key: load_images(info.name, key, data_root=data_root, cache=cache) for key in wanted}
    return Samples(info, {key: Part(key, images.x, images.y) for key, images in image_sets.items()})


@lru_cache(maxsize=4)  # a step must not cost as much as the whole victim part
def _victim_order(length: int, *keys: int) -> NDArray[np.int64]:
    order = np.random.default_rng(derived_seed("victim order", *keys)).permutation(length)
    order.flags.writeable = False
    return order


def _divided(samples: Samples, settings: StreamSettings) -> Stream:
    resolved = settings.resolved({split: len(part) for split, part in samples.splits.items()})
    parts: dict[str, Part] = {}
    for split, names in pools(samples.splits).items():
        whole = samples.splits[split]
        order = np.random.default_rng(derived_seed("parts", split, settings.seed)).permutation(len(whole))
        *first, last = (name for name in names if name != "victim" or not settings.overlap)
        start = 0
        for name in first:
            chosen = order[start : start + getattr(resolved, name)]
            parts[name] = whole.take(name, chosen)
            start += len(chosen)
        # The last part is cut from the far end: its samples stay the same when another part grows into unused ones.
        parts[last] = whole.take(last, order[len(order) - getattr(resolved, last) :])
    if settings.overlap:
        before, victim = len(parts["burn_in"]), cast("int", resolved.victim)
        parts["victim"] = parts["burn_in"].take("victim", np.arange(before - victim, before))  # from the far end, too
    resolved, info = _described(resolved, samples.info, parts["burn_in"])
    fingerprint = _fingerprint(parts["burn_in"], info)
    return Stream(settings=resolved, info=info, fingerprint=fingerprint, domain=samples.domain, **parts)


def _described(settings: StreamSettings, info: DatasetInfo, burn_in: Part) -> tuple[StreamSettings, DatasetInfo]:
    """Settings and description of the samples, completed from each other and from the burn-in part."""
    if not info.images:
        for key in ("augment", "augment_stream", "flip", "crop_padding", "mean", "std"):
            if getattr(settings, key):
                raise ConfigError(
                    f"{info.name} holds no images, which alone are cropped, flipped and normalised; leave {key} out."
                )
        return replace(settings, augment=False), info
    known: dict[str, Any] = {"flip": info.flip, "crop_padding": info.crop_padding, "mean": info.mean, "std": info.std}
    stated = {key: getattr(settings, key) for key in known if getattr(settings, key) is not None}
    if not info.mean and not {"mean", "std"} <= stated.keys():
        known |= _measured(burn_in, info.name)
    values = {**known, **stated}
    for key in ("mean", "std"):
        if len(values[key]) != info.shape[0]:
            raise ConfigError(
                f"[data] {key} has {len(values[key])} numbers, and images of {info.name} have {info.shape[0]} "
                "channels; give one a channel."
            )
    if info.mean:  # known by name: settings stay as they were given
        return settings, replace(info, **values)
    return replace(settings, augment=settings.augment is not False, **values), replace(info, **values)


def _measured(part: Part, name: str) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation of each channel, in pixel units of [0, 1]."""
    if not len(part):
        raise DataError(
            f"{name}: no image is left for burn-in, so mean and std cannot be measured; set them in [data], or give "
            "burn_in some."
        )
    unit = 255 if part.x.dtype == np.uint8 else 1
    channels = [part.x[:, channel] for channel in range(part.x.shape[1])]
    mean = [float(pixels.mean(dtype=np.float64)) / unit for pixels in channels]
    std = [float(pixels.std(dtype=np.float64)) / unit for pixels in channels]
    if 0 in std:
        raise DataError(
            f"{name}: channel {std.index(0)} is the same in every pixel of the burn-in part, so its std is 0; set "
            "std, or leave the channel out."
        )
    # Four digits, so that the order of a sum on another machine does not matter
    return {key: tuple(float(f"{v:.4g}") for v in values) for key, values in (("mean", mean), ("std", std))}


def _fingerprint(burn_in: Part, info: DatasetInfo) -> str:
    """A hash of what the data decide of a burn-in: samples in their order, and what models are built from."""
    digest = hashlib.sha256()
    burn_in.hash_into(digest)
    digest.update(json.dumps([info.outputs, info.mean, info.std, info.flip, info.crop_padding]).encode())
    return digest.hexdigest()[:16]
