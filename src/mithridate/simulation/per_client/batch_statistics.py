"""What BatchNorm layers would record of many samples that go through the model a few at a time."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mithridate.core.errors import DataError


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
        apart = other.mean - self.mean
        self.squares += other.squares + apart**2 * (self.count * other.count / count)
        self.mean += apart * (other.count / count)
        self.count = count


Seen = dict[str, Moments]
"""By layer name."""


def _layers(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """The layers that record."""
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return {name: layer for name, layer in norms.items() if layer.running_mean is not None}


@contextmanager
def watched(model: nn.Module) -> Iterator[Seen]:
    """Collect the moments of the inputs of BatchNorm layers inside the block, whatever mode they are in.

    Args:
        model: Used inside the block as often as one likes.
    """
    seen: Seen = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0].detach()
            others = [d for d in range(inputs.ndim) if d != 1]
            mean = inputs.mean(others, keepdim=True)
            apart = torch.linalg.vector_norm(inputs - mean, dim=others)  # torch.var takes eight times as long on a CPU
            more = Moments(inputs.numel() // inputs.shape[1], mean.flatten().double(), apart.double().square())
            if name in seen:
                seen[name].take(more)
            else:
                seen[name] = more

        return note

    with ExitStack() as stack:
        for name, layer in _layers(model).items():
            stack.callback(layer.register_forward_pre_hook(watch(name)).remove)
        yield seen


def recorded(model: nn.Module, seen: Seen) -> dict[str, Tensor]:
    """The model's buffers after its BatchNorm layers have recorded all that was seen as one batch; others as they are.

    Args:
        model: Left alone.
        seen: From `watched`.

    Raises:
        DataError: A channel had a single value, which has no variance.
    """
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    layers = _layers(model)
    for name, moments in seen.items():
        if moments.count < 2:
            raise DataError(
                f"BatchNorm ({name}) has a single value a channel to take its variance from; use more clients or "
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
