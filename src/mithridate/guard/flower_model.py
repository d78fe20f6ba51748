"""Flower, the global model: arrays of a federation in and out of the model that a defended step stands in.

Needs the extra `flower` (flwr >= 1.41, < 2).
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray
from torch import Tensor, nn

from mithridate.core.batch import AnyBatch, check_batch
from mithridate.core.defence import Defence
from mithridate.core.errors import ConfigError
from mithridate.core.past import Weights
from mithridate.core.targets import Criterion
from mithridate.core.tolerance import quality
from mithridate.core.view import Need
from mithridate.guard.limits import Layout, State, is_statistic
from mithridate.guard.phase import Phase
from mithridate.training.history import History
from mithridate.training.step import DefendedStep


class FlowerRounds(NamedTuple):
    """What a Flower server says of its rounds to defences: every client's whole update is bounded, then averaged."""

    bound: Literal["after", "before"] = "before"
    distances: Literal["all", "without_norm"] = "all"


class BareWeights(nn.Module):
    """Weights of a model whose architecture the server does not know; they answer nothing."""

    def __init__(self, state: State) -> None:
        super().__init__()
        tensors = {name: torch.from_numpy(np.array(a, dtype=np.float64)) for name, a in state.items()}
        # `register_parameter` takes no dots, which the names of arrays have.
        self._parameters.update({name: nn.Parameter(t) for name, t in tensors.items()})


def check_needs(defence: Defence, module: nn.Module | None, trusted: AnyBatch | None) -> None:
    """Refuse a defence that lacks what it needs on a server.

    Args:
        defence: What stands in the rounds.
        module: Of the federation's architecture, where there is one.
        trusted: Samples that the server knows to be clean, where there are some.

    Raises:
        ConfigError: It needs something that is not given, or has nothing to do in a federation; or there are trusted
            samples and no module.
        DataError: The trusted samples are no batch.
    """
    defence.check_federation(FlowerRounds(), 1)
    given = {Need.MODEL: module, Need.HISTORY: module, Need.TRUSTED: trusted}
    for need in sorted(defence.needs):
        if given.get(need) is None:
            raise ConfigError(
                f"GuardedStrategy: {type(defence).__name__} needs the {need}; give `module`, one of the federation's "
                "architecture, and `trusted`, samples that the server knows to be clean, or take a defence that looks "
                "at updates alone (clip)."
            )
    if trusted is not None:
        check_batch(trusted, where="trusted samples")
        if module is None:
            raise ConfigError(
                "GuardedStrategy: `trusted` can only be looked at through a model; give `module`, too, or leave both."
            )


def first_step(
    state: State,
    layout: Layout,
    *,
    defence: Defence,
    module: nn.Module | None,
    criterion: Criterion,
    trusted: AnyBatch | None,
) -> DefendedStep:
    """The defended step of a federation that begins: where it starts is the checkpoint that defences may look back at.

    Args:
        state: The global arrays.
        layout: What each of them is.
        defence: What stands in the rounds.
        module: Of the federation's architecture, whose weights are overwritten; None: the trained arrays alone.
        criterion: (logits, targets) -> mean loss, a scalar.
        trusted: Samples that the server knows to be clean, where there are some.

    Raises:
        ConfigError: The module cannot judge the federation's model on the trusted samples.
    """
    model = module or BareWeights({name: state[name] for name in layout.trained})
    history = None
    if Need.HISTORY in defence.needs:
        history = History(keep=defence.lookback + 1 if defence.lookback else 0)
    device = next(model.parameters()).device
    step = DefendedStep(
        model,
        None,
        criterion=criterion,
        defence=defence,
        trusted=None if trusted is None else trusted.to(device),
        history=history,
    )
    put(step, state)
    if step.trusted is not None:
        _check_trusted(step, step.trusted, state)
    if history is not None:
        history.checkpoints[0] = Weights.of(model, "start of the federation").copied()
    return step


def take(step: DefendedStep, arrays: ArrayRecord, phase: Phase) -> tuple[str, dict[str, float]]:
    """Take the aggregate into the model, if the defence lets it stay.

    Args:
        step: The one that is being taken.
        arrays: The aggregate; a shortened step is written into it, so that an inner strategy that goes on from this
            record (FedAvgM) goes on from what was kept.
        phase: Notes a step that is shortened.

    Returns:
        Why it does not stay, empty if it does; and how good it is on trusted samples, by name, where there are some.
    """
    state = opened_arrays(arrays)
    for name, array in state.items():
        if array.dtype.kind in "fc" and not np.isfinite(array).all():
            return f"the aggregate's array '{name}' is not finite", {}
    put(step, state)
    measures = {}
    if step.trusted is not None:
        now = quality(step.white_box, step.trusted)
        measures = {"loss": now.loss, "worst-accuracy": now.worst}
    verdict, _ = step.advance()
    if not verdict.admit:
        return verdict.reason or "the defence refused the step", measures
    if verdict.parameters is not None:
        for name in [name for name in arrays if name in verdict.parameters]:
            arrays[name] = array_like(verdict.parameters[name], arrays[name])
        phase.note("bounded", reason=verdict.reason or "the defence shortened the step of the aggregate")
    return "", measures


def put(step: DefendedStep, state: State) -> None:
    """Fill the model with arrays; what these leave out stays as it is."""

    def filled(now: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: torch.from_numpy(np.array(state[n])).to(t) if n in state else t for n, t in now.items()}

    step.put_parameters(filled(dict(step.model.named_parameters())))
    step.put_buffers(filled(dict(step.model.named_buffers())))


def opened_arrays(arrays: ArrayRecord) -> dict[str, NDArray[Any]]:
    """A record of the server's own as arrays by name."""
    return {name: array.numpy() for name, array in arrays.items()}


def array_like(tensor: Tensor, array: Array) -> Array:
    """A tensor as an array of the type that another has."""
    return Array(tensor.detach().cpu().numpy().astype(array.dtype))


def _check_trusted(step: DefendedStep, trusted: AnyBatch, state: State) -> None:
    """Refuse a module that cannot judge the federation's model on the trusted samples."""
    own = [name for name, _ in step.model.named_buffers() if is_statistic(name) and name not in state]
    if own:
        raise ConfigError(
            f"GuardedStrategy: the module's '{own[0]}' is not among the model's arrays, so that trusted samples "
            "would be judged by statistics that no round fills; let clients exchange it, or leave `trusted` out."
        )
    try:
        quality(step.white_box, trusted)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ConfigError(
            f"GuardedStrategy: the module cannot be judged on the trusted samples ({error}); give samples and "
            "labels as the federation's model takes them."
        ) from error
