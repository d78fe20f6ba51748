"""A whole data set, before it is divided into the parts of a stream."""

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mithridate.core.domain import PIXELS, Domain
from mithridate.core.errors import ConfigError, DataError, nearest
from mithridate.data.catalogue import DatasetInfo
from mithridate.data.decode import decode_images
from mithridate.data.part import Part

Row = tuple[str, Path | bytes, int]
"""What messages call an image, its file or encoded content, and its class number."""

LONE = "all"
"""The name of the only split of data that have no train and test split."""


@dataclass(frozen=True, eq=False)
class Samples:
    """All samples of a data set.

    Args:
        info: What models need to know of them.
        splits: The samples by split: `train` and `test`, or a lone one.
        domain: What a valid input is.
    """

    info: DatasetInfo
    splits: Mapping[str, Part]
    domain: Domain = PIXELS


def wanted_splits(available: Collection[str], split: str | None, *, where: str | Path) -> list[str]:
    """The splits that a stream is cut from.

    Args:
        available: The splits that the data have.
        split: The split that the user wants; None: train and test, or the only one.
        where: Named in messages.

    Raises:
        ConfigError: The split is not there, or it is not clear which are meant.
    """
    if split is not None:
        if split not in available:
            raise ConfigError(f"{where} has no split '{split}': {nearest(split, available)}")
        return [split]
    if {"train", "test"} <= set(available):
        return ["train", "test"]
    if len(available) == 1:
        return list(available)
    raise ConfigError(
        f"{where} has the splits {', '.join(sorted(available))}, and a stream is cut from train and test, or from one "
        "split alone; name that by `split`."
    )


def image_samples(name: str, rows: Mapping[str, Iterable[Row]], classes: Sequence[str] | None) -> Samples:
    """Decode the images of a data set.

    Args:
        name: What messages call it.
        rows: Images with their class numbers, by split.
        classes: Names by class number; None: the numbers themselves.

    Raises:
        DataError: An image is unreadable or unlike the others, labels are no class numbers, or there is too little.
    """
    labels: dict[str, list[int]] = {split: [] for split in rows}

    def images() -> Iterator[tuple[str, Path | bytes]]:
        for split, inside in rows.items():
            for where, image, label in inside:
                labels[split].append(label)
                yield where, image

    x = decode_images(images())
    if len(x) < 2:
        few = "one image" if len(x) else "no image"
        raise DataError(f"{name} has {few}; a stream is divided into parts that share none, so give it more.")
    y = np.array([label for split in labels.values() for label in split], dtype=np.int64)
    info = DatasetInfo(name=name, shape=x.shape[1:], classes=class_names(y, classes, where=f"{name}: labels"))
    splits, start = {}, 0
    for split, of_split in labels.items():
        end = start + len(of_split)
        splits[split] = Part(split, x[start:end], y[start:end])
        start = end
    return Samples(info, splits)


def class_names(y: NDArray[np.int64], classes: Sequence[str] | None, *, where: str) -> tuple[str, ...]:
    """Names by class number, for labels that must be class numbers.

    Args:
        y: Labels (n,); at least one.
        classes: Names that the user gave; None: the numbers, and each must be there.
        where: Named in messages.

    Raises:
        DataError: Labels are not 0, 1, ..., k - 1, names are too few or not unique, or there is but one class.
    """
    low, high = int(y.min()), int(y.max())
    if classes is not None:
        names = tuple(map(str, classes))
        if len(set(names)) < len(names):
            raise DataError(f"{where}: two classes have one name ({', '.join(names)}); give each its own.")
        if low < 0 or high >= len(names):
            raise DataError(
                f"{where} span [{low}, {high}], and {len(names)} class names make the numbers 0 to {len(names) - 1}; "
                "name every class, or mend the labels."
            )
    else:
        present = np.unique(y)
        if low != 0 or len(present) != high + 1:
            known = set(present.tolist())
            absent = (str(number) for number in range(high + 1) if number not in known)
            missing = list(itertools.islice(absent, 5))
            lack = f"; of 0 to {high} there is no {', '.join(missing)}" if missing else ""
            raise DataError(
                f"{where} span [{low}, {high}]{lack}. Class numbers must be 0, 1, ..., k - 1: map them by "
                "`names, y = np.unique(y, return_inverse=True)`, or name all classes if some have no sample here."
            )
        names = tuple(map(str, range(high + 1)))
    if len(names) < 2:
        raise DataError(f"{where} have one class alone ({names[0]}); a classifier needs two or more.")
    return names
