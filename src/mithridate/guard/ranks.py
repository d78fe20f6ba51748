"""One word for all processes that train one model together."""

import torch
import torch.distributed as dist
from torch import nn

from mithridate.core.defence import Verdict


def together() -> bool:
    """Whether other processes train along."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def agreed(verdict: Verdict, module: nn.Module) -> Verdict:
    """What all ranks do: one objection counts for all, and a shortened step is the first rank's.

    Every rank must ask, each once a step.

    Args:
        verdict: Of this rank.
        module: The model, for its device.
    """
    if not together():
        return verdict
    device = next(module.parameters()).device
    said = torch.tensor([not verdict.admit, verdict.forget, verdict.parameters is not None], dtype=torch.int32)
    said = said.to(device)
    dist.all_reduce(said, dist.ReduceOp.SUM)
    refused, forget, shortened = said.tolist()
    if refused:
        reason = verdict.reason if not verdict.admit else f"{refused} of {dist.get_world_size()} ranks object"
        return Verdict(False, reason, forget=bool(forget), measures=verdict.measures)
    if shortened == 0:
        return verdict
    if verdict.parameters is None or shortened < dist.get_world_size():
        return Verdict(False, "only some ranks shorten the step, so they would part", measures=verdict.measures)
    first = {name: p.detach().clone() for name, p in verdict.parameters.items()}
    for p in first.values():
        dist.broadcast(p, 0)
    return verdict._replace(parameters=first)
