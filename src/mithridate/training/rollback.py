"""A place to come back to: copies of a model and its optimiser, in memory that is used again at every step."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mithridate.core.errors import CheckpointError
from mithridate.core.past import Weights


class Rollback:
    """Remembers a model and its optimiser before a step, and brings them back bit for bit.

    Copies go into the same memory each time, so that a step costs copies and no allocation. What a step first makes
    (momentum buffers, a state that the optimiser had not) is deleted when it is taken back.
    """

    module: nn.Module
    optimiser: Optimizer | None

    def __init__(self) -> None:
        self._parameters: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._state: dict[Tensor, dict[str, Any]] = {}
        self._groups: list[dict[str, Any]] = []
        self._flags: list[tuple[nn.Module, bool]] = []

    @property
    def weights(self) -> Weights:
        """The model as it was remembered; valid until the next `save`."""
        return Weights(self._parameters, self._buffers, "before the step")

    @torch.no_grad()
    def save(self, module: nn.Module, optimiser: Optimizer | None) -> None:
        """Remember a model and its optimiser as they are now.

        Args:
            module: The model.
            optimiser: Its optimiser; None where something else makes the steps.
        """
        self.module, self.optimiser = module, optimiser
        self._parameters = copied(dict(self.module.named_parameters()), self._parameters)
        self._buffers = copied(dict(self.module.named_buffers()), self._buffers)
        self._flags = [(m, m.training) for m in self.module.modules()]
        if self.optimiser is None:
            return
        state: dict[Tensor, dict[str, Any]] = {}
        for parameter, entries in self.optimiser.state.items():
            state[parameter] = copied(entries, self._state.get(parameter, {}))
        self._state = state
        self._groups = [
            {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
            for group in self.optimiser.param_groups
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Bring back what was remembered."""
        write(dict(self.module.named_parameters()), self._parameters)
        for name in dict(self.module.named_buffers()).keys() - self._buffers.keys():  # the step made them
            owner, _, last = name.rpartition(".")
            setattr(self.module.get_submodule(owner), last, None)
        write(dict(self.module.named_buffers()), self._buffers)
        for m, flag in self._flags:
            m.training = flag
        if self.optimiser is None:
            return
        for parameter in [p for p in self.optimiser.state if p not in self._state]:
            del self.optimiser.state[parameter]
        for parameter, entries in self._state.items():
            live = self.optimiser.state[parameter]
            for key in [key for key in live if key not in entries]:
                del live[key]
            for key, value in entries.items():
                if isinstance(value, Tensor) and isinstance(live.get(key), Tensor):
                    live[key].copy_(value)
                else:
                    live[key] = copy.deepcopy(value)
        for group, remembered in zip(self.optimiser.param_groups, self._groups, strict=True):
            group.update(copy.deepcopy(remembered))

    def moved(self) -> Iterator[Tensor]:
        """How far each parameter is from where it was."""
        for name, p in self.module.named_parameters():
            yield p.detach() - self._parameters[name]


def copied(live: Mapping[str, Any], into: dict[str, Any]) -> dict[str, Any]:
    """Copies of tensors and containers, in the memory of earlier copies where these fit."""
    out: dict[str, Any] = {}
    for name, value in live.items():
        earlier = into.get(name)
        if not isinstance(value, Tensor):
            out[name] = copy.deepcopy(value)
        elif isinstance(earlier, Tensor) and _alike(earlier, value):
            out[name] = earlier.copy_(value.detach())
        else:
            out[name] = value.detach().clone()
    return out


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def require_fit(into: Mapping[str, Tensor], values: Mapping[str, Tensor], what: str) -> None:
    """Refuse tensors whose names or shapes are not those of a model.

    Raises:
        CheckpointError: Names what differs.
    """
    if into.keys() != values.keys():
        missing, extra = sorted(into.keys() - values.keys()), sorted(values.keys() - into.keys())
        raise CheckpointError(
            f"the {what} are of another model: missing {missing[:3] or 'none'}, unexpected {extra[:3] or 'none'}; "
            "build the model with the settings that the checkpoint was made with."
        )
    for name, target in into.items():
        if target.shape != values[name].shape:
            raise CheckpointError(
                f"{what[:-1]} '{name}' has shape {tuple(values[name].shape)}, the model wants {tuple(target.shape)}; "
                "build the model with the width and classes that the checkpoint was made with."
            )


def require_weights(module: nn.Module, weights: Weights) -> None:
    """Refuse parameters and buffers whose names or shapes are not those of a model.

    Raises:
        CheckpointError: Names what differs.
    """
    now = Weights.of(module)
    require_fit(now.parameters, weights.parameters, "parameters")
    require_fit(now.buffers, weights.buffers, "buffers")


def put_weights(module: nn.Module, weights: Weights) -> None:
    """Fill a model with other parameters and buffers.

    Raises:
        CheckpointError: Names or shapes are not those of the model; nothing has changed then.
    """
    require_weights(module, weights)
    now = Weights.of(module)
    write(now.parameters, weights.parameters)
    write(now.buffers, weights.buffers)


@torch.no_grad()
def write(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values into a model's tensors, by name."""
    for name, target in into.items():
        target.copy_(values[name])
