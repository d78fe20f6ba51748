"""A user's own arrays: images, rows of numbers, token ids, mappings of such; checked once, when they come in."""

import math
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mithridate.core.domain import PIXELS, Domain
from mithridate.core.errors import DataError
from mithridate.data.catalogue import DatasetInfo
from mithridate.data.part import Arrays, Part, each_array
from mithridate.data.samples import LONE, Samples, class_names, wanted_splits

Bounds = Domain | Literal["observed"] | tuple[float, float]
"""What a valid input is: a domain, its two bounds, or the least and largest value of each feature in the data."""

CHANNELS = (1, 3)
"""How many channels images may have where the axis of channels is the last."""


def array_samples(
    splits: Mapping[str, tuple[object, object]],
    *,
    name: str,
    classes: Sequence[str] | None = None,
    domain: Bounds | None = None,
) -> Samples:
    """Check arrays and take them as a data set.

    Args:
        splits: Inputs and targets by split: `train` and `test`, or a lone one. Arrays, tensors, or for inputs a mapping
            of them.
        name: What messages call the data set.
        classes: Names by class number; None: the numbers themselves. Only where targets are class numbers.
        domain: What a valid input is; None: [0, 1] of images, any number of other inputs. With a domain, inputs are no
            images.

    Shape:
        Inputs: images (n, c, h, w), (n, h, w) or (n, h, w, c) with c of 1 or 3, bytes or floats in [0, 1]; rows of
        floats (n, features); token ids (n, length) of whole numbers; with a `domain`, floats (n, ...) of any shape.
        Targets: class numbers (n,) of whole numbers; floats (n,) or (n, k) to regress on; many labels (n, k), bool or
        float; whole numbers (n, ...) for other criteria.

    Raises:
        DataError: Arrays are of unequal length, of a type or shape that is not taken, hold NaN or infinity, lie outside
            their domain, or labels are not 0, 1, ..., k - 1.
    """
    parts: dict[str, Part] = {}
    for split, (x, y) in splits.items():
        where = name if split == LONE else f"{name}, {split}"
        part = Part(split, _inputs(x, where, is_image=domain is None), _targets(y, where))
        _check_lengths(part, where)
        parts[split] = part
    _check_alike(parts, name)
    first, *_ = parts.values()
    y = np.concatenate([part.y for part in parts.values()])
    labels = y.ndim == 1 and y.dtype == np.int64
    if classes is not None and not labels:
        raise DataError(f"{name}: classes are named, and targets are {y.dtype} {y.shape[1:]}, no class numbers.")
    images = isinstance(first.x, np.ndarray) and first.x.ndim == 4 and domain is None
    info = DatasetInfo(
        name=name,
        shape=() if isinstance(first.x, Mapping) else first.x.shape[1:],
        classes=class_names(y, classes, where=f"{name}: labels") if labels else (),
        targets=() if labels else y.shape[1:],
        example=None if images else first.batch(slice(0, 1)).x,
    )
    return Samples(info, parts, PIXELS if images else _domain(domain, parts, name))


def npz_samples(
    path: Path, split: str | None, *, name: str, domain: Literal["observed"] | tuple[float, float] | None
) -> Samples:
    """The arrays of one `.npz` file; nothing in it is unpickled.

    Args:
        path: The file. It holds `x` and `y`, or `x_train` and `y_train`, `x_test` and `y_test`, or one of these pairs;
            for a mapping of inputs, `x.KEY`, `x_train.KEY` and so on; perhaps `classes`, names by class number. Other
            arrays are not looked at.
        split: `train` or `test` alone; None: whatever there is.
        name: What messages call the data set.
        domain: What a valid input is, if it is no image: the least and the largest value of each feature, or `observed`
            for those of the data; None: [0, 1] of images, any number of other inputs.

    Raises:
        ConfigError: There is no such split.
        DataError: It is no such file, holds an array twice, or its arrays are not taken; see `array_samples`.
    """
    arrays, names = _read_npz(path)
    splits: dict[str, tuple[Any, Any]] = {}
    for key, ending in ((LONE, ""), ("train", "_train"), ("test", "_test")):
        mapping = {k.removeprefix(f"x{ending}."): a for k, a in arrays.items() if k.startswith(f"x{ending}.")}
        x, y = arrays.get(f"x{ending}", mapping or None), arrays.get(f"y{ending}")
        if x is not None and y is not None:
            splits[key] = x, y
    if not splits or (LONE in splits and len(splits) > 1):
        raise DataError(
            f"{path} holds the arrays {', '.join(names)[:200] or '(none)'}; it needs x and y, or x_train, y_train, "
            "x_test and y_test, and not both."
        )
    chosen = {key: splits[key] for key in wanted_splits(splits, split, where=path)}
    classes = [str(label) for label in arrays["classes"]] if "classes" in arrays else None
    return array_samples(chosen, name=name, classes=classes, domain=domain)


def _read_npz(path: Path) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """The arrays that may be samples, and the names of all."""
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is not there, or no .npz file; write one by `np.savez(path, x=x, y=y)`.")
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            names = list(file.files)
            for key in names:
                if key in ("y", "classes") or key.startswith(("x", "y_")):
                    arrays[key] = file[key]
    except Exception as error:  # a damaged or hostile archive breaks the reader in many ways
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}: {str(error)[:200]}). Arrays of Python objects are not "
            "read, since unpickling them runs code: store numbers, by `np.savez(path, x=x, y=y)`."
        ) from error
    if twice := sorted(key for key, times in Counter(names).items() if times > 1):
        raise DataError(f"{path} holds {', '.join(twice)[:80]} twice; write it again, with each array once.")
    return arrays, names


def _array(value: object, where: str) -> NDArray[Any]:
    """One array of numbers with a row a sample."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() else value.numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError(f"{where} is no array ({error}); give one with a row a sample, all of one length.") from error
    if array.dtype.kind == "O":
        raise DataError(
            f"{where} holds Python objects (dtype object), such as lists of different length; give an array of numbers."
        )
    if array.dtype.kind not in "biuf":
        raise DataError(
            f"{where} is of dtype {array.dtype}; give numbers. Names of classes become class numbers by `names, y = "
            "np.unique(y, return_inverse=True)`."
        )
    if array.ndim == 0 or len(array) == 0:
        raise DataError(f"{where} has no samples; give an array with a row a sample.")
    return array


def _finite(array: NDArray[Any], where: str) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        floats = array.astype(np.float32)
    bad = ~np.asarray(np.isfinite(floats.reshape(len(floats), -1)).all(1))
    if bad.any():
        raise DataError(
            f"{where}: {int(bad.sum())} of {len(bad)} rows hold NaN, infinity or numbers too large; drop them."
        )
    return floats


def _targets(y: object, where: str) -> NDArray[Any]:
    array = _array(y, f"{where}: y")
    if array.dtype.kind == "f" or (array.dtype.kind == "b" and array.ndim > 1):
        return _finite(array, f"{where}: y")
    if array.ndim == 2 and array.shape[1] == 1:
        raise DataError(f"{where}: y is of shape {array.shape}; class numbers are of shape (n,): give `y[:, 0]`.")
    return array.astype(np.int64)


def _inputs(x: object, where: str, *, is_image: bool) -> Arrays:
    if isinstance(x, Mapping):
        if not x:
            raise DataError(f"{where}: x is a mapping of nothing; give it arrays.")
        return {str(key): _part_of_mapping(part, f"{where}: x['{key}']") for key, part in x.items()}
    array, what = _array(x, f"{where}: x"), f"{where}: x"
    kind, shape = array.dtype.kind, array.shape
    if not is_image and kind == "f":
        return _finite(array, what)
    if is_image and len(shape) in (3, 4) and (kind == "f" or array.dtype == np.uint8):
        return _pixels(array, what)
    if is_image and len(shape) == 2 and kind == "f":
        return _finite(array, what)
    if len(shape) == 2 and kind in "iu" and array.dtype != np.uint8:
        return array.astype(np.int64)
    raise DataError(
        f"{what} is {array.dtype} of shape {shape}. Taken are images, bytes or floats in [0, 1], as (n, c, h, w) or "
        "(n, h, w); rows of floats as (n, features); token ids, whole numbers but no bytes, as (n, length); floats of "
        "any other shape if you give their `domain`, which bytes have not."
    )


def _part_of_mapping(value: object, where: str) -> NDArray[Any]:
    array = _array(value, where)
    if array.dtype.kind == "f":
        return _finite(array, where)
    return array if array.dtype.kind == "b" else array.astype(np.int64)


def _pixels(array: NDArray[Any], where: str) -> NDArray[Any]:
    """Images as (n, channels, height, width), bytes or floats in [0, 1]."""
    if array.ndim == 3:
        array = array[:, None]
    elif array.shape[3] in CHANNELS and array.shape[1] not in CHANNELS:
        array = array.transpose(0, 3, 1, 2)
    elif array.shape[1] not in CHANNELS and array.shape[1] > min(array.shape[2:]):
        n, channels, height, width = array.shape
        raise DataError(
            f"{where} is of shape {array.shape}, which reads as {n} images of {channels} channels and {height}x{width} "
            "pixels. If channels come last, turn them: `x.transpose(0, 3, 1, 2)`; if it is no image, give its `domain`."
        )
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    floats = _finite(array, where)
    outside = int(((floats < 0) | (floats > 1)).any((1, 2, 3)).sum())
    if outside:
        raise DataError(
            f"{where} is read as images, and {outside} of {len(floats)} have pixels outside [0, 1] (they span "
            f"[{floats.min():g}, {floats.max():g}]). Scale them, without mean and std, which models see to; or give "
            "their `domain` if they are no images."
        )
    return np.ascontiguousarray(floats)


def _check_lengths(part: Part, where: str) -> None:
    arrays = {f"x['{key}']": a for key, a in part.x.items()} if isinstance(part.x, Mapping) else {"x": part.x}
    lengths = {key: len(array) for key, array in {**arrays, "y": part.y}.items()}
    if len(set(lengths.values())) > 1:
        listing = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise DataError(f"{where}: {listing} rows; give as many of each, in the same order.")


def _check_alike(parts: Mapping[str, Part], name: str) -> None:
    """Refuse splits that hold different kinds of samples."""
    kinds = {
        split: (each_array(part.x, lambda a: (a.dtype.name, a.shape[1:])), (part.y.dtype.name, part.y.shape[1:]))
        for split, part in parts.items()
    }
    first, *others = kinds.values()
    if any(other != first for other in others):
        listing = "; ".join(f"{split}: x {x}, y {y}" for split, (x, y) in kinds.items())
        raise DataError(f"{name}: the splits differ in dtype or shape ({listing}); make them alike.")


def _domain(bounds: Bounds | None, parts: Mapping[str, Part], name: str) -> Domain:
    """The domain of inputs that are no images; every sample lies in it."""
    arrays = [part.x for part in parts.values()]
    if bounds is None:
        return Domain()
    if not all(isinstance(x, np.ndarray) and x.dtype == np.float32 for x in arrays):
        raise DataError(f"{name}: a domain bounds one array of floats, and x is none; leave `domain` out.")
    if bounds == "observed":
        low, high = (torch.from_numpy(best([best(x, axis=0) for x in arrays], axis=0)) for best in (np.min, np.max))
        return Domain(low, high)
    domain = Domain(*bounds)
    for bound in domain:
        shape = tuple(torch.as_tensor(bound).shape)
        if shape not in ((), arrays[0].shape[1:]):
            raise DataError(f"{name}: a bound of the domain has the shape {shape}, and a sample {arrays[0].shape[1:]}.")
    outside = sum(int((~_inside(domain, x)).sum()) for x in arrays)
    if outside:
        span = f"[{min(x.min() for x in arrays):g}, {max(x.max() for x in arrays):g}]"
        raise DataError(f"{name}: {outside} rows of x lie outside the domain (x spans {span}); widen it or scale x.")
    return domain


def _inside(domain: Domain, x: NDArray[Any]) -> NDArray[np.bool_]:
    low, high = (np.asarray(torch.as_tensor(bound), dtype=np.float32) for bound in domain)
    return np.asarray(((x >= low) & (x <= high)).reshape(len(x), math.prod(x.shape[1:])).all(1))
