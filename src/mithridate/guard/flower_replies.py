"""Flower, replies of clients: opened and looked at one by one, and passed on, changed or as they came.

Needs the extra `flower` (flwr >= 1.41, < 2).
"""

import copy
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from mithridate.guard.limits import State, count_fault, difference, loss_fault

NPY_HEADER = 4096
"""Bytes that a serialised array may be longer than its numbers."""

WIDEST = 16
"""Bytes of the widest number."""

LARGEST = 1e300
"""A metric beyond this would overflow in an average."""


Sized = tuple[str, int | None]
"""Name of a metric and the length of its list; None: it is a single number."""


class RefusedError(Exception):
    """A reply is not passed on; the text says why."""


@dataclass(eq=False)
class Reply:
    """A reply whose records are in order, and what of it was replaced.

    Args:
        message: As it came.
        metrics_key: Name of its record of metrics.
        count: The number of examples that it reports.
        arrays_key: Name of its record of arrays; empty where none are wanted.
        arrays: These arrays, opened; in the model's order where they have its names.
        new_arrays: What replaces some of them.
        new_metrics: What replaces some of the metrics.
        shared: The metrics that are passed on, and then records have names of our own; None: all, as they came.
    """

    message: Message
    metrics_key: str
    count: float
    arrays_key: str = ""
    arrays: State = field(default_factory=dict)
    new_arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    new_metrics: dict[str, float] = field(default_factory=dict)
    shared: Container[Sized] | None = None

    @property
    def node(self) -> int:
        """Flower's id of the client."""
        return int(self.message.metadata.src_node_id)

    @property
    def signature(self) -> tuple[object, ...]:
        """What Flower's strategies want to be the same in all replies: names of records, names and sizes of metrics."""
        return self.arrays_key, self.metrics_key, frozenset(self.sized)

    @property
    def metrics(self) -> MetricRecord:
        """The metrics as they came."""
        return self.message.content.metric_records[self.metrics_key]

    @property
    def sized(self) -> list[Sized]:
        """Names and sizes of the metrics."""
        return [(name, len(value) if isinstance(value, list) else None) for name, value in self.metrics.items()]

    def change(self, model: State, names: Iterable[str]) -> NDArray[np.float64]:
        """How far the arrays of these names were moved away from the model's, as they are passed on."""
        return difference({**self.arrays, **self.new_arrays}, model, names)

    def passed_on(self) -> Message:
        """The very message that came, or a copy with other content."""
        if not self.new_arrays and not self.new_metrics and self.shared is None:
            return self.message
        content = RecordDict(dict(self.message.content))
        if self.new_arrays:
            arrays = {**self.arrays, **self.new_arrays}  # in the order of the model, by which several strategies go
            content[self.arrays_key] = ArrayRecord({name: Array(np.asarray(a)) for name, a in arrays.items()})
        metrics = {**self.metrics, **self.new_metrics}
        if self.shared is not None:
            kept = sorted(name for name, size in self.sized if (name, size) in self.shared)
            arrays_record = content.array_records.get(self.arrays_key)
            content = RecordDict({"metrics": MetricRecord({name: metrics[name] for name in kept})})
            if arrays_record is not None:
                content["arrays"] = arrays_record
        elif self.new_metrics:
            content[self.metrics_key] = MetricRecord(metrics)
        other = copy.copy(self.message)
        other.content = content
        return other


def opened(message: Message, weight_key: str, model: State | None, loss_key: str | None = None) -> Reply:
    """One reply, opened and looked at by itself.

    Args:
        message: As it came.
        weight_key: Name of the metric that holds the number of examples.
        model: The global arrays, whose names the reply's must have; None: no arrays are wanted.
        loss_key: Name of the metric that holds the loss, where clients are weighted by it.

    Raises:
        RefusedError: It is an error or empty, its records are not one of each kind, a metric is no number that can be
            averaged, or an array cannot be read.
    """
    if message.has_error():
        words = str(message.error.reason)[:500]  # a stranger's: no line breaks and no codes for the terminal
        raise RefusedError(f"error: {''.join(c if c.isprintable() else ' ' for c in words)}")
    if not message.has_content():
        raise RefusedError("the reply is empty")
    arrays, metrics = message.content.array_records, message.content.metric_records
    if model is not None and len(arrays) != 1:
        raise RefusedError(f"{len(arrays)} records of arrays, not one")
    if len(metrics) != 1:
        raise RefusedError(f"{len(metrics)} records of metrics, not one")
    ((metrics_key, record),) = metrics.items()
    if weight_key not in record:
        raise RefusedError(f"no metric '{weight_key}'")
    count = record[weight_key]
    fault = count_fault(count) or (loss_fault(record.get(loss_key)) if loss_key else "") or _metric_fault(record)
    if fault or isinstance(count, list):
        raise RefusedError(fault)
    if model is None:
        return Reply(message, metrics_key, count)
    ((arrays_key, sent),) = arrays.items()
    received = _arrays(sent, model)
    reply = Reply(message, metrics_key, count, arrays_key, received)
    if received.keys() == model.keys() and list(received) != list(model):
        # Several strategies go by position: another order would mix arrays up.
        reply.arrays = {name: received[name] for name in model}
        reply.new_arrays = dict(reply.arrays)
    return reply


def _metric_fault(record: MetricRecord) -> str:
    """The first metric that no average survives; empty if there is none."""
    for name, value in record.items():
        for number in value if isinstance(value, list) else [value]:
            if not abs(number) <= LARGEST:  # NaN compares false, and a long integer need not be made a float
                return f"metric {name[:80]!r} is {str(number)[:20]}"
    return ""


def _arrays(sent: ArrayRecord, model: State) -> dict[str, NDArray[Any]]:
    """The arrays of a reply; those that the model does not have are left closed."""
    received: dict[str, NDArray[Any]] = {}
    for name, array in sent.items():
        if name not in model:
            received[name] = np.empty(0)
            continue
        if len(array.data) > model[name].size * WIDEST + NPY_HEADER:
            raise RefusedError(f"array '{name}' takes {len(array.data)} bytes, for {model[name].size} numbers")
        try:
            content = array.numpy()
        except Exception as error:  # the bytes are a stranger's: whatever is wrong with them, it is no array
            raise RefusedError(f"array '{name}' is unreadable ({type(error).__name__})") from error
        if not isinstance(content, np.ndarray):
            raise RefusedError(f"array '{name}' is no single array")
        received[name] = content
    return received
