"""The guard in a loop of Hugging Face's accelerate."""

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from mithridate.guard.loop import Guard
from mithridate.guard.surroundings import Stateful


def attach_accelerated(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    also: Sequence[Stateful] = (),
    **settings: Any,  # noqa: ANN401  (those of `Guard`)
) -> Guard:
    """Guard a loop whose model and optimiser `accelerator.prepare` gave; `save_state` and `load_state` take it along.

    Args:
        accelerator: Of the loop.
        model: As prepared.
        optimizer: As prepared.
        also: What a refused step leaves as it was besides, such as the prepared schedule. A GradScaler of the
            accelerator's is taken along by itself.
        settings: Of the guard; see `mithridate.guard.Guard`, also for what it raises.
    """
    scaler = accelerator.scaler
    guard = Guard(
        model,
        getattr(optimizer, "optimizer", optimizer),
        also=[*also, *([] if scaler is None else [scaler])],
        **settings,
    )
    accelerator.register_for_checkpointing(guard)
    return guard
