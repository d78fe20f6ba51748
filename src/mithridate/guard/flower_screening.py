"""Flower, the replies of a round: which of them can be aggregated, each by itself and all together.

Needs the extra `flower` (flwr >= 1.41, < 2).
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable

from flwr.app import Message

from mithridate.guard.flower_replies import RefusedError, Reply, opened
from mithridate.guard.limits import Layout, ReplyLimits, State, difference, excess
from mithridate.guard.phase import Phase


def fit_replies(
    replies: Iterable[Message], asked: Collection[int], phase: Phase, open_reply: Callable[[Message], Reply]
) -> list[Reply]:
    """The replies that can be aggregated, together too; the others are noted.

    Args:
        replies: As they came.
        asked: The nodes that were asked, by Flower's ids.
        phase: Notes who is refused or missing.
        open_reply: Opens one reply, or raises `RefusedError`.
    """
    heard: set[int] = set()
    fit: list[Reply] = []
    for message in replies:
        node = message.metadata.src_node_id
        reason = "" if node in asked else "it was not asked in this round"
        if node in heard:
            reason = "a second reply in this round"
        if not reason:
            heard.add(node)
            try:
                fit.append(open_reply(message))
            except RefusedError as refusal:
                reason = str(refusal)
        if reason:
            phase.note("refused", node, reason)
    for node in sorted(set(asked) - heard):
        phase.note("missing", node, "no reply")
    return _alike(fit, phase)


def within_limits(
    message: Message, weight_key: str, loss_key: str | None, *, layout: Layout, model: State, limits: ReplyLimits
) -> Reply:
    """One reply to a request for training, opened, if it keeps to the limits.

    Args:
        message: As it came.
        weight_key: Name of the metric that holds the number of examples.
        loss_key: Name of the metric that holds the loss, where clients are weighted by it.
        layout: What each array of the model is.
        model: The global arrays that were sent.
        limits: What it must keep to.

    Raises:
        RefusedError: It is not in order (see `opened`), or is too far from the model.
    """
    reply = opened(message, weight_key, model, loss_key)
    fault = layout.fault(reply.arrays, model)
    for names, what in ((layout.trained, "update"), (layout.statistics, "statistics")):
        fault = fault or excess(difference(reply.arrays, model, names), limits.max_update_norm, what)
    if fault:
        raise RefusedError(fault)
    return reply


def _alike(fit: list[Reply], phase: Phase) -> list[Reply]:
    """The replies that can be averaged with each other; more than half decide what is usual, or nobody does."""
    most = len(fit) / 2
    usual = {signature for signature, times in Counter(r.signature for r in fit).items() if times > most}
    alike = [reply for reply in fit if reply.signature in usual]
    if not usual:
        shared = {metric for metric, times in Counter(m for r in fit for m in r.sized).items() if times > most}
        alike = [reply for reply in fit if shared <= set(reply.sized)]
        for reply in alike:
            reply.shared = shared
    for reply in fit:
        if reply not in alike:
            phase.note("refused", reply.node, "its records or metrics are named or sized unlike those of most clients")
    return alike
