"""Flower, the attacker's side: a client mod that makes some clients of a federation hostile.

Needs the extra `flower` (flwr >= 1.41, < 2). What they send is made in `guard.hostile_clients` and
`guard.garbage_clients`; this file only carries records to it and back.
"""

from collections.abc import Callable

from flwr.app import ArrayRecord, Context, Message, MessageType
from flwr.clientapp.typing import ClientAppCallable, Mod

from mithridate.core.errors import ConfigError
from mithridate.guard.hostile_clients import Accomplice, NamedClients, Tensors, Turn

PARTITION, ROUND, NOTES = "partition-id", "server-round", "mithridate-hostile"
"""Where a node's number, the round and a hostile client's notes are found."""


def attack_mod(
    hostile: NamedClients | Callable[[Context], NamedClients | None],
    accomplice: Callable[[Context], Accomplice] | None = None,
) -> Mod:
    """A client mod that makes some clients hostile: `ClientApp(mods=[attack_mod(HostileClients(clients=20))])`.

    After honest local training it replaces what the client sends. A node is hostile if its `partition-id` is among
    `partitions`; all others, and all messages that are not for training, pass untouched. The attack's notes live in
    `context.state`, which Flower keeps between rounds.

    Args:
        hostile: `HostileClients` or `GarbageClients`, or a function that makes them from the context (from
            `run_config`, say; None: honest).
        accomplice: What a hostile client holds, from its context; garbage, and attacks that look at updates alone,
            need none.

    Raises:
        ConfigError: When a message comes: the node has no `partition-id`, the server sends no `server-round`, or the
            attack needs an accomplice and there is none.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.metadata.message_type != MessageType.TRAIN:
            return call_next(message, context)
        chosen = hostile if isinstance(hostile, NamedClients) else hostile(context)
        if chosen is None:
            return call_next(message, context)
        if PARTITION not in context.node_config:
            raise ConfigError(
                f"attack_mod: node {context.node_id} has no '{PARTITION}', by which hostile clients are named; start "
                f'its SuperNode with --node-config "{PARTITION}=0 ..." or take the mod out.'
            )
        if int(context.node_config[PARTITION]) not in chosen.partitions:
            return call_next(message, context)
        (model, *_) = [r.to_torch_state_dict() for r in message.content.array_records.values()]
        server_round = _server_round(message)
        reply = call_next(message, context)
        if not reply.has_error():
            _spoil(reply, context, chosen, model, server_round, accomplice)
        return reply

    return mod


def _spoil(
    reply: Message,
    context: Context,
    hostile: NamedClients,
    model: Tensors,
    server_round: int,
    accomplice: Callable[[Context], Accomplice] | None,
) -> None:
    """Replace the arrays of an honest reply, and its number of examples."""

    def needed() -> Accomplice:
        if accomplice is None:
            raise ConfigError("attack_mod: this attack needs a model and data of its own; give `accomplice`.")
        return accomplice(context)

    ((key, record), *_) = reply.content.array_records.items()
    notes = context.state.array_records.get(NOTES)
    turn = Turn(
        model=model,
        honest=record.to_torch_state_dict(),
        round=server_round,
        partition=int(context.node_config[PARTITION]),
        accomplice=needed,
        notes={} if notes is None else dict(notes.to_torch_state_dict()),
    )
    reply.content[key] = ArrayRecord(hostile.sent(turn))
    context.state[NOTES] = ArrayRecord(turn.notes)
    if hostile.claimed_examples is not None:
        for metrics in reply.content.metric_records.values():
            for name in [name for name in metrics if "examples" in name]:
                metrics[name] = hostile.claimed_examples


def _server_round(message: Message) -> int:
    for record in message.content.config_records.values():
        if ROUND in record:
            return int(str(record[ROUND]))
    raise ConfigError(
        f"attack_mod: the server's message holds no '{ROUND}', so the trigger round cannot be told; Flower's own "
        "strategies send it, a strategy of your own must put it into the config."
    )
