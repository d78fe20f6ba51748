"""Image classifiers, one file each: logits by `forward`, penultimate features by `features`, normalisation inside."""

from collections.abc import Mapping
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import nn

from mithridate.core.errors import ConfigError
from mithridate.core.model import frozen_statistics
from mithridate.core.registry import build
from mithridate.data.catalogue import DatasetInfo
from mithridate.models.resnet import ResNet18 as ResNet18
from mithridate.models.small_cnn import SmallCNN as SmallCNN
from mithridate.models.vgg import VGG11 as VGG11


@runtime_checkable
class ModelSettings(Protocol):
    """What a registered model is: settings that build a module."""

    def build(self, info: DatasetInfo, *, seed: int) -> nn.Module:
        """A fresh module for an image set, the same for the same seed."""


def build_model(config: Mapping[str, Any] | ModelSettings, info: DatasetInfo, *, seed: int) -> nn.Module:
    """A fresh model for an image set.

    Args:
        config: The table `[model]` of a recipe, or settings made from it.
        info: Gives channels, size, classes and the constants of normalisation.
        seed: Decides the initial parameters; no global generator is touched.

    Raises:
        ConfigError: The table is wrong, or the model does not fit the image set.
    """
    chosen = cast("ModelSettings", build("model", config)) if isinstance(config, Mapping) else config
    module = chosen.build(info, seed=seed)
    check_model(module, info)
    return module


def check_model(module: nn.Module, info: DatasetInfo) -> None:
    """Run one black image through a model, in eval mode; the model stays as it was.

    Args:
        module: Any module, the user's own included.
        info: The image set that it is to classify.

    Raises:
        ConfigError: It cannot take such an image, or gives something else than (1, classes) logits.
    """
    like = next(module.parameters(), torch.empty(0))
    image = torch.zeros(1, *info.shape, dtype=like.dtype, device=like.device)
    name = type(module).__name__
    with torch.no_grad(), frozen_statistics(module, "eval"):
        try:
            logits = module(image)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"{name} cannot take an image of {info.name}, of shape {tuple(image.shape)} ({error}); choose another "
                "model or data set."
            ) from error
    expected = (1, len(info.classes))
    got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if got != expected:
        raise ConfigError(f"{name} gives {got} for one image of {info.name}; expected logits of shape {expected}.")
