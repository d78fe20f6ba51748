"""Replies that no client should send, to every strategy of Flower behind a `GuardedStrategy`, round after round.

Needs the extra `flower` (flwr >= 1.41, < 2).
"""

import copy
import gc
import logging
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import nn

from mithridate.core.batch import Batch
from mithridate.core.errors import UserError
from mithridate.core.registry import build
from mithridate.core.seeding import seeded_default
from mithridate.guard.flower import GuardedStrategy
from tests.guard.federation import (
    FIRST_NODE,
    NODES,
    STRATEGIES,
    Arrays,
    InProcessGrid,
    claiming,
    honest,
    pickled,
    reply_to,
    start,
)
from tools.faults.case import Result, drawn, exception_of

DEFENCES: tuple[Any, ...] = (
    *(None, None, {"name": "clip", "clip_norm": 0.2}, {"name": "bound_update", "clip_norm": 0.1}, {"name": "ema"}),
    *({"name": "gate"}, {"name": "chain", "parts": [{"name": "clip"}, {"name": "gate"}]}),
    {"name": "dgc", "lr": 1.0, "clip_norm": 0.2},
)

ROUNDS = 3

Metrics = dict[str, Any]


@dataclass
class Flower:
    """Replies by number of the federation, in which some of twelve clients send what they should not."""

    seed: int
    shared: Path
    full: int = 440
    loggers: list[str] = field(default_factory=lambda: ["flwr", "mithridate"])

    def prepare(self) -> None:
        """Make Flower quiet, and spare it the collection of garbage after every client."""
        for name in self.loggers:
            logging.getLogger(name).disabled = True
        gc.collect = lambda generation=2: 0

    def case(self, number: int, folder: Path) -> Result:
        """Run a federation, and look at its model and at who was refused."""
        rng = drawn("flower", self.seed, number)
        name = list(STRATEGIES)[number % len(STRATEGIES)]
        table = rng.choice(DEFENCES)
        counts = name != "QFedAvg"  # which multiplies in place, and cannot take a counter
        with_module = (table is not None and table["name"] != "clip") or rng.random() < 0.3
        module = _module(counts=counts) if with_module else None
        before = {k: v.numpy() for k, v in (module.state_dict() if module else _state()).items()}
        before = {k: v for k, v in before.items() if counts or v.dtype.kind == "f"}
        hostile = Hostile(rng, rng.sample(range(FIRST_NODE, FIRST_NODE + NODES), rng.randint(1, 5)))
        what = f"{name}, {table}"
        random.seed(number)  # Flower draws clients with the global generator
        try:
            guarded = GuardedStrategy(
                STRATEGIES[name](),
                None if table is None else build("defence", table),
                module=module,
                trusted=None if module is None else _trusted(),
                report_path=folder / "guard.jsonl",
            )
            result = guarded.start(
                grid=cast("Grid", InProcessGrid(hostile.app, NODES, tamper=lambda replies: [*chain(*replies)])),
                initial_arrays=ArrayRecord({k: Array(v) for k, v in before.items()}),
                num_rounds=ROUNDS,
            )
        except UserError as error:
            outcome, said = "exception", f"nobody's mistake: {exception_of(error)}"
        except Exception as error:  # that is what is looked for
            outcome, said = "exception", exception_of(error)
        else:
            said = _fault(before, result, guarded, hostile)
            outcome = "silent" if said else "refused" if any(e.event == "refused" for e in guarded.events) else "same"
        return Result(outcome, f"{what}; {'; '.join(hostile.did)}", said, max(1, len(hostile.did)))  # type: ignore[arg-type]


def _fault(before: Arrays, result: Any, guarded: GuardedStrategy, hostile: "Hostile") -> str:  # noqa: ANN401  (Flower's)
    """What is wrong with the end of a federation."""
    arrays = {k: a.numpy() for k, a in (result.arrays or {}).items()}
    if arrays and arrays.keys() != before.keys():
        return f"the model has other arrays: {sorted(arrays)}"
    for key, array in arrays.items():
        if array.shape != before[key].shape:
            return f"'{key}' has shape {array.shape}"
        if not np.isfinite(array).all():
            return f"'{key}' is not finite"
    for rounds in (result.train_metrics_clientapp, result.evaluate_metrics_clientapp):
        for metrics in rounds.values():
            for key, value in dict(metrics).items():
                if not np.isfinite(np.asarray(value, dtype=float)).all():
                    return f"the metric {key} is {value}"
    wronged = [e for e in guarded.events if e.event == "refused" and e.node not in hostile.nodes]
    if wronged:
        return f"an honest client was refused: {wronged[0].reason}"
    return ""


class Hostile:
    """Clients that send what they should not.

    Args:
        rng: Decides what.
        nodes: Their numbers.
    """

    def __init__(self, rng: Random, nodes: list[int]) -> None:
        self.rng, self.nodes = rng, nodes
        self.did: list[str] = []
        self.habit = rng.choice([None, *ARRAYS, *METRICS, *RECORDS])

    def app(self, message: Message, _: object) -> list[Message]:
        """What a client sends to a message: one reply, mostly."""
        arrays, metrics = honest(message)
        if message.metadata.dst_node_id not in self.nodes:
            return [reply_to(message, arrays, metrics)]
        train = message.metadata.message_type == "train"
        kinds: list[Mapping[str, Any]] = [METRICS, RECORDS, *([ARRAYS] * 2 if train else [])]
        hows = [self.rng.choice(list(self.rng.choice(kinds))) for _ in range(self.rng.choice([1, 1, 2]))]
        if self.habit is not None and self.rng.random() < 0.5:  # so that several do the same
            hows = [self.habit]
        for how in hows:
            if how in ARRAYS and train:
                ARRAYS[how](arrays, self.rng)
            elif how in METRICS:
                METRICS[how](metrics, self.rng)
        replies = [reply_to(message, arrays, metrics)]
        for how in hows:
            if how in RECORDS:
                replies = RECORDS[how](replies, message, self.rng)
        self.did.append(f"{message.metadata.dst_node_id}: {' and '.join(hows)}")
        return replies


def _each(change: Callable[[np.ndarray[Any, Any]], Any]) -> Callable[[Arrays, Random], None]:
    """Other numbers in one array of floats, or in all."""

    def spoil(arrays: Arrays, rng: Random) -> None:
        floats = [k for k, v in arrays.items() if v.dtype.kind == "f" and v.ndim]
        for key in floats if rng.random() < 0.3 else rng.sample(floats, min(1, len(floats))):
            arrays[key] = np.asarray(change(arrays[key]))

    return spoil


def _as(dtype: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array.astype(dtype)


def _filled(value: float, *, first: bool = False) -> Callable[[Arrays, Random], None]:
    def change(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        array = array.copy()
        array.reshape(-1)[: 1 if first else None] = value
        return array

    return _each(change)


def _counter(value: Any) -> Callable[[Arrays, Random], None]:  # noqa: ANN401  (an array of any kind)
    def spoil(arrays: Arrays, _: Random) -> None:
        arrays.update({k: np.asarray(value) for k in arrays if "batches" in k})

    return spoil


def _lacking(arrays: Arrays, rng: Random) -> None:
    if arrays:
        arrays.pop(rng.choice(list(arrays)))


def _more(arrays: Arrays, rng: Random) -> None:
    arrays[rng.choice(["more", "", "weight ", "名", "x" * 5000])] = np.zeros(9, "float32")


def _renamed(arrays: Arrays, rng: Random) -> None:
    if arrays:
        key = rng.choice(list(arrays))
        arrays[key.upper()] = arrays.pop(key)


def _reordered(arrays: Arrays, _: Random) -> None:
    items = list(arrays.items())[::-1]
    arrays.clear()
    arrays.update(items)


def _exchanged(arrays: Arrays, _: Random) -> None:
    values = list(arrays.values())[::-1]
    arrays.update(zip(list(arrays), values, strict=True))


ARRAYS: dict[str, Callable[[Arrays, Random], None]] = {
    **{
        f"filled with {v:g}": _filled(v)
        for v in (math.nan, math.inf, -math.inf, 0, -1, 1e8, 1e20, 1e38, 3e38, -3e38, 1e-40)
    },
    **{f"{v:g} once": _filled(v, first=True) for v in (math.nan, math.inf, 1e8, 3e38)},
    **{
        f"as {t}": _each(partial(_as, t))
        for t in ("float16", "float64", "int32", "complex64", "bool", ">f4", "U8", "longdouble")
    },
    "another shape": _each(lambda a: a.T[None]),
    "flat": _each(lambda a: a.reshape(-1)),
    "shorter": _each(lambda a: a[:1]),
    "empty": _each(lambda a: a[:0]),
    "a single number": _each(lambda a: a.reshape(-1)[0]),
    "Fortran order": _each(np.asfortranarray),
    "a counter of -1": _counter(-1),
    "a counter of 2**62": _counter(2**62),
    "a counter of NaN": _counter(math.nan),
    "a list of counters": _counter([1, 2]),
    "no arrays in the record": lambda arrays, _: arrays.clear(),
    "an array is missing": _lacking,
    "one array more": _more,
    "an array of another name": _renamed,
    "another order": _reordered,
    "arrays exchanged": _exchanged,
}


def _metric(key: str, value: Any) -> Callable[[Metrics, Random], None]:  # noqa: ANN401  (a number or a list)
    return lambda metrics, _: metrics.update({key: value})


NUMBERS: tuple[Any, ...] = (
    0,
    -5,
    1,
    0.0,
    -0.0,
    -5.0,
    1e-320,
    1e305,
    math.nan,
    math.inf,
    -math.inf,
    10**18,
    2**63 - 1,
    -(2**63),
)

METRICS: dict[str, Callable[[Metrics, Random], None]] = {
    **{f"{v!r} examples": _metric("num-examples", v) for v in NUMBERS},
    **{f"a loss of {v!r}": _metric("train-loss", v) for v in NUMBERS},
    **{f"an accuracy of {v!r}": _metric("accuracy", v) for v in NUMBERS},
    "a list of losses": _metric("train-loss", [1.0]),
    "a longer list of losses": _metric("train-loss", [1.0, 2.0, 3.0]),
    "a list of accuracies": _metric("accuracy", [0.5, 0.5]),
    "an empty list": _metric("accuracy", []),
    "a list of examples": _metric("num-examples", [50]),
    "a whole number for a loss": _metric("train-loss", 1),
    "a metric of its own": _metric("mine", 1.0),
    "a metric of the guard's": _metric("guard-accepted", 99),
    "a metric with a long name": _metric("m" * 10_000, 1.0),
    "no number of examples": lambda metrics, _: metrics.pop("num-examples", None),
    "no loss": lambda metrics, _: metrics.pop("train-loss", None),
    "no metrics in the record": lambda metrics, _: metrics.clear(),
    "metrics in another order": lambda metrics, _: metrics.update([(k, metrics.pop(k)) for k in list(metrics)[::-1]]),
}


Replies = list[Message]


def _content(change: Callable[[RecordDict], Any]) -> Callable[[Replies, Message, Random], Replies]:
    def spoil(replies: Replies, _: Message, __: Random) -> Replies:
        for reply in replies:
            if not reply.has_error():
                change(reply.content)
        return replies

    return spoil


def _dropped(*keys: str) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        for key in keys:
            if key in content:
                del content[key]

    return change


def _moved(key: str, to: str) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        if key in content:
            record = content[key]
            del content[key]
            content[to] = record

    return change


def _set(key: str, record: Callable[[], Any]) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content[key] = record()

    return change


def _bytes(data: Callable[[], bytes], stype: str = "numpy.ndarray") -> Callable[[RecordDict], None]:
    """Bytes that are no array, or another than they say."""

    def change(content: RecordDict) -> None:
        if "arrays" in content and len(content["arrays"]):
            record = content.array_records["arrays"]
            key = next(iter(record))
            record[key] = Array(record[key].dtype, record[key].shape, stype, data())

    return change


def _failed(_: Replies, message: Message, rng: Random) -> Replies:
    reason = rng.choice(["out of memory", "", "a\nINFO: b\x1b[2J", "名" * 5000, "[bold]x"])
    return [Message(Error(code=rng.choice([0, 1, 999]), reason=reason), reply_to=message)]


def _by_stranger(replies: Replies, _: Message, __: Random) -> Replies:
    stranger = copy.deepcopy(replies[0])
    stranger.metadata.__dict__["_src_node_id"] = FIRST_NODE + NODES + 7
    return [*replies, stranger]


RECORDS: dict[str, Callable[[Replies, Message, Random], Replies]] = {
    "an error": _failed,
    "no reply": lambda replies, _, __: [],
    "two replies": lambda replies, _, __: [*replies, copy.deepcopy(replies[0])] if replies else replies,
    "no arrays": _content(_dropped("arrays")),
    "no metrics": _content(_dropped("metrics")),
    "nothing": _content(_dropped("arrays", "metrics")),
    "arrays by another name": _content(_moved("arrays", "model")),
    "metrics by another name": _content(_moved("metrics", "numbers")),
    "two records of arrays": _content(_set("more", ArrayRecord)),
    "two records of metrics": _content(_set("others", lambda: MetricRecord({"num-examples": 1}))),
    "a record of settings": _content(_set("config", lambda: ConfigRecord({"lr": 1.0, "name": "x"}))),
    "arrays where metrics belong": _content(_set("metrics", ArrayRecord)),
    "metrics where arrays belong": _content(_set("arrays", MetricRecord)),
    "no bytes": _content(_bytes(bytes)),
    "unreadable bytes": _content(_bytes(lambda: b"no array")),
    "a pickle": _content(_bytes(pickled)),
    "a megabyte": _content(_bytes(lambda: bytes(10**6))),
    "a claim of a trillion numbers": _content(_bytes(lambda: claiming((10**12,)))),
    "a claim, and no numbers": _content(_bytes(lambda: claiming((4, 3)))),
    "a negative shape": _content(_bytes(lambda: claiming((-4, -3)))),
    "a foreign format": _content(_bytes(bytes, "torch.pickle")),
}


def _state() -> dict[str, torch.Tensor]:
    """A model as arrays: weights, a bias, and what BatchNorm keeps."""
    state = start()
    counter = state.pop("batches")
    return {
        **state,
        "norm.running_mean": torch.zeros(4),
        "norm.running_var": torch.ones(4),
        "norm.num_batches_tracked": counter,
    }


def _module(*, counts: bool = True) -> nn.Module:
    """A small classifier; with BatchNorm, and so a counter, or without."""
    with seeded_default(0):
        norm: list[nn.Module] = [nn.BatchNorm1d(5)] if counts else []
        return nn.Sequential(nn.Linear(3, 5), *norm, nn.ReLU(), nn.Linear(5, 2))


def _trusted() -> Any:  # noqa: ANN401  (a batch)
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    return Batch(x, (x[:, 0] > 0).long())


def make(seed: int, shared: Path) -> Flower:
    """The kind, for a seed, with what its cases share in a folder."""
    return Flower(seed, shared)
