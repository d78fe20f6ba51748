"""A federation in one process: the grid hands each message to a client app at once."""

import gc
import logging
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

import pytest


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
        app: Callable[[Any, Any], Any],
        nodes: int,
        run_config: dict[str, Any] | None = None,
        tamper: Callable[[list[Any]], list[Any]] = list,
    ) -> None:
        from flwr.app import Context, RecordDict
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0
        self.app, self.tamper = app, tamper
        self.contexts = {
            100 + i: Context(1, 100 + i, {"partition-id": i, "num-partitions": nodes}, RecordDict(), run_config or {})
            for i in range(nodes)
        }
        self._numbers = count()

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> list[Any]:
        replies = []
        for message in sorted(messages, key=lambda m: m.metadata.dst_node_id):
            message.metadata.__dict__["_message_id"] = str(next(self._numbers))
            replies.append(self.app(message, self.contexts[message.metadata.dst_node_id]))
        return self.tamper(replies)


@pytest.fixture
def make_grid(monkeypatch: pytest.MonkeyPatch) -> Callable[..., InProcessGrid]:
    """Makes grids. Meanwhile Flower is quiet, and does not collect garbage by force for every single client."""
    monkeypatch.setattr(gc, "collect", lambda generation=2: 0)
    monkeypatch.setattr(logging.getLogger("flwr"), "disabled", True)
    return InProcessGrid
