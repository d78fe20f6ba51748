"""What a guard asks of a loop before the first step: a model and an optimiser that it can take back."""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from mithridate.core.batch import AnyBatch
from mithridate.core.defence import Defence
from mithridate.core.errors import ConfigError, DataError, UserError, said, shown
from mithridate.core.registry import build, config_of
from mithridate.core.targets import loss_of
from mithridate.core.view import Need
from mithridate.guard.surroundings import Stateful
from mithridate.training.history import History
from mithridate.training.step import DefendedStep

GUARDED: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()
"""Optimisers that some guard watches."""


PURPOSES: Mapping[str, Mapping[str, Any]] = {
    "light": {"name": "chain", "preset": "light"},
    "recommended": {"name": "chain", "preset": "recommended"},
}
"""Defences by what they are for."""


def check_loop(model: object, optimizer: object, also: Sequence[object]) -> None:
    """Refuse a loop that cannot be guarded as it is.

    Args:
        model: Of the loop; what is no module is left to others to refuse.
        optimizer: That it steps.
        also: What a refused step leaves as it was besides.

    Raises:
        ConfigError: There is no optimiser, or it is wrapped or guarded already; something in `also` has no state; or
            the model is sharded, or lies on several devices.
    """
    wrapped = getattr(optimizer, "optimizer", None)
    if isinstance(wrapped, Optimizer):
        raise ConfigError(
            f"the optimiser is wrapped by {type(optimizer).__name__}, whose steps cannot be judged; give the inner "
            "one, `optimizer.optimizer`."
        )
    if optimizer is None:
        raise ConfigError("a guard needs the optimiser that the loop steps.")
    if isinstance(optimizer, Optimizer) and optimizer in GUARDED:
        raise ConfigError("this optimiser is guarded already; call detach() on the first guard, or chain the defences.")
    for part in also:
        if not isinstance(part, Stateful):
            raise ConfigError(
                f"`also` holds a {type(part).__name__}, which has no state_dict and load_state_dict; give schedules, "
                "scalers, averages or the like."
            )
    if not isinstance(model, nn.Module):
        return  # said by the step
    parameters = list(model.parameters())
    if any(isinstance(p, DTensor) for p in parameters):
        raise ConfigError(
            "the model's parameters are sharded over processes (DTensor), and no rank could judge the model; guard a "
            "DistributedDataParallel model, or the model before `fully_shard`."
        )
    devices = {str(p.device) for p in parameters}
    if len(devices) > 1:
        raise ConfigError(f"the model lies on several devices ({', '.join(sorted(devices))}); a guard needs it on one.")


def defence_of(defence: Defence | Mapping[str, Any] | str) -> Defence:
    """A defence by its name or its purpose (`PURPOSES`), from its table, or as it is.

    Raises:
        ConfigError: It is none of these, there is none of that name, or a setting is wrong.
    """
    if not isinstance(defence, Defence | Mapping | str):
        raise ConfigError(f"defence = {shown(defence)}: give a defence, its name, or a table {{'name': 'gate'}}.")
    if isinstance(defence, str):
        defence = PURPOSES.get(defence, {"name": defence})
    return build("defence", dict(defence)) if isinstance(defence, Mapping) else defence


def described(defence: Defence) -> dict[str, Any]:
    """A defence's settings for the log; of one that is not registered, what its class is called."""
    try:
        return config_of(defence)
    except ConfigError:
        return {"name": type(defence).__qualname__}


def inner(model: nn.Module) -> nn.Module:
    """The module itself, without what compiles it or joins it with other processes."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = cast("nn.Module", getattr(model, "_orig_mod", None) or model.module)
    return model


def changes_batches(defence: Defence) -> bool:
    """Whether a defence has to see each batch before the forward pass."""
    return defence.acts("screen") or defence.acts("loss")


def history_for(defence: Defence) -> History | None:
    """The past that a defence looks back at, as far as a loop by itself can keep it."""
    if Need.HISTORY not in defence.needs:
        return None
    return History(keep=defence.lookback + 1 if defence.lookback else 0)


def try_defence(step: DefendedStep) -> None:
    """Refuse a defence that cannot work here, before the first step; what it notes of that is forgotten.

    Raises:
        ConfigError: It needs something that is not there.
        DataError: The trusted samples do not fit the model.
    """
    name = type(step.defence).__name__
    if step.trusted is None and Need.TRUSTED in step.defence.needs:
        raise ConfigError(
            f"{name} judges by trusted samples: give `trusted`, a batch of samples that you know to be clean, of every "
            "class."
        )
    if step.training is None and Need.TRAINING in step.defence.needs:
        raise ConfigError(f"{name} compares with clean batches that the model was trained on: give `training`.")
    if step.trusted is not None:
        step.defence.check_inputs(step.trusted)
        _try_trusted(step, step.trusted)
    step.defence.begin(step.view())
    step.memory.clear()


def _try_trusted(step: DefendedStep, trusted: AnyBatch) -> None:
    some = trusted.take(slice(0, 2))
    try:
        with torch.no_grad():
            loss_of(step.criterion, step.white_box.logits(some.x), some.y, where="trusted samples")
    except UserError:
        raise
    except Exception as error:  # whatever the model stumbles over
        raise DataError(
            f"trusted samples do not fit {type(step.model).__name__}: {said(error)}; give samples as the loop's "
            "batches have them."
        ) from error
