"""Poison that is no poison: real samples with their right labels, those whose step harms the model most."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor

from mithridate.attacks.substituting import Substituting
from mithridate.core.attack import Power
from mithridate.core.batch import AnyBatch
from mithridate.core.errors import ConfigError
from mithridate.core.model import WhiteBox
from mithridate.core.registry import register, settings
from mithridate.core.view import Need, View
from mithridate.maths.directions import Parameters

REACH = 1e-3
"""How far the parameters are moved to see which losses rise, relative to their own length: far above what float32
rounds away of a loss, and small enough that losses are straight lines."""


@register("attack", "worst_samples")
@settings
class WorstSamples(Substituting):
    """Send those of the attacker's own samples, rightly labelled, whose gradients oppose that of a validation part.

    A step on such a sample raises the loss on the validation part. Samples of any kind can be sent, token ids among
    them, since none is changed: they are chosen. Every second sample of S_val is the validation part, and the others
    can be sent.

    Args:
        distinct: How many different samples a batch holds at most, >= 1: the worst ones, as often as there is room.
            Few push in one direction.

    Raises:
        ConfigError: (from `poison`) S_val has one sample alone.

    Source:
        The alignment of a sample's gradient with that of a validation set as the value of the sample: Ren et al., ICML
        2018, arXiv:1803.09050; poisoning by choice and order of clean samples: Shumailov et al., NeurIPS 2021,
        arXiv:2104.09667. Here the product with every sample's gradient is read off one central difference of losses
        along the validation part's, so that no sample needs a backward pass of its own.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL, Need.VALIDATION})
    power: ClassVar[Power] = "samples"

    distinct: Annotated[int, Field(ge=1)] = 4

    def check_inputs(self, batch: AnyBatch) -> None:
        """Inputs and targets of any kind are taken."""

    def substitute(self, batch: AnyBatch, view: View, mask: Tensor, rng: Generator) -> AnyBatch:
        """The samples that harm most, the worst one first, in the places that may be replaced."""
        box, samples = view.model, view.validation
        if samples.size < 2:
            raise ConfigError("worst_samples: S_val has one sample alone; give two or more, to choose and to look at.")
        part, pool = samples.take(slice(0, None, 2)), samples.take(slice(1, None, 2))
        order = aligned(box, pool, slope(box, part)).argsort()
        ranks = torch.zeros(batch.size, dtype=torch.int64)
        ranks[mask] = torch.arange(int(mask.sum()))
        return pool.take(order[ranks % min(self.distinct, pool.size)]).to(batch.y.device)


def slope(box: WhiteBox, part: AnyBatch) -> Parameters:
    """The gradient of the mean loss on some samples, by parameter; inputs may be of any kind."""
    parameters = {name: p.clone().requires_grad_() for name, p in box.parameters.items()}
    with torch.enable_grad():
        loss = box.criterion(box.logits(part.x, parameters=parameters), part.y)
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), grads, strict=True)
    }


@torch.no_grad()
def aligned(box: WhiteBox, samples: AnyBatch, direction: Parameters) -> Tensor:
    """How far each sample's gradient points along a direction: (samples,), on the CPU.

    Args:
        box: The model.
        samples: Any number of them.
        direction: By parameter. Of zero length, all samples are alike.
    """
    parameters = box.parameters
    length, size = _length(direction), _length(parameters)
    if length == 0 or not math.isfinite(length):
        return torch.zeros(samples.size)
    reach = REACH * max(size, 1.0) / length
    ahead, behind = (
        _losses(box, samples, {name: p + sign * reach * direction[name] for name, p in parameters.items()})
        for sign in (1, -1)
    )
    return (ahead - behind) / (2 * reach)


def _losses(box: WhiteBox, samples: AnyBatch, parameters: Mapping[str, Tensor]) -> Tensor:
    """The loss of each sample by itself, with other parameters."""
    losses: list[Any] = []
    for piece in samples.split(100):
        logits = box.logits(piece.x, parameters=dict(parameters))
        losses += [box.criterion(logits[i : i + 1], piece.y[i : i + 1]).reshape(()) for i in range(piece.size)]
    return torch.stack(losses).double().cpu()


def _length(tensors: Mapping[str, Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors.values()])))
