"""The client mod: whom it makes hostile, what it remembers, and what it says when something is missing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError
from mithridate.guard.flower_attack import NOTES, attack_mod
from mithridate.guard.garbage_clients import GarbageClients
from mithridate.guard.hostile_clients import Accomplice, HostileClients, NamedClients
from mithridate.update_attacks.accumulative import AccumulativeUpdates
from mithridate.update_attacks.sign_flip import SignFlip

MakeGrid = Callable[..., Any]
NODES = 4


def app(hostile: NamedClients | Callable[[Any], NamedClients | None], accomplice: Any = None) -> ClientApp:
    """Clients that move every weight by one tenth, and some that do not."""
    client = ClientApp(mods=[attack_mod(hostile, accomplice)])

    @client.train()
    def train(message: Message, context: Any) -> Message:
        state = message.content.array_records["arrays"].to_torch_state_dict()
        arrays = ArrayRecord({name: t + 0.1 for name, t in state.items()})
        metrics = MetricRecord({"num-examples": 50, "loss": 1.0})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @client.evaluate()
    def evaluate(message: Message, context: Any) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 50})}), reply_to=message)

    return client


def rounds(grid: Any, number: int = 1, arrays: ArrayRecord | None = None) -> list[Message]:
    """What arrives at the server in the last of some rounds."""
    strategy, replies = FedAvg(), []
    for server_round in range(1, number + 1):
        start = arrays or ArrayRecord({"weight": torch.zeros(3)})
        replies = grid.send_and_receive(strategy.configure_train(server_round, start, ConfigRecord(), grid))
    return sorted(replies, key=lambda m: m.metadata.src_node_id)


def moves(replies: list[Message]) -> list[float]:
    return [float(m.content.array_records["arrays"]["weight"].numpy().mean()) for m in replies]


def test_only_named_nodes_are_hostile_and_only_in_training(make_grid: MakeGrid) -> None:
    hostile = HostileClients(attack=SignFlip(scale=2.0), partitions=(1, 3), clients=NODES)
    grid = make_grid(app(hostile), NODES)
    assert moves(rounds(grid)) == pytest.approx([0.1, -0.2, 0.1, -0.2])
    strategy = FedAvg()
    messages = strategy.configure_evaluate(1, ArrayRecord({"weight": torch.zeros(3)}), ConfigRecord(), grid)
    assert len(grid.send_and_receive(messages)) == NODES
    by_context = make_grid(app(lambda context: hostile if context.run_config["attacked"] else None), NODES)
    for attacked, expected in ((True, -0.2), (False, 0.1)):
        for context in by_context.contexts.values():
            context.run_config["attacked"] = attacked
        assert moves(rounds(by_context))[1] == pytest.approx(expected)


def test_an_attack_remembers_from_round_to_round(make_grid: MakeGrid) -> None:
    """Its velocity grows; nobody else keeps anything."""

    def accomplice(context: Any) -> Accomplice:
        x = torch.eye(3)
        return Accomplice(nn.Linear(3, 3), Batch(x, torch.tensor([0, 1, 2])), Batch(x, torch.tensor([1, 2, 0])))

    attack = AccumulativeUpdates(momentum=1.0, lam=1.0, normalise="none")
    grid = make_grid(app(HostileClients(attack=attack, clients=NODES), accomplice), NODES)
    start = ArrayRecord({"weight": torch.eye(3), "bias": torch.zeros(3)})
    lengths = []
    for number in (1, 3):
        for context in grid.contexts.values():
            context.state.clear()
        rounds(grid, number, start)
        notes = grid.contexts[100].state.array_records[NOTES].to_torch_state_dict()
        lengths.append(float(notes["attack.velocity"].norm()))
        assert not any(grid.contexts[node].state for node in (101, 102, 103))
    assert lengths[0] > 0.01
    assert lengths[1] == pytest.approx(3 * lengths[0], rel=1e-5)


def test_an_absurd_number_of_examples_comes_with_an_honest_model(make_grid: MakeGrid) -> None:
    replies = rounds(make_grid(app(GarbageClients(kind="count", partitions=(2,))), NODES))
    assert moves(replies) == pytest.approx([0.1] * NODES)
    counts = [dict(m.content.metric_records["metrics"]) for m in replies]
    assert [c["num-examples"] for c in counts] == [50, 50, 10**15, 50]
    assert [c["loss"] for c in counts] == [1.0] * NODES


def test_what_is_missing_is_said(make_grid: MakeGrid) -> None:
    accumulative = HostileClients(attack=AccumulativeUpdates(), clients=NODES)
    with pytest.raises(ConfigError, match="give `accomplice`"):
        rounds(make_grid(app(accumulative), NODES))
    grid = make_grid(app(GarbageClients(kind="nan")), NODES)
    del grid.contexts[100].node_config["partition-id"]
    with pytest.raises(ConfigError, match="node 100 has no 'partition-id'"):
        rounds(grid)
    grid = make_grid(app(GarbageClients(kind="nan")), NODES)
    messages = list(FedAvg().configure_train(1, ArrayRecord({"weight": torch.zeros(3)}), ConfigRecord(), grid))
    for message in messages:
        message.content["config"] = ConfigRecord()
    with pytest.raises(ConfigError, match="holds no 'server-round'"):
        grid.send_and_receive(messages)
