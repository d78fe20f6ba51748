"""Named image sets as arrays of bytes, decoded once and checked on the way."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from mithridate.core.errors import ConfigError, DataError, WriteError, nearest, shown
from mithridate.core.files import CACHE, cache_directory, path_of, remove_parts, write_atomically
from mithridate.data.catalogue import NamedSet, dataset_info
from mithridate.data.decode import Frame, decode_images
from mithridate.data.sources import Rows, encoded, hub_rows, mirror_files, parquet_rows

DATA_ROOT = "MITHRIDATE_DATA"
"""Environment variable: a folder that mirrors hub repositories; without it, data come from the hub."""

CACHE_FORMAT = 2
"""Raised when decoding changes, so that older cache files are not used."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One split of an image set.

    Args:
        name: The image set.
        split: Which split.
        x: Pixels, uint8, read-only.
        y: Class numbers, int64, read-only.
        info: What is known of the image set.
        fingerprint: 16 hex digits of a SHA-256 over name, split and content.

    Shape:
        x (n, channels, height, width); y (n,).
    """

    name: str
    split: str
    x: NDArray[np.uint8]
    y: NDArray[np.int64]
    info: NamedSet
    fingerprint: str

    def __len__(self) -> int:
        return len(self.y)


def load_images(
    name: str, split: str, *, data_root: str | Path | None = None, cache: str | Path | None = None
) -> ImageSet:
    """One split of a named image set.

    The first call decodes the images and keeps them in the cache; later calls read them from there, and decode again if
    the source files have changed or the cache file is damaged.

    Args:
        name: One of `DATASETS`.
        split: One of its splits.
        data_root: Folder that mirrors hub repositories; by default the environment's `MITHRIDATE_DATA`, and without
            that the hub. A split that a given folder lacks is an error: the hub is then not asked.
        cache: Folder for decoded images; by default the environment's `MITHRIDATE_CACHE`, else the user's cache.

    Raises:
        ConfigError: Unknown data set or split.
        DataError: The split is not to be had, an image or label is not as expected, or the cache cannot be written.
    """
    info = dataset_info(name)
    if split not in info.splits:
        raise ConfigError(f"{name} has no split '{split}': {nearest(split, info.splits)}")
    if not info.hub_id:
        return _image_set(info, split, *_embedded_digits())
    named = data_root or os.environ.get(DATA_ROOT)
    root = path_of(named) if named else None
    files = mirror_files(info, split, root) if root is not None else []
    path = cache_directory(cache) / "images"
    path /= f"{name}-{split}-{_source_key(info, split, files)}.safetensors"
    images = _read_cached(path, info, split)
    if images is not None:
        return images
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_suffix(".lock")):
            remove_parts(path.parent, of=path.name)
            images = _read_cached(path, info, split)
            if images is None:
                columns = (info.image_column, info.label_column)
                rows = parquet_rows(files, columns, whose=name) if root is not None else hub_rows(info, split)
                images = _image_set(info, split, *_decode(rows, info, split))
                _write_cached(path, images)
    except (OSError, WriteError) as error:
        raise DataError(
            f"{name}: the decoded images cannot be kept in {path.parent} ({error}); set {CACHE} to a folder that can "
            "be written to and has room."
        ) from error
    return images


def _embedded_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The digits of scikit-learn; their 17 levels of grey, 0 to 16, are spread over 0 to 255."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return np.rint(loaded.images[:, None] * (255 / 16)).astype(np.uint8), loaded.target.astype(np.int64)


def _image_set(info: NamedSet, split: str, x: NDArray[np.uint8], y: NDArray[np.int64]) -> ImageSet:
    digest = hashlib.sha256(json.dumps([info.name, split, x.shape]).encode())
    digest.update(np.ascontiguousarray(x).data)
    digest.update(np.ascontiguousarray(y, dtype="<i8").data)
    x.flags.writeable = False
    y.flags.writeable = False
    return ImageSet(info.name, split, x, y, info, digest.hexdigest()[:16])


def _source_key(info: NamedSet, split: str, files: Iterable[Path]) -> str:
    """16 hex digits that change whenever the source files do."""
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    source: object = states or [info.hub_id, info.hub_config]
    text = json.dumps([CACHE_FORMAT, info.name, split, info.image_column, info.label_column, source])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write_cached(path: Path, images: ImageSet) -> None:
    arrays: dict[str, NDArray[Any]] = {"x": images.x, "y": images.y}
    notes = {"name": images.name, "split": images.split, "fingerprint": images.fingerprint}
    write_atomically(path, lambda part: part.write_bytes(safetensors.numpy.save(arrays, metadata=notes)))


def _read_cached(path: Path, info: NamedSet, split: str) -> ImageSet | None:
    """What the cache file holds, or None if there is none or its content is not what was written."""
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="np") as file:
            notes = file.metadata() or {}
            x, y = np.array(file.get_tensor("x")), np.array(file.get_tensor("y"))
    except (OSError, safetensors.SafetensorError):
        return None
    images = _image_set(info, split, x, y)
    return images if images.fingerprint == notes.get("fingerprint") else None


def _decode(pieces: Iterable[Rows], info: NamedSet, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    y: list[int] = []

    def images() -> Iterator[tuple[str, bytes]]:
        for piece in pieces:
            for where, image, label in piece.each(info.name):
                y.append(_label(label, info, where))
                yield where, encoded(image, where)

    channels, height, width = info.shape
    x = decode_images(images(), frame=Frame("L" if channels == 1 else "RGB", height, width), whose=info.name)
    if not y:
        raise DataError(f"{info.name}: the split '{split}' has no rows; fetch it again.")
    return x, np.array(y, dtype=np.int64)


def _label(label: object, info: NamedSet, where: str) -> int:
    if not isinstance(label, int) or not 0 <= label < len(info.classes):
        raise DataError(
            f"{where} has the label {shown(label)} (column '{info.label_column}'); {info.name} has the class numbers 0 "
            f"to {len(info.classes) - 1}."
        )
    return label
