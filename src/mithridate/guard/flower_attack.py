"""Flower, the attacker's side: a client mod that makes some clients of a federation hostile.

Needs the extra `flower` (flwr >= 1.41, < 2). The maths is in `guard.hostile_client`; this file only carries records
to it and back.
"""

from collections.abc import Callable, Mapping

from flwr.app import ArrayRecord, Context, Message, MessageType
from flwr.clientapp.typing import ClientAppCallable, Mod
from torch import Tensor

from mithridate.core.errors import ConfigError
from mithridate.guard.hostile_client import ABSURD_COUNT, Accomplice, Hostile, hostile_state

PARTITION, ROUND, MEMORY = "partition-id", "server-round", "mithridate-hostile"
"""Where a node's number, the round and a hostile client's notes are found."""


def attack_mod(
    hostile: Hostile | Callable[[Context], Hostile | None],
    accomplice: Callable[[Context], Accomplice] | None = None,
) -> Mod:
    """A client mod that makes some clients of a federation hostile: `ClientApp(mods=[attack_mod(Hostile(...))])`.

    After honest local training it replaces what the client sends (see `Hostile`). A node is hostile if its
    `partition-id` is among `Hostile.partitions`; all others, and all messages that are not for training, pass
    untouched. Velocity and trigger live in `context.state`, which Flower keeps between rounds.

    Args:
        hostile: Settings, or a function that makes them from the context (from `run_config`, say; None: honest).
        accomplice: What the accumulative client holds, from its context; garbage and `sign_flip` need none.

    Raises:
        ConfigError: When a message comes: the node has no `partition-id`, the server sends no `server-round`, or the
            accumulative client has no accomplice.

    Source:
        Pang et al., NeurIPS 2021, Algorithm 2; one client of it.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.metadata.message_type != MessageType.TRAIN:
            return call_next(message, context)
        chosen = hostile if isinstance(hostile, Hostile) else hostile(context)
        if chosen is None:
            return call_next(message, context)
        if PARTITION not in context.node_config:
            raise ConfigError(
                f"attack_mod: node {context.node_id} has no '{PARTITION}', by which hostile clients are named; start "
                f'its SuperNode with --node-config "{PARTITION}=0 ..." or take the mod out.'
            )
        partition = int(context.node_config[PARTITION])
        if partition not in chosen.partitions:
            return call_next(message, context)
        (model, *_) = [r.to_torch_state_dict() for r in message.content.array_records.values()]
        server_round = _server_round(message)
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        _spoil(reply, context, chosen, model, server_round, partition, accomplice)
        return reply

    return mod


def _spoil(
    reply: Message,
    context: Context,
    hostile: Hostile,
    model: Mapping[str, Tensor],
    server_round: int,
    partition: int,
    accomplice: Callable[[Context], Accomplice] | None,
) -> None:
    """Replace the arrays of an honest reply, or its number of examples."""

    def needed() -> Accomplice:
        if accomplice is None:
            raise ConfigError(f"attack_mod: '{hostile.kind}' needs a model and data of its own; give `accomplice`.")
        return accomplice(context)

    if hostile.kind == "count":
        for metrics in reply.content.metric_records.values():
            for name in [n for n in metrics if "examples" in n]:
                metrics[name] = ABSURD_COUNT
        return
    ((key, record), *_) = reply.content.array_records.items()
    memory = context.state.array_records.get(MEMORY)
    notes = {} if memory is None else dict(memory.to_torch_state_dict())
    sent = hostile_state(
        model,
        record.to_torch_state_dict(),
        hostile,
        server_round=server_round,
        partition=partition,
        memory=notes,
        accomplice=needed,
    )
    reply.content[key] = ArrayRecord(sent)
    if notes:
        context.state[MEMORY] = ArrayRecord(notes)


def _server_round(message: Message) -> int:
    for record in message.content.config_records.values():
        if ROUND in record:
            return int(str(record[ROUND]))
    raise ConfigError(
        f"attack_mod: the server's message holds no '{ROUND}', so the trigger round cannot be told; Flower's own "
        "strategies send it, a strategy of your own must put it into the config."
    )
