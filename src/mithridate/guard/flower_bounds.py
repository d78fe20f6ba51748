"""Flower, what each client's reply counts for: updates bounded by defence and limits, claimed numbers capped.

Needs the extra `flower` (flwr >= 1.41, < 2).
"""

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch

from mithridate.core.updates import Updates
from mithridate.guard.flower_replies import Reply
from mithridate.guard.limits import Layout, ReplyLimits, State, moved
from mithridate.guard.phase import Phase
from mithridate.training.step import DefendedStep

AT_ONCE = 8
"""Clients' rows that the defence is shown at a time: a copy of every update at once could be too much to hold."""


def bound_updates(
    step: DefendedStep, fit: Sequence[Reply], *, layout: Layout, model: State, limits: ReplyLimits, phase: Phase
) -> None:
    """Let the defence bound the clients' updates, and the limits what no defence is shown.

    Args:
        step: The one that is being taken.
        fit: The replies to aggregate; what is bounded is replaced in them.
        layout: What each array of the model is.
        model: The global arrays that were sent.
        limits: Bound statistics, and what is far longer than is ordinary in the round.
        phase: Notes who is bounded.
    """
    for names, what, clip_norm in (
        (layout.trained, "update", math.inf),
        (layout.statistics, "statistics", limits.statistics_clip_norm),
    ):
        if math.isinf(clip_norm) and math.isinf(limits.max_norm_ratio):
            continue
        lengths = [float(np.linalg.norm(reply.change(model, names))) for reply in fit]
        bound = min(clip_norm, limits.longest(lengths))
        for reply, length in zip(fit, lengths, strict=True):
            if length > bound:
                reply.new_arrays |= moved(model, reply.change(model, names) * (bound / length), reply.arrays, names)
                phase.note("bounded", reply.node, f"{what} of l2 length {length:.4g}, bounded to {bound:.4g}")
    for start in range(0, len(fit), AT_ONCE):
        _show_defence(step, fit[start : start + AT_ONCE], layout.trained, model, phase)
    for reply in fit:
        _hold_frozen(reply, layout.frozen, model, phase)


def cap_examples(fit: Sequence[Reply], weight_key: str, limits: ReplyLimits, phase: Phase) -> None:
    """Let no client claim more examples than the limits allow.

    Args:
        fit: The replies to aggregate; what is capped is replaced in them.
        weight_key: Name of the metric that holds the number of examples.
        limits: Say what each counts for.
        phase: Notes who is capped.
    """
    for reply, allowed in zip(fit, limits.capped([r.count for r in fit]), strict=True):
        if allowed != reply.count:
            reply.new_metrics[weight_key] = allowed
            phase.note("capped", reply.node, f"claims {str(reply.count)[:20]} examples, counts for {allowed:g}")


def cap_losses(fit: Sequence[Reply], loss_key: str, limits: ReplyLimits, phase: Phase) -> None:
    """Let no client claim a loss that is far from what is ordinary in the round.

    Args:
        fit: The replies to aggregate, each with a loss >= 0; what is capped is replaced in them.
        loss_key: Name of the metric that holds the loss.
        limits: Say what each counts for.
        phase: Notes who is capped.
    """
    losses = [float(cast("float", reply.metrics[loss_key])) for reply in fit]  # `opened` let no other pass
    for reply, loss, allowed in zip(fit, losses, limits.bounded_losses(losses), strict=True):
        if allowed != loss:
            reply.new_metrics[loss_key] = allowed
            phase.note("capped", reply.node, f"claims a loss of {loss:.4g}, counts for {allowed:.4g}")


def _show_defence(
    step: DefendedStep, some: Sequence[Reply], trained: tuple[str, ...], model: State, phase: Phase
) -> None:
    """Let the defence bound the updates of some clients."""
    shapes = {name: torch.Size(model[name].shape) for name in trained}
    rows = np.stack([-reply.change(model, trained) for reply in some])
    updates = Updates(torch.from_numpy(rows).to(step.device, next(step.model.parameters()).dtype), shapes)
    bounded = step.bound_updates(updates)
    if bounded is updates:
        return
    lengths = torch.stack([updates.lengths(), bounded.lengths()], 1).tolist()
    for i, (reply, (was, now)) in enumerate(zip(some, lengths, strict=True)):
        if not torch.equal(bounded.rows[i], updates.rows[i]):
            row = bounded.rows[i].detach().cpu().double().numpy()
            reply.new_arrays |= moved(model, -row, reply.arrays, trained)
            phase.note("bounded", reply.node, f"update of l2 length {was:.4g}, bounded to {now:.4g}")


def _hold_frozen(reply: Reply, frozen: tuple[str, ...], model: State, phase: Phase) -> None:
    """Put back what a client moved of parameters that are not trained."""
    for name in frozen:
        received = reply.arrays[name]
        sent = model[name].astype(received.dtype)
        if not np.array_equal(received, sent):
            reply.new_arrays[name] = sent
            phase.note("bounded", reply.node, f"it moved '{name}', which is frozen; put back")
