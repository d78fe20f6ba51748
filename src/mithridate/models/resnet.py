"""ResNet-18 for small images, with torchvision's parameter names."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mithridate.core.registry import register, settings
from mithridate.core.seeding import seeded_default
from mithridate.data.catalogue import DatasetInfo
from mithridate.models.norm_layers import NormLayer, check_groups, norm_layer
from mithridate.models.normalise import Normalise


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norm: NormLayer, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm_layer(norm, outputs, groups)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = norm_layer(norm, outputs, groups)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), norm_layer(norm, outputs, groups)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class ResNet(nn.Module):
    """The module that `ResNet18` builds.

    Args:
        config: Its settings.
        info: The image set.

    Shape:
        (n, channels, height, width) in [0, 1] -> (n, classes) logits.
    """

    def __init__(self, config: "ResNet18", info: DatasetInfo) -> None:
        super().__init__()
        width, norm, groups = config.width, config.norm, config.groups
        self.stem_pool = config.stem_pool
        self.normalise = Normalise(info.mean, info.std)
        self.conv1 = nn.Conv2d(info.image_shape[0], width, 3, padding=1, bias=False)
        self.bn1 = norm_layer(norm, width, groups)

        def layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            first = _BasicBlock(inputs, outputs, stride, norm, groups)
            return nn.Sequential(first, _BasicBlock(outputs, outputs, 1, norm, groups))

        self.layer1 = layer(width, width, 1)
        self.layer2 = layer(width, 2 * width, 2)
        self.layer3 = layer(2 * width, 4 * width, 2)
        self.layer4 = layer(4 * width, 8 * width, 2)
        self.fc = nn.Linear(8 * width, info.outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """Averages over the last maps: (n, 8 * width)."""
        if not self.training:  # convolutions and pools of a CPU take channels last as they are
            x = x.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(self.normalise(x))))
        if self.stem_pool:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        maps: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return maps.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.fc(self.features(x))
        return logits


@register("model", "resnet18")
@settings
class ResNet18:
    """ResNet-18 with a 3x3 stem, as both papers use it; checkpoints in torchvision's layout load as they are.

    Args:
        width: Channels of the first stage, >= 1; the four stages have 1, 2, 4 and 8 times as many (64 makes
            11.2 M parameters).
        norm: `batch` (BatchNorm) or `group` (GroupNorm).
        groups: Groups of GroupNorm, >= 1; must divide the width.
        stem_pool: Whether a 3x3 max-pool of stride 2 follows the stem; without it, maps are four times as large.

    Shape:
        (n, channels, height, width) in [0, 1] -> (n, classes) logits; features (n, 8 * width).

    Source:
        He et al., CVPR 2016, arXiv:1512.03385; stem and GroupNorm with 32 groups as in Pang et al., NeurIPS
        2021, Table 7.
    """

    width: Annotated[int, Field(ge=1)] = 64
    norm: Literal["batch", "group"] = "batch"
    groups: Annotated[int, Field(ge=1)] = 32
    stem_pool: bool = True

    def __post_init__(self) -> None:
        check_groups(self.norm, self.width, self.groups, where="resnet18")

    def build(self, info: DatasetInfo, *, seed: int) -> nn.Module:
        """A fresh module.

        Args:
            info: The image set.
            seed: Decides the initial parameters.
        """
        with seeded_default(seed):
            return ResNet(self, info)
