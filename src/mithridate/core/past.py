"""What a model was earlier."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import PlainValidator
from torch import Tensor, nn

from mithridate.core.batch import Inputs
from mithridate.core.errors import CheckpointError, ConfigError
from mithridate.core.model import answer
from mithridate.core.modes import frozen_statistics


def _epoch(value: object) -> int | Literal["half"]:
    if value == "half":
        return "half"
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("give a whole number >= 0, or half")
    return value


Epoch = Annotated[int | Literal["half"], PlainValidator(_epoch)]
"""A burn-in epoch whose model was kept: by its number, or the one at `half` of the burn-in, rounded down."""


def older_epoch(epoch: Epoch | None, kept: Collection[int], length: int | None, *, who: str) -> int:
    """Which kept model is meant; the one that the stream starts with never is, since it would be compared with itself.

    Args:
        epoch: The wanted one; None: the earliest kept.
        kept: Epochs of the kept models that are older than the one that the stream starts with.
        length: Epochs of the burn-in; None if nobody knows.
        who: Who looks back, for the message.

    Raises:
        ConfigError: It was not kept.
    """
    wanted = epoch
    if epoch == "half":
        wanted = None if length is None else length // 2
    elif epoch is None:
        wanted = min(kept, default=None)
    if isinstance(wanted, int) and wanted in kept:
        return wanted
    if wanted is None and epoch == "half":
        raise ConfigError(f"{who} looks back at half of the burn-in; give its history the `length` of that, in epochs.")
    if wanted is None:
        problem = "at an older model, and no older one is kept: the last epoch's is the one that the stream starts with"
    elif wanted == length:
        problem = f"at burn-in epoch {wanted}, the model that the stream starts with: it would compare it with itself"
    else:
        older = ", ".join(map(str, sorted(kept))) or "none"
        problem = f"at burn-in epoch {wanted}, which is not kept (older models: {older})"
    example = wanted if isinstance(wanted, int) and wanted != length else (length or 40) // 2
    raise ConfigError(
        f"{who} looks back {problem}. Write e.g. `[burn_in] checkpoints = [{example}]`, or, if `checkpoint` names a "
        f'finished model, `older = {{ {example} = "FILE" }}`.'
    )


class Past(Protocol):
    """A model's own past, as a defence or an attack may look at it."""

    def back(self, k: int) -> "Weights | None":
        """The model as it was `k` updates ago, or the nearest kept state older than that; None if there is none."""

    def checkpoint(self, epoch: Epoch | None = None, *, who: str = "a component") -> "Weights":
        """The model at the end of a burn-in epoch before the last; unset: the earliest kept one.

        Args:
            epoch: Which.
            who: Who looks back, for the message.

        Raises:
            ConfigError: It was not kept.
        """


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

    @classmethod
    def from_named(cls, tensors: Mapping[str, Tensor], label: str = "") -> "Weights":
        """What `named` gave as weights again; tensors of other names are passed over."""
        parameters, buffers = (
            {name.removeprefix(kind): t for name, t in tensors.items() if name.startswith(kind)}
            for kind in ("parameter.", "buffer.")
        )
        return cls(parameters, buffers, label)

    def named(self) -> dict[str, Tensor]:
        """All tensors by one name each: `parameter.NAME` and `buffer.NAME`."""
        parameters = {f"parameter.{name}": t for name, t in self.parameters.items()}
        return parameters | {f"buffer.{name}": t for name, t in self.buffers.items()}

    def copied(self) -> "Weights":
        """A copy that shares no memory."""
        parameters, buffers = (
            {name: t.detach().clone() for name, t in tensors.items()} for tensors in (self.parameters, self.buffers)
        )
        return Weights(parameters, buffers, self.label)

    def is_of(self, module: nn.Module) -> bool:
        """Whether these are, bit for bit, what a model has now."""
        now = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        state = named_like(now, {**self.parameters, **self.buffers})
        if now.keys() != state.keys():
            return False
        return all(t.shape == now[n].shape and bool((t.to(now[n].device) == now[n]).all()) for n, t in state.items())

    def logits(self, module: nn.Module, x: Inputs) -> Tensor:
        """What the past model says of `x`, in eval mode, computed by a module of the same architecture.

        Raises:
            CheckpointError: The past model is of another architecture or class count.
        """
        state = self.state_of(module)
        with frozen_statistics(module, "eval"):
            return answer(module, x, state)

    def state_of(self, module: nn.Module) -> Mapping[str, Tensor]:
        """Parameters and buffers by the names of a module of the same architecture.

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
        return state


@dataclass(frozen=True)
class PastOf:
    """The past of a model as it starts into the stream: what is called old must not be that model itself.

    Args:
        past: Where the old models are.
        module: The model now.
    """

    past: Past
    module: nn.Module

    def back(self, k: int) -> Weights | None:
        """The model as it was `k` updates ago; see `Past.back`."""
        return self.past.back(k)

    def checkpoint(self, epoch: Epoch | None = None, *, who: str = "a component") -> Weights:
        """The model at the end of a burn-in epoch before the last; see `Past.checkpoint`.

        Raises:
            ConfigError: It was not kept, or it is the current model.
        """
        old = self.past.checkpoint(epoch, who=who)
        if old.is_of(self.module):
            raise ConfigError(
                f"{who} looks back at {old.label or 'an old model'}, which holds the weights of the current model: it "
                "would compare it with itself. Give the history `checkpoints` that are older, each a copy "
                "(`Weights.of(model).copied()`) from before the model was trained on."
            )
        return old


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
