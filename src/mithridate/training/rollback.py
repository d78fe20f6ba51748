"""A place to come back to: copies of a model and its optimiser, in memory that is used again at every step."""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from mithridate.core.errors import CheckpointError
from mithridate.core.past import Weights, named_like


class Rollback:
    """Remembers a model and its optimiser before a step, and brings them back bit for bit.

    Copies go into the same memory each time, so that a step costs copies and no allocation. What a step first makes
    (momentum buffers, a state that the optimiser had not) is deleted when it is taken back.
    """

    module: nn.Module
    optimiser: Optimizer | None

    def __init__(self) -> None:
        self._parameters: dict[str, Tensor] = {}
        self._still: frozenset[str] = frozenset()
        """Names of the parameters that are not copied, since nothing moves them."""
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
        parameters = dict(self.module.named_parameters())
        if optimiser is not None:  # what it has not, and no gradient reaches, stays as it is: no copy
            its = {id(p) for group in optimiser.param_groups for p in group["params"]}
            still = {name: p.detach() for name, p in parameters.items() if not p.requires_grad and id(p) not in its}
            moving = {name: p for name, p in parameters.items() if name not in still}
            parts = still | copied(moving, {name: p for name, p in self._parameters.items() if name not in self._still})
            self._parameters, self._still = {name: parts[name] for name in parameters}, frozenset(still)
        else:
            self._parameters, self._still = copied(parameters, self._parameters), frozenset()
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
        write({n: p for n, p in self.module.named_parameters() if n not in self._still}, self._parameters)
        self._restore_buffers()
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
            for key, value in remembered.items():
                if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                    group[key].copy_(value)  # a learning rate that a schedule holds too
                else:
                    group[key] = copy.deepcopy(value)

    def _restore_buffers(self) -> None:
        now = dict(self.module.named_buffers())
        for name in now.keys() | self._buffers.keys():
            remembered, live = self._buffers.get(name), now.get(name)
            if remembered is not None and live is not None and _alike(remembered, live):
                live.copy_(remembered)
                continue
            owner, _, last = name.rpartition(".")  # the step made it, deleted it, or gave it another shape
            setattr(self.module.get_submodule(owner), last, None if remembered is None else remembered.clone())

    def moved(self) -> Iterator[Tensor]:
        """How far each parameter is from where it was."""
        for name, p in self.module.named_parameters():
            yield p.detach() - self._parameters[name]

    @torch.no_grad()
    def spoiled(self) -> str:
        """The first parameter or buffer that the step has made NaN or infinite, by name; empty if there is none."""
        for name, p in self.module.named_parameters():
            if _spoils(self._parameters[name], p):
                return name
        return self.spoiled_buffer()

    @torch.no_grad()
    def spoiled_buffer(self) -> str:
        """The first buffer that the step has made NaN or infinite, by name; empty if there is none."""
        floats = {name: b for name, b in self.module.named_buffers() if b.is_floating_point() and name in self._buffers}
        if not floats or bool(torch.isfinite(get_total_norm(list(floats.values()), math.inf))):
            return ""
        return next((name for name, b in floats.items() if _spoils(self._buffers[name], b)), "")


def _spoils(before: Tensor, now: Tensor) -> bool:
    """Whether a value that was finite is not any more."""
    bad = ~torch.isfinite(now)
    return bool((bad & torch.isfinite(before) if before.shape == now.shape else bad).any())


def copied(live: Mapping[str, Any], into: dict[str, Any]) -> dict[str, Any]:
    """Copies of tensors and containers, in the memory of earlier copies where these fit."""
    out: dict[str, Any] = {}
    here: list[Tensor] = []
    there: list[Tensor] = []
    for name, value in live.items():
        earlier = into.get(name)
        if not isinstance(value, Tensor):
            out[name] = copy.deepcopy(value)
        elif isinstance(earlier, Tensor) and _alike(earlier, value):
            out[name] = earlier
            here.append(earlier)
            there.append(value.detach())
        else:
            out[name] = value.detach().clone()
    if here:
        torch._foreach_copy_(here, there)  # all at once: a model has hundreds of small tensors
    return out


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def fitted(into: Mapping[str, Tensor], values: Mapping[str, Tensor], what: str) -> Mapping[str, Tensor]:
    """Tensors by the names of a model, which may have been compiled since, or not yet.

    Args:
        into: The model's own, by name.
        values: By the names of the same model, compiled or not.
        what: What they are, in the plural, for messages: `parameters` or `buffers`.

    Raises:
        CheckpointError: Names or shapes are not those of the model; says what differs.
    """
    values = named_like(into, values)
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
    return values


def require_weights(module: nn.Module, weights: Weights) -> Weights:
    """The same weights by the names of a model.

    Raises:
        CheckpointError: Names or shapes are not those of the model; says what differs.
    """
    now = Weights.of(module)
    parameters = fitted(now.parameters, weights.parameters, "parameters")
    return Weights(parameters, fitted(now.buffers, weights.buffers, "buffers"), weights.label)


def put_weights(module: nn.Module, weights: Weights) -> None:
    """Fill a model with other parameters and buffers.

    Raises:
        CheckpointError: Names or shapes are not those of the model; nothing has changed then.
    """
    weights, now = require_weights(module, weights), Weights.of(module)
    write(now.parameters, weights.parameters)
    write(now.buffers, weights.buffers)


@torch.no_grad()
def write(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values into a model's tensors, by name.

    Args:
        into: The model's tensors.
        values: One for each of them, of its shape (see `fitted`).
    """
    for name, target in into.items():
        target.copy_(values[name])
