"""What a loop has beside its model and its optimiser: schedules, scalers, averages, and generators that draw."""

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state can be read and put back: a schedule, a GradScaler, an average of the weights."""

    def state_dict(self) -> Mapping[str, Any]:
        """The state."""

    def load_state_dict(self, state_dict: Any, /) -> Any:  # noqa: ANN401  (as each of them has it)
        """Put a state back."""


class Surroundings:
    """Remembers what is not the model's or the optimiser's own.

    Args:
        parts: Of the loop, each with its state.
        parameters: That the optimiser moves, but the model has not.
    """

    def __init__(self, parts: Sequence[Stateful], parameters: Sequence[Tensor]) -> None:
        self.parts, self.parameters = parts, parameters
        self._states: list[Any] = []
        self._values: list[Tensor] = []
        self._draws: tuple[Any, ...] = ()

    def save(self) -> None:
        """Remember all of it as it is now."""
        self._states = [copy.deepcopy(part.state_dict()) for part in self.parts]
        self._values = [p.detach().clone() for p in self.parameters]
        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        # numpy's global generator is read, and never drawn from.
        self._draws = (torch.get_rng_state(), gpus, random.getstate(), np.random.get_state())  # noqa: NPY002  (the loop's own)

    @property
    def scales(self) -> bool:
        """Whether there is a GradScaler."""
        return any(isinstance(part, torch.amp.GradScaler) for part in self.parts)

    def scaled_down(self) -> bool:
        """Whether a GradScaler has changed its scale since: it held a step back that overflowed."""
        pairs = zip(self.parts, self._states, strict=True)
        return any(isinstance(p, torch.amp.GradScaler) and p.state_dict()["scale"] < s["scale"] for p, s in pairs if s)

    def restore_parts(self) -> None:
        """Put schedules, scalers and averages back."""
        for part, state in zip(self.parts, self._states, strict=True):
            part.load_state_dict(copy.deepcopy(state))

    @torch.no_grad()
    def restore(self) -> None:
        """Put parameters and generators back."""
        for p, value in zip(self.parameters, self._values, strict=True):
            p.copy_(value)
        cpu, gpus, python, numpy = self._draws
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002  (the loop's own)
