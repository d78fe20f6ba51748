"""A federation in one process, as tests and the fault harness (`tools/faults`) have it. Needs the extra `flower`."""

from collections.abc import Callable, Iterable, Mapping
from io import BytesIO
from itertools import count
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    Bulyan,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
    Strategy,
)
from flwr.supercore.task_identity import TaskIdentity

NODES = 12
FIRST_NODE = 100

Arrays = dict[str, np.ndarray[Any, Any]]

STRATEGIES: Mapping[str, Callable[[], Strategy]] = {
    "FedAvg": FedAvg,
    "FedAvgM": lambda: FedAvgM(server_momentum=0.9),
    "FedAdam": FedAdam,
    "FedAdagrad": FedAdagrad,
    "FedYogi": FedYogi,
    "FedMedian": FedMedian,
    "FedTrimmedAvg": FedTrimmedAvg,
    "Krum": lambda: Krum(num_malicious_nodes=1),
    "MultiKrum": lambda: MultiKrum(num_malicious_nodes=1, num_nodes_to_select=5),
    "Bulyan": lambda: Bulyan(num_malicious_nodes=1),
    "QFedAvg": lambda: QFedAvg(client_learning_rate=0.1, train_loss_key="train-loss"),
}


class InProcessGrid:
    """As much of Flower's grid as a strategy uses; nodes answer in the order of their numbers.

    The identity of the process, which messages bear, is Flower's own internal notion.

    Args:
        app: What a node runs: (message, context) -> reply.
        nodes: How many there are.
        run_config: As `flwr run -c` gives it.
        tamper: Called with the replies of each round; returns what arrives at the server.
    """

    def __init__(
        self,
        app: Callable[[Message, Context], Any],
        nodes: int,
        run_config: dict[str, Any] | None = None,
        tamper: Callable[[list[Any]], list[Message]] = list,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0
        self.app, self.tamper = app, tamper
        self.contexts = {
            FIRST_NODE + i: Context(
                1, FIRST_NODE + i, {"partition-id": i, "num-partitions": nodes}, RecordDict(), run_config or {}
            )
            for i in range(nodes)
        }
        self._numbers = count()

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for message in sorted(messages, key=lambda m: m.metadata.dst_node_id):
            message.metadata.__dict__["_message_id"] = str(next(self._numbers))
            replies.append(self.app(message, self.contexts[message.metadata.dst_node_id]))
        return self.tamper(replies)


def start() -> dict[str, torch.Tensor]:
    """A model with weights, a bias of another size, and a counter as BatchNorm has one."""
    rng = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(4, 3, generator=rng),
        "bias": torch.randn(4, generator=rng),
        "batches": torch.tensor(0),
    }


def honest(message: Message) -> tuple[Arrays, dict[str, Any]]:
    """Arrays and metrics of a client that does as it is asked, with 50 examples and a loss of 1.

    Every weight moves by a hundredth of the client's number, from 1; counters are one higher.
    """
    if message.metadata.message_type == "evaluate":
        return {}, {"num-examples": 50, "accuracy": 0.5}
    by = 0.01 * (1 + message.metadata.dst_node_id - FIRST_NODE)
    state = {name: array.numpy() for name, array in message.content.array_records["arrays"].items()}
    moved: Arrays = {
        name: np.asarray(np.rint(array) + 1).astype("int64") if "batches" in name else (array + by).astype("float32")
        for name, array in state.items()
    }
    return moved, {"num-examples": 50, "train-loss": 1.0}


def reply_to(message: Message, arrays: Arrays, metrics: Mapping[str, Any]) -> Message:
    """What a client sends."""
    content: dict[str, Any] = {"metrics": MetricRecord(dict(metrics))}
    if message.metadata.message_type == "train":
        content["arrays"] = ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})
    return Message(RecordDict(content), reply_to=message)


def npy(array: Any, **options: Any) -> bytes:
    """What `numpy.save` writes."""
    buffer = BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def pickled() -> bytes:
    return npy(np.array([{}], dtype=object), allow_pickle=True)


def claiming(shape: tuple[int, ...]) -> bytes:
    """The header of an array of any shape, and nothing behind it."""
    buffer = BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()
