"""Images of another set, fitted to a model's input: out-of-distribution samples for detectors to look at."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError, DataError
from mithridate.data.catalogue import DatasetInfo, dataset_info
from mithridate.data.images import load_images


def foreign_batches(
    name: str,
    info: DatasetInfo,
    *,
    batches: int,
    batch_size: int,
    data_root: str | Path | None = None,
    cache: str | Path | None = None,
) -> list[Batch]:
    """The first test images of another set, in its order.

    Other sizes are resized bilinearly; grey becomes three equal channels, colour its mean. Labels are class numbers of
    the other set, taken modulo the model's classes: they mean nothing.

    Args:
        name: One of `DATASETS`.
        info: The image set that the model was made for.
        batches: How many batches.
        batch_size: Images in each batch.
        data_root: Folder that mirrors hub repositories; see `load_images`.
        cache: Folder for decoded images; see `load_images`.

    Raises:
        ConfigError: Unknown set, or the stream's own; or the stream is not one of images with classes.
        DataError: The other set is not to be had, or has too few images.
    """
    if name == info.name:
        raise ConfigError(f"ood = '{name}': the stream itself is made of these images; name another set.")
    channels, *size = info.image_shape
    if not info.classes:
        raise ConfigError(f"ood = '{name}': {info.name} has no classes, and other images no targets; leave ood out.")
    images = load_images(name, list(dataset_info(name).splits)[-1], data_root=data_root, cache=cache)
    if len(images) < batches * batch_size:
        raise DataError(f"{name}: {len(images)} images, too few for {batches} batches of {batch_size}.")
    x = torch.from_numpy(images.x[: batches * batch_size].astype(np.float32)) / 255
    if x.shape[1] != channels:
        x = x.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    if list(x.shape[2:]) != size:
        x = F.interpolate(x, size=size, mode="bilinear", antialias=True).clamp(0, 1)
    y = torch.from_numpy(images.y[: len(x)].copy()) % len(info.classes)
    pieces = zip(torch.split(x.contiguous(), batch_size), torch.split(y, batch_size), strict=True)
    return [Batch(*piece) for piece in pieces]
