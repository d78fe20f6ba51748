"""VGG-11 for small images."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from mithridate.core.registry import register, settings
from mithridate.core.seeding import seeded_default
from mithridate.data.catalogue import DatasetInfo
from mithridate.models.norm_layers import check_groups, norm_layer
from mithridate.models.normalise import Normalise

STAGES = ((1,), (2,), (4, 4), (8, 8), (8, 8))
"""Channels of each convolution, in units of the width; a pool ends each stage."""


class VGG(nn.Module):
    """The module that `VGG11` builds.

    Args:
        config: Its settings.
        info: The image set.

    Shape:
        (n, channels, height, width) in [0, 1] -> (n, classes) logits.
    """

    def __init__(self, config: "VGG11", info: DatasetInfo) -> None:
        super().__init__()
        channels, *size = info.image_shape
        layers: list[nn.Module] = []
        for stage in STAGES:
            for factor in stage:
                outputs = factor * config.width
                layers += [
                    nn.Conv2d(channels, outputs, 3, padding=1),
                    norm_layer(config.norm, outputs, config.groups),
                    nn.ReLU(),
                ]
                channels = outputs
            if min(size) >= 2:
                layers.append(nn.MaxPool2d(2))
                size = [side // 2 for side in size]
        self.normalise = Normalise(info.mean, info.std)
        self.stages = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, info.outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def features(self, x: Tensor) -> Tensor:
        """Averages over the last maps: (n, 8 * width)."""
        maps: Tensor = self.stages(self.normalise(x))
        return maps.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.fc(self.features(x))
        return logits


@register("model", "vgg11")
@settings
class VGG11:
    """VGG-11 with eight convolutions, a normalisation after each, and one linear layer.

    Args:
        width: Channels of the first convolution, >= 1; the last has 8 times as many (64: 9.2 M parameters).
        norm: `batch` (BatchNorm) or `group` (GroupNorm).
        groups: Groups of GroupNorm, >= 1; must divide the width.

    Shape:
        (n, channels, height, width) in [0, 1] -> (n, classes) logits; features (n, 8 * width). A pool is left out where
        the maps are a single pixel already.

    Source:
        Simonyan and Zisserman, ICLR 2015, arXiv:1409.1556, configuration A, with the linear layers cut to one.
    """

    width: Annotated[int, Field(ge=1)] = 64
    norm: Literal["batch", "group"] = "batch"
    groups: Annotated[int, Field(ge=1)] = 32

    def __post_init__(self) -> None:
        check_groups(self.norm, self.width, self.groups, where="vgg11")

    def build(self, info: DatasetInfo, *, seed: int) -> nn.Module:
        """A fresh module.

        Args:
            info: The image set.
            seed: Decides the initial parameters.
        """
        with seeded_default(seed):
            return VGG(self, info)
