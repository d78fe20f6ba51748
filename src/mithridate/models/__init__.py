"""Image classifiers, one file each: logits by `forward`, penultimate features by `features`, normalisation inside."""

from collections.abc import Mapping
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import nn

from mithridate.core.batch import each_tensor
from mithridate.core.errors import ConfigError
from mithridate.core.model import answer
from mithridate.core.modes import frozen_statistics
from mithridate.core.registry import build
from mithridate.data.catalogue import DatasetInfo
from mithridate.models.resnet import ResNet18 as ResNet18
from mithridate.models.small_cnn import SmallCNN as SmallCNN
from mithridate.models.vgg import VGG11 as VGG11


@runtime_checkable
class ModelSettings(Protocol):
    """What a registered model is: settings that build a module."""

    def build(self, info: DatasetInfo, *, seed: int) -> nn.Module:
        """A fresh module for a data set; equal seeds give equal modules."""


def build_model(config: Mapping[str, Any] | ModelSettings, info: DatasetInfo, *, seed: int) -> nn.Module:
    """A fresh model for a data set.

    Args:
        config: The table `[model]` of a recipe, or settings made from it.
        info: Gives the shape of a sample, the number of outputs and the constants of normalisation.
        seed: Decides the initial parameters; no global generator is touched.

    Raises:
        ConfigError: The table is wrong, the model does not fit the data set, or it needs more memory than there is.
    """
    chosen = cast("ModelSettings", build("model", config)) if isinstance(config, Mapping) else config
    try:
        module = chosen.build(info, seed=seed)
    except (RuntimeError, TypeError, MemoryError, OverflowError) as error:  # torch's words for too much
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        raise ConfigError(
            f"[model] {type(chosen).__name__} cannot be made with these settings ({reason}); is one of its sizes too "
            "large?"
        ) from error
    check_model(module, info)
    return module


def check_model(module: nn.Module, info: DatasetInfo) -> None:
    """Run one sample through a model, in eval mode; the model stays as it was.

    Args:
        module: Any module, the user's own included. It gives a tensor, or an object that has one as `logits`.
        info: The data set that it is to learn.

    Raises:
        ConfigError: It cannot take a sample, or gives something else than (1, classes) logits; where targets are no
            class numbers, something else than a row for the sample.
    """
    like = next(module.parameters(), torch.empty(0))
    black = torch.zeros(1, *info.shape, dtype=like.dtype)
    x = each_tensor(
        black if info.example is None else info.example,
        lambda t: t.to(like.device, like.dtype if t.is_floating_point() else t.dtype),
    )
    name, sample = type(module).__name__, "image" if info.images else "sample"
    shapes = each_tensor(x, lambda t: tuple(t.shape))
    with torch.no_grad(), frozen_statistics(module, "eval"):
        try:
            logits = answer(module, x)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ConfigError(
                f"{name} cannot take one {sample} of {info.name}, of shape {shapes} ({error}); choose another model or "
                "data set."
            ) from error
    shape = tuple(logits.shape)
    if info.classes and shape != (1, info.outputs):
        raise ConfigError(
            f"{name} gives {shape} for one {sample} of {info.name}; expected logits of shape {(1, info.outputs)}."
        )
    if not shape or shape[0] != 1:
        raise ConfigError(f"{name} gives {shape} for one {sample} of {info.name}; expected a tensor with one row.")
