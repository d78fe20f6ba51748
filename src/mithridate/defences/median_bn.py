"""Median statistics in BatchNorm: a few extreme samples of a batch cannot drag them away."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mithridate.core.batch import Batch
from mithridate.core.defence import Defence
from mithridate.core.registry import register, settings
from mithridate.core.targets import Criterion
from mithridate.core.view import View

MAD_TO_STD = 1.4826
"""Standard deviation of a Gaussian in units of its median absolute deviation."""


@register("defence", "median_bn")
@settings
class MedianBn(Defence):
    """BatchNorm of an update standardises with medians over the batch in place of mean and variance.

    With `over = "samples"`, centre and variance of a channel are the medians, over the samples, of each sample's mean
    and of its mean square distance from that centre. With `over = "values"` they are the median of all the channel's
    values, and the square of 1.4826 times their median absolute deviation, which for a Gaussian is its variance. They
    are recorded in the running statistics with the layer's own momentum. The modules stay as they are. Nothing changes
    in a model without BatchNorm, with `update_mode = "eval"`, or in any forward pass but that of the update. It reaches
    layers that call `torch.nn.functional.batch_norm` in this process, as torch's own do (`SyncBatchNorm` over several
    does not).

    What breaks it: poison in half of the samples or more, a batch that is poisoned whole above all; small shifts of
    every sample, which move a median as they move a mean; and anything that works through the gradient, which is not
    bounded. Its own price: activations are not Gaussian, so a model that was trained with means and variances meets
    other statistics when the stream begins, and loses clean accuracy: little with `samples`, much with `values`. With
    `values`, a channel of which over half is equal (plain backgrounds) has deviation 0, and only `floor` holds its
    scale up.

    Args:
        strength: Share of the median statistics in the mixture with the ordinary ones, in [0, 1]; 0 is plain BatchNorm.
        over: Medians over `samples` or over all `values` of a channel; the same where a sample has one value a channel.
        floor: The scale is at least so many ordinary standard deviations of the channel, in [0, 1]; 0 has no floor. It
            is the share by which extreme samples can still raise the scale.

    Source:
        Median and MAD as estimates that few outliers move: Huber, Robust Statistics, 1981; the median over samples is
        a median of means (Nemirovsky and Yudin, 1983). Their use in BatchNorm against poisoned batches is engineering
        practice.
    """

    neutral: ClassVar[Mapping[str, Any]] = {"strength": 0.0}
    active: ClassVar[Mapping[str, Any]] = {"strength": 1.0}

    strength: Annotated[float, Field(ge=0, le=1)] = 1.0
    over: Literal["samples", "values"] = "samples"
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1

    def loss(self, model: nn.Module, batch: Batch, criterion: Criterion, view: View) -> Tensor:
        """The plain loss of the model with median statistics."""
        if self.strength == 0:
            return super().loss(model, batch, criterion, view)
        with _MedianStatistics(self):
            return super().loss(model, batch, criterion, view)


class _MedianStatistics(TorchFunctionMode):
    """While it is on, `F.batch_norm` with batch statistics uses medians."""

    def __init__(self, config: MedianBn) -> None:
        super().__init__()
        self.config = config

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        return (self._batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,  # torch's own names: they are keywords
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        n = input.numel() // input.shape[1]
        if not training or n < 2:  # torch refuses one value a channel, in its own words
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        mean, variance, plain = self._statistics(
            input.transpose(0, 1).flatten(2) if input.ndim > 2 else input.t().unsqueeze(2)
        )
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                recorded = variance + (1 - self.config.strength) * plain / (n - 1)  # torch records n / (n - 1) times
                running_mean.mul_(1 - momentum).add_(mean.to(running_mean.dtype), alpha=momentum)
                running_var.mul_(1 - momentum).add_(recorded.to(running_var.dtype), alpha=momentum)
        shape = (1, -1, *[1] * (input.ndim - 2))
        scale = (variance + eps).rsqrt()
        scale = scale if weight is None else scale * weight
        out = (input - mean.view(shape)) * scale.view(shape)
        return out if bias is None else out + bias.view(shape)

    def _statistics(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Centre and variance of each channel, mixed, and the ordinary variance; from (channels, samples, places)."""
        plain, mean = torch.var_mean(values, dim=(1, 2), correction=0)
        if self.config.over == "samples" and values.shape[2] > 1:
            centre = _median(values.mean(2))
            variance = _median((values - centre.view(-1, 1, 1)).square().mean(2))
        else:
            rows = values.flatten(1)
            centre = _median(rows)
            variance = (MAD_TO_STD * _median((rows - centre.unsqueeze(1)).abs())).square()
        variance = torch.maximum(variance, self.config.floor**2 * plain)
        share = self.config.strength
        return torch.lerp(mean, centre, share), torch.lerp(plain, variance, share), plain


def _median(rows: Tensor) -> Tensor:
    """The median of each row; of an even number of values, the mean of the middle two."""
    if rows.is_cuda:  # there, which of several equal values is found may change from run to run; a stable sort may not
        middle = rows.sort(dim=1, stable=True).values[:, (rows.shape[1] - 1) // 2 : rows.shape[1] // 2 + 1]
        return middle.mean(1)
    lower = rows.median(dim=1).values
    return lower if rows.shape[1] % 2 else (lower - (-rows).median(dim=1).values) / 2
