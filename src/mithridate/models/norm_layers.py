"""The layers between convolutions that models can choose from: BatchNorm, GroupNorm or none."""

from typing import Literal

from torch import nn

from mithridate.core.errors import ConfigError

NormLayer = Literal["batch", "group", "none"]


def norm_layer(norm: NormLayer, channels: int, groups: int) -> nn.Module:
    """A normalisation layer, or the identity.

    Args:
        norm: Which kind.
        channels: Channels of its input.
        groups: Groups of channels that GroupNorm normalises together; no other kind uses it.
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(groups, channels) if norm == "group" else nn.Identity()


def check_groups(norm: NormLayer, width: int, groups: int, *, where: str) -> None:
    """Refuse a number of groups that does not divide the width; every layer's channels are a multiple of it.

    Args:
        norm: Only `group` is checked.
        width: Channels of the first layer.
        groups: Groups of GroupNorm.
        where: Named in the message.

    Raises:
        ConfigError: The number of groups does not divide the width.
    """
    if norm == "group" and width % groups:
        fitting = next(g for g in range(min(groups, width), 0, -1) if width % g == 0)
        raise ConfigError(
            f"{where}: groups = {groups} does not divide width = {width}, so GroupNorm cannot group the channels; "
            f"set groups to {fitting}, or width to a multiple of {groups}."
        )
