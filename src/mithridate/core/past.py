"""What a model was earlier."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from mithridate.core.batch import Inputs
from mithridate.core.errors import CheckpointError
from mithridate.core.model import answer, frozen_statistics


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

    @classmethod
    def of(cls, module: nn.Module, label: str = "") -> "Weights":
        """The parameters and buffers of a model as it is now; they share its memory."""
        return cls(dict(module.named_parameters()), dict(module.named_buffers()), label)

    def copied(self) -> "Weights":
        """A copy that shares no memory."""
        parameters, buffers = (
            {name: t.detach().clone() for name, t in tensors.items()} for tensors in (self.parameters, self.buffers)
        )
        return Weights(parameters, buffers, self.label)

    def logits(self, module: nn.Module, x: Inputs) -> Tensor:
        """What the past model says of `x`, in eval mode, computed by a module of the same architecture.

        Raises:
            CheckpointError: The past model is of another architecture or class count.
        """
        now = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        state = named_like(now, {**self.parameters, **self.buffers})
        if now.keys() != state.keys() or any(now[name].shape != state[name].shape for name in now):
            raise CheckpointError(
                f"the old model ({self.label or 'unnamed'}) is of another architecture or class count than the current "
                "one; look back at a state of the same model."
            )
        with frozen_statistics(module, "eval"):
            return answer(module, x, state)


def uncompiled(name: str) -> str:
    """The name of a parameter or buffer as it was before `torch.compile` wrapped the model, or a part of it."""
    return name.replace("_orig_mod.", "")


def named_like(own: Iterable[str], tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors by the names that a model has for them now; the same mapping where names differ in more than compiling.

    Args:
        own: The model's names.
        tensors: By the names that it had when it was compiled, or was not.
    """
    own = list(own)
    if own == list(tensors):
        return tensors
    by_name = {uncompiled(name): t for name, t in tensors.items()}
    if {uncompiled(name) for name in own} != by_name.keys():
        return tensors
    return {name: by_name[uncompiled(name)] for name in own}


@dataclass(frozen=True)
class Snapshot:
    """All that a learner is at one moment: a value, detached copies, restored bit for bit.

    Args:
        parameters: Parameters by name, as it was before `torch.compile`.
        buffers: Buffers by name (BatchNorm statistics among them), likewise.
        optimiser: The optimiser's state dict (momentum and the like).
        step: Number of updates made.
        in_eval: Names of the modules that are in eval mode by themselves (frozen ones); None where that is not known.
    """

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    optimiser: Mapping[str, Any]
    step: int
    in_eval: tuple[str, ...] | None = None
