"""What is looked at: a model, its loss as a pure function, and what it was earlier."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mithridate.core.batch import Inputs
from mithridate.core.errors import ConfigError
from mithridate.maths.calculus import Objective, Parameters

BatchNormMode = Literal["eval", "train"]
"""`eval`: running statistics; `train`: the statistics of the batch."""

Criterion = Callable[[Tensor, Tensor], Tensor]
"""(logits, targets) -> mean loss, a scalar."""

IGNORED = -100
"""The label that torch's cross-entropy leaves out (`ignore_index`)."""


def answer(module: nn.Module, x: Inputs, state: Mapping[str, Tensor] | None = None) -> Tensor:
    """What a model says of inputs: its logits, or whatever else its criterion takes.

    Args:
        module: A model that gives a tensor, or an object or mapping with a tensor under `logits`.
        x: A tensor, a mapping (keyword arguments) or a sequence (positional ones).
        state: Parameters and buffers to use in place of the module's, by name; the others stay the module's.

    Raises:
        ConfigError: The model gives something else.
    """
    args: tuple[Tensor, ...] = ()
    kwargs: dict[str, Tensor] = {}
    if isinstance(x, Tensor):
        args = (x,)
    elif isinstance(x, Mapping):
        kwargs = dict(x)
    else:
        args = tuple(x)
    output = module(*args, **kwargs) if state is None else functional_call(module, dict(state), args, kwargs)
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ConfigError(
            f"{type(module).__name__} gives a {type(output).__name__}; a model must give a tensor, or an object with a "
            "tensor under `.logits`. Wrap it in a module that does."
        )
    return logits


def right_answers(logits: Tensor, y: Tensor) -> Tensor | None:
    """Which targets are hit; None where that has no meaning, as in regression.

    Args:
        logits: (n, classes) or (n, positions, classes) for class numbers, shaped like `y` for many labels.
        y: Class numbers int64, (n,) or (n, positions), `IGNORED` ones left out; or many labels, floats of 0 and 1.

    Returns:
        (targets,) bool.
    """
    if y.dtype == torch.int64 and logits.shape[:-1] == y.shape:
        counted = y != IGNORED
        return (logits.argmax(-1) == y)[counted]
    if y.is_floating_point() and logits.shape == y.shape and bool(((y == 0) | (y == 1)).all()):
        return ((logits > 0) == (y > 0.5)).flatten()
    return None


@dataclass(frozen=True)
class WhiteBox:
    """Read access to a model: its parameters, and its answers and loss as pure functions.

    Args:
        module: The model; never changed through this object.
        criterion: (logits, targets) -> mean loss.
    """

    module: nn.Module
    criterion: Criterion

    @property
    def parameters(self) -> Parameters:
        """The trainable parameters, detached (they share memory with the model: do not write)."""
        return {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}

    def logits(self, x: Inputs, mode: BatchNormMode = "eval", *, parameters: Parameters | None = None) -> Tensor:
        """What the model says of inputs, differentiable in them; nothing is recorded.

        Args:
            x: Inputs.
            mode: `eval` uses BatchNorm's running statistics, `train` those of the batch.
            parameters: Trainable ones to use in place of the model's.
        """
        with frozen_statistics(self.module, mode):
            return answer(self.module, x, self.parameters if parameters is None else parameters)

    @contextmanager
    def objective(self, mode: BatchNormMode = "eval") -> Iterator[Objective]:
        """The loss as a pure function, with BatchNorm in the given mode; flags and statistics come back untouched.

        Args:
            mode: `eval` uses the running statistics. `train` uses those of the batch and records nothing.
        """
        with frozen_statistics(self.module, mode):

            def objective(parameters: Parameters, x: Tensor, y: Tensor) -> Tensor:
                return self.criterion(answer(self.module, x, parameters), y)

            yield objective


@contextmanager
def in_mode(module: nn.Module, mode: BatchNormMode) -> Iterator[None]:
    """Put a model in eval or train mode; every module's own flag comes back as it was."""
    training = [(m, m.training) for m in module.modules()]
    module.train(mode == "train")
    try:
        yield
    finally:
        for m, flag in training:
            m.training = flag


@contextmanager
def frozen_statistics(module: nn.Module, mode: BatchNormMode) -> Iterator[None]:
    """Put a model in eval or train mode without letting BatchNorm record; every flag comes back as it was.

    Args:
        module: The model.
        mode: `eval` or `train`.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracking = [m.track_running_stats for m in norms]
    with in_mode(module, mode):
        if mode == "train":
            for m in norms:
                m.track_running_stats = False
        try:
            yield
        finally:
            for m, flag in zip(norms, tracking, strict=True):
                m.track_running_stats = flag
