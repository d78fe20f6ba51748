"""An average of a model's states that moves along with it, kept as notes by the names of `Weights.named`."""

import torch
from torch import Tensor, nn

from mithridate.core.past import Weights
from mithridate.core.view import Memory


@torch.no_grad()
def moved_along(notes: Memory, module: nn.Module, decay: float) -> Memory:
    """The average after one more state: decay * average + (1 - decay) * state; without notes, that state itself.

    Whole-number buffers are not averaged; the newest is taken.

    Args:
        notes: The average so far, and perhaps other notes.
        module: In the state that is taken in.
        decay: In [0, 1).
    """
    now = {key: tensor.detach() for key, tensor in Weights.of(module).named().items()}
    wide = {
        key: tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        for key, tensor in now.items()
        if tensor.is_floating_point() and key in notes
    }
    moved: dict[str, Tensor] = {}
    if wide:
        lerped = torch._foreach_lerp([notes[key] for key in wide], list(wide.values()), 1 - decay)
        moved = dict(zip(wide, lerped, strict=True))
    return {key: moved[key] if key in moved else _first(tensor) for key, tensor in now.items()}


def _first(tensor: Tensor) -> Tensor:
    """A copy of a tensor as an average begins with it."""
    if not tensor.is_floating_point():
        return tensor.clone()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def weights_of(notes: Memory, module: nn.Module, label: str) -> Weights:
    """The average as weights of a model, in its own types.

    Args:
        notes: The average, and perhaps other notes.
        module: Whose weights they are.
        label: Says what they are.
    """
    average = {key: notes[key].to(tensor.dtype) for key, tensor in Weights.of(module).named().items()}
    return Weights.from_named(average, label)
