"""What is looked at: a model, its loss as a pure function, and what it was earlier."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn
from torch.func import functional_call

from mithridate.core.errors import CheckpointError
from mithridate.maths.calculus import Objective, Parameters

BatchNormMode = Literal["eval", "train"]
"""`eval`: running statistics; `train`: the statistics of the batch."""


Criterion = Callable[[Tensor, Tensor], Tensor]
"""(logits, labels) -> mean loss."""


@dataclass(frozen=True)
class Snapshot:
    """All that a learner is at one moment: a value, detached copies, restored bit for bit.

    Args:
        parameters: Parameters by name.
        buffers: Buffers by name (BatchNorm statistics among them).
        optimiser: The optimiser's state dict (momentum and the like).
        step: Number of updates made.
    """

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    optimiser: Mapping[str, Any]
    step: int


@dataclass(frozen=True)
class WhiteBox:
    """Read access to a model: its parameters, and its loss as a pure function of parameters and pixels.

    Args:
        module: The model; never changed through this object.
        criterion: (logits, labels) -> mean loss.
    """

    module: nn.Module
    criterion: Criterion

    @property
    def parameters(self) -> Parameters:
        """The trainable parameters, detached (they share memory with the model: do not write)."""
        return {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}

    @contextmanager
    def objective(self, mode: BatchNormMode = "eval") -> Iterator[Objective]:
        """The loss as a pure function, with BatchNorm in the given mode; flags and statistics come back untouched.

        Args:
            mode: `eval` uses the running statistics. `train` uses those of the batch and records nothing.
        """
        with frozen_statistics(self.module, mode):

            def objective(parameters: Parameters, x: Tensor, y: Tensor) -> Tensor:
                return self.criterion(functional_call(self.module, parameters, (x,)), y)

            yield objective


@contextmanager
def frozen_statistics(module: nn.Module, mode: BatchNormMode) -> Iterator[None]:
    """Put a model in eval or train mode without letting BatchNorm record; every flag comes back as it was.

    Args:
        module: The model.
        mode: `eval` or `train`.
    """
    training = {name: m.training for name, m in module.named_modules()}
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracking = [m.track_running_stats for m in norms]
    module.train(mode == "train")
    if mode == "train":
        for m in norms:
            m.track_running_stats = False
    try:
        yield
    finally:
        for name, m in module.named_modules():
            m.training = training[name]
        for m, flag in zip(norms, tracking, strict=True):
            m.track_running_stats = flag


class Past(Protocol):
    """A model's own past, as a defence or an attack may look at it."""

    def back(self, k: int) -> "Weights | None":
        """The model as it was `k` updates ago, or the nearest kept state older than that; None if there is none."""

    def checkpoint(self, epoch: int | None = None) -> "Weights | None":
        """The model at the end of a burn-in epoch; unset: the earliest kept one. None if there is none."""


@dataclass(frozen=True)
class Weights:
    """Parameters and buffers of one past model.

    Args:
        parameters: By name.
        buffers: By name.
        label: When it was, for messages.
    """

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    label: str = ""

    def logits(self, module: nn.Module, x: Tensor) -> Tensor:
        """What that model says of `x`, in eval mode, through a module of the same architecture.

        Raises:
            CheckpointError: It is of another architecture or class count.
        """
        now = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        held = {**self.parameters, **self.buffers}
        if now.keys() != held.keys() or any(now[name].shape != held[name].shape for name in now):
            raise CheckpointError(
                f"the old model ({self.label or 'unnamed'}) is of another architecture or class count than the current "
                "one; look back at a state of the same model."
            )
        with frozen_statistics(module, "eval"):
            logits: Tensor = functional_call(module, held, (x,))
        return logits
