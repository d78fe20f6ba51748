"""What a step refuses at its door, in words: parts that are no learner's, and batches that a model cannot take."""

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mithridate.core.batch import AnyBatch, tensors_of
from mithridate.core.defence import Defence
from mithridate.core.errors import ConfigError

TOO_FEW = "more than 1 value per channel"
"""What torch says where BatchNorm is to train on a single value a channel, which has no variance."""


def kinds(batch: AnyBatch) -> tuple[str, ...]:
    """What a batch's inputs and targets are, whatever the number of samples."""
    return kind(batch), str(batch.y.dtype), *map(str, batch.y.shape[1:])


def kind(batch: AnyBatch) -> str:
    """What a batch's inputs are, whatever the number of samples."""
    each = [
        f"{str(t.dtype).removeprefix('torch.')} ({', '.join(map(str, ('n', *t.shape[1:])))})"
        for t in tensors_of(batch.x)
    ]
    if isinstance(batch.x, Tensor):
        return each[0]
    names = [f"{name!r}: " for name in batch.x] if isinstance(batch.x, Mapping) else [""] * len(each)
    listed = ", ".join(f"{name}{what}" for name, what in zip(names, each, strict=True))
    return f"{{{listed}}}" if isinstance(batch.x, Mapping) else f"[{listed}]"


def too_few(what: str) -> str:
    """Why BatchNorm cannot train on so few samples, for a verdict.

    Args:
        what: The samples, such as `1 samples`.
    """
    return f"{what} are too few for BatchNorm to train on: a channel has a single value, and no variance"


def check_parts(model: object, optimiser: object, criterion: object, defence: object) -> None:
    """Refuse what is no model, optimiser, criterion or defence.

    Args:
        model: Must be a `torch.nn.Module`.
        optimiser: A torch optimiser; None where something else changes the model.
        criterion: Must be callable.
        defence: None for none.

    Raises:
        ConfigError: One is something else; says which, and what to give.
    """
    for what, value, right, example in (
        ("model", model, isinstance(model, nn.Module), "a torch.nn.Module"),
        ("optimiser", optimiser, isinstance(optimiser, Optimizer | None), "a torch optimiser, such as torch.optim.SGD"),
        ("criterion", criterion, callable(criterion), "a function of logits and targets, such as F.cross_entropy"),
        ("defence", defence, isinstance(defence, Defence | None), "a defence, such as mi.defences.Clip()"),
    ):
        if right:
            continue
        got = f"the class {value.__name__}" if isinstance(value, type) else repr(value)[:80]
        raise ConfigError(f"{what} is {got}; give {example}.")


def check_steps_on_a_gradient(optimiser: Optimizer | None) -> None:
    """Refuse an optimiser that cannot step on one dense gradient.

    Args:
        optimiser: None where something else changes the model.

    Raises:
        ConfigError: It needs sparse gradients or a closure.
    """
    if optimiser is None:
        return
    closure = inspect.signature(type(optimiser).step).parameters.get("closure")
    if isinstance(optimiser, torch.optim.SparseAdam) or (closure and closure.default is inspect.Parameter.empty):
        raise ConfigError(
            f"{type(optimiser).__name__} needs sparse gradients or a closure, and a step has one dense gradient; take "
            "another optimiser, such as SGD or Adam."
        )


def check_trainable(model: nn.Module, optimiser: Optimizer | None) -> None:
    """Refuse a model that cannot learn.

    Args:
        model: The model.
        optimiser: What is to step its parameters; None where something else changes the model.

    Raises:
        ConfigError: It has layers without a shape yet, no trainable parameter, or none that the optimiser has.
    """
    if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        raise ConfigError(
            f"{type(model).__name__} has layers whose shape is not known yet; call it once on a batch, and then make "
            "its optimiser."
        )
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    if not trainable:
        raise ConfigError(
            f"no parameter of {type(model).__name__} is trainable, so there is nothing to learn or to defend; let some "
            "require gradients (`requires_grad_()`)."
        )
    if optimiser is not None and not trainable & {id(p) for g in optimiser.param_groups for p in g["params"]}:
        raise ConfigError(
            f"the optimiser has none of the trainable parameters of {type(model).__name__}, which would never learn; "
            "make it from this model's own (a copy, or a move that made new ones, has others)."
        )
