"""What BatchNorm layers would record of many samples that go through the model a few at a time."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mithridate.core.errors import DataError
from mithridate.training.door import TOO_FEW


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of a layer's input, by channel, in double precision.

    Args:
        count: Values a channel.
        mean: (channels,).
        squares: (channels,).
    """

    count: int
    mean: Tensor
    squares: Tensor

    def take(self, other: "Moments") -> None:
        """Add more values.

        Source:
            Chan, Golub and LeVeque, The American Statistician 37 (1983), pairwise update.
        """
        count = self.count + other.count
        difference = other.mean - self.mean
        self.squares += other.squares + difference**2 * (self.count * other.count / count)
        self.mean += difference * (other.count / count)
        self.count = count


LayerMoments = dict[str, Moments]
"""By layer name: the moments of the layer's inputs."""


def merge(into: LayerMoments, more: LayerMoments) -> None:
    """Add the values of more inputs, layer by layer."""
    for name, moments in more.items():
        if name in into:
            into[name].take(moments)
        else:
            into[name] = moments


def _layers(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """The BatchNorm layers that have running statistics, by name."""
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return {name: layer for name, layer in norms.items() if layer.running_mean is not None}


@contextmanager
def watched(model: nn.Module) -> Iterator[LayerMoments]:
    """Collect the moments of the inputs of BatchNorm layers inside the block, in train and in eval mode.

    Args:
        model: May be called any number of times inside the block.
    """
    by_layer: LayerMoments = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0].detach()
            others = [d for d in range(inputs.ndim) if d != 1]
            mean = inputs.mean(others, keepdim=True)
            # torch.var takes eight times as long on a CPU
            deviations = torch.linalg.vector_norm(inputs - mean, dim=others)
            moments = Moments(inputs.numel() // inputs.shape[1], mean.flatten().double(), deviations.double().square())
            merge(by_layer, {name: moments})

        return note

    with ExitStack() as stack:
        for name, layer in _layers(model).items():
            stack.callback(layer.register_forward_pre_hook(watch(name)).remove)
        yield by_layer


def recorded(model: nn.Module, by_layer: LayerMoments) -> dict[str, Tensor]:
    """The model's buffers, once its BatchNorm layers have recorded all collected inputs as one batch.

    Args:
        model: Left alone.
        by_layer: From `watched`.

    Raises:
        DataError: A channel had a single value, which has no variance.
    """
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    layers = _layers(model)
    for name, moments in by_layer.items():
        if moments.count < 2:
            raise DataError(
                f"BatchNorm ({name}) needs {TOO_FEW} to take its variance from; use more clients or "
                'samples, or batch_norm = "frozen" in [federated].'
            )
        prefix = f"{name}." if name else ""
        counted = buffers.get(prefix + "num_batches_tracked")
        if counted is not None:
            counted += 1
        momentum = layers[name].momentum
        if momentum is None:  # a cumulative average
            momentum = 1.0 if counted is None else 1.0 / float(counted)
        for key, new in (("running_mean", moments.mean), ("running_var", moments.squares / (moments.count - 1))):
            buffers[prefix + key].lerp_(new.to(buffers[prefix + key].dtype), momentum)
    return buffers
