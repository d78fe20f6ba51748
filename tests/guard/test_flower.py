"""The guard around Flower's own strategies, in one process."""

import copy
import json
import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.exception import AggregationError
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedXgbBagging,
    QFedAvg,
    Strategy,
)

from mithridate.core.batch import Batch
from mithridate.core.defence import ADMITTED, Defence, Verdict
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.model import WhiteBox
from mithridate.core.past import Weights
from mithridate.core.registry import build
from mithridate.core.seeding import seeded_default
from mithridate.core.tolerance import Quality, quality
from mithridate.core.updates import Updates
from mithridate.core.view import Need, View
from mithridate.defences.at import AT
from mithridate.defences.bound_update import BoundUpdate
from mithridate.defences.chain import chain
from mithridate.defences.clip import Clip
from mithridate.defences.dgc import DGC
from mithridate.defences.ema import Ema
from mithridate.defences.gate import Gate
from mithridate.defences.skip import Skip
from mithridate.guard.flower import GuardedStrategy
from mithridate.guard.limits import RECOMMENDED, ReplyLimits
from tests.guard.federation import NODES, STRATEGIES, claiming, honest, pickled, reply_to, start

MakeGrid = Callable[..., Any]
Spoil = Callable[[Message], Message]


def client(message: Message, context: Any) -> Message:
    return reply_to(message, *honest(message))


def run(strategy: Strategy, grid: Any, rounds: int = 3) -> Any:
    return strategy.start(grid=grid, initial_arrays=ArrayRecord(initial(strategy)), num_rounds=rounds)


def initial(strategy: Strategy) -> dict[str, torch.Tensor]:
    """The model; QFedAvg multiplies in place, and so cannot take an integer counter."""
    inner = strategy.inner if isinstance(strategy, GuardedStrategy) else strategy
    return {k: v for k, v in start().items() if k != "batches" or not isinstance(inner, QFedAvg)}


def arrays_of(result: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {name: array.numpy() for name, array in result.arrays.items()}


@pytest.mark.parametrize("name", STRATEGIES)
def test_with_nothing_to_object_to_the_inner_strategy_is_untouched(name: str, make_grid: MakeGrid) -> None:
    random.seed(1)
    plain = run(STRATEGIES[name](), make_grid(client, NODES))
    random.seed(1)
    guarded = GuardedStrategy(STRATEGIES[name]())
    behind = run(guarded, make_grid(client, NODES))
    for key, array in arrays_of(plain).items():
        other = arrays_of(behind)[key]
        assert array.dtype == other.dtype
        assert array.tobytes() == other.tobytes()
    assert not np.array_equal(arrays_of(plain)["weight"], start()["weight"].numpy())
    for number, metrics in plain.train_metrics_clientapp.items():
        mine = dict(behind.train_metrics_clientapp[number])
        assert mine["guard-accepted"] == NODES
        assert {k: v for k, v in mine.items() if not k.startswith("guard-")} == dict(metrics)
    assert {e.event for e in guarded.events} == {"closed"}


def with_arrays(message: Message, change: Callable[[dict[str, np.ndarray[Any, Any]]], Any]) -> Message:
    """The same reply with other arrays."""
    state = {name: array.numpy().copy() for name, array in message.content.array_records["arrays"].items()}
    made = change(state)
    state = made if isinstance(made, dict) else state
    message.content["arrays"] = ArrayRecord({name: Array(np.asarray(array)) for name, array in state.items()})
    return message


def with_metrics(message: Message, **values: Any) -> Message:
    """The same reply with other metrics (underscores are dashes); None takes one out."""
    metrics = dict(message.content.metric_records["metrics"])
    for key, value in values.items():
        metrics[key.replace("_", "-")] = value
    message.content["metrics"] = MetricRecord({k: v for k, v in metrics.items() if v is not None})
    return message


def without(message: Message, *keys: str) -> Message:
    for key in keys:
        del message.content[key]
    return message


def with_data(message: Message, data: bytes, stype: str = "numpy.ndarray") -> Message:
    message.content.array_records["arrays"]["weight"] = Array("float32", (4, 3), stype, data)
    return message


def added(message: Message, key: str, record: Any) -> Message:
    message.content[key] = record
    return message


def npz() -> bytes:
    buffer = BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


def as_type(message: Message, dtype: str) -> Message:
    return with_arrays(message, lambda s: {**s, "weight": s["weight"].astype(dtype)})


def with_error(message: Message, reason: str) -> Message:
    return Message(Error(code=1, reason=reason), reply_to=message)


def renamed(message: Message) -> Message:
    """The arrays in a record of another name."""
    arrays = message.content["arrays"]
    return added(without(message, "arrays"), "model", arrays)


GARBAGE: dict[str, tuple[Spoil, str]] = {
    "an error": (lambda m: with_error(m, "out of memory"), "error: out of memory"),
    "an error that forges lines": (lambda m: with_error(m, "a\nINFO: b\x1b[2J"), "error: a INFO: b [2J"),
    "arrays, but none in it": (lambda m: with_arrays(m, lambda s: {}), "is missing, and 2 more"),
    "integers": (lambda m: as_type(m, "int32"), "is int32, not float32"),
    "complex numbers": (lambda m: as_type(m, "complex64"), "is complex64, not float32"),
    "text": (lambda m: as_type(m, "U8"), "not float32"),
    "numbers wider than torch's": (lambda m: as_type(m, "longdouble"), "not float32"),
    "bytes the other way round": (lambda m: as_type(m, ">f4"), "is >f4, not float32"),
    "a claim of a trillion numbers": (lambda m: with_data(m, claiming((10**12,))), "unreadable"),
    "a claim of the right shape, but no numbers": (lambda m: with_data(m, claiming((4, 3))), "unreadable"),
    "a negative shape": (lambda m: with_data(m, claiming((-4, -3))), "unreadable"),
    "NaN": (lambda m: with_arrays(m, lambda s: s["weight"].fill(np.nan)), "NaN or infinite"),
    "one infinity": (lambda m: with_arrays(m, lambda s: s["bias"].__setitem__(0, np.inf)), "holds 1 of 4"),
    "1e30": (lambda m: with_arrays(m, lambda s: s["weight"].fill(1e30)), "limit 1e+09"),
    "another shape": (lambda m: with_arrays(m, lambda s: {**s, "weight": s["weight"].T}), "has shape (3, 4)"),
    "another length": (lambda m: with_arrays(m, lambda s: {**s, "bias": s["bias"][:2]}), "has shape (2,)"),
    "half precision": (lambda m: with_arrays(m, lambda s: {**s, "bias": s["bias"].astype("float16")}), "is float16"),
    "a missing array": (lambda m: with_arrays(m, lambda s: s.pop("bias")), "'bias' is missing"),
    "an extra array": (lambda m: with_arrays(m, lambda s: {**s, "more": np.zeros(9)}), "unknown array 'more'"),
    "no arrays": (lambda m: without(m, "arrays"), "0 records of arrays"),
    "two records of arrays": (lambda m: added(m, "more", ArrayRecord()), "2 records of arrays"),
    "no metrics": (lambda m: without(m, "metrics"), "0 records of metrics"),
    "nothing": (lambda m: without(m, "arrays", "metrics"), "0 records of arrays"),
    "unreadable bytes": (lambda m: with_data(m, b"no array"), "unreadable"),
    "a pickle": (lambda m: with_data(m, pickled()), "unreadable (ValueError)"),
    "an archive": (lambda m: with_data(m, npz()), "no single array"),
    "a megabyte": (lambda m: with_data(m, bytes(10**6)), "takes 1000000 bytes, for 12 numbers"),
    "a foreign format": (lambda m: with_data(m, b"", "torch.pickle"), "unreadable (TypeError)"),
    "no number of examples": (lambda m: with_metrics(m, num_examples=None), "no metric 'num-examples'"),
    "an infinite number": (lambda m: with_metrics(m, num_examples=math.inf), "number of examples is inf"),
    "a loss without bound": (lambda m: with_metrics(m, train_loss=1e305), "'train-loss' is 1e+305"),
    "a negative number": (lambda m: with_metrics(m, num_examples=-50), "number of examples is -50"),
    "no examples": (lambda m: with_metrics(m, num_examples=0), "it must be above 0"),
    "a number that is none": (lambda m: with_metrics(m, num_examples=math.nan), "number of examples is nan"),
    "a list of numbers": (lambda m: with_metrics(m, num_examples=[50]), "is a list"),
    "a loss that is none": (lambda m: with_metrics(m, train_loss=math.nan), "'train-loss' is nan"),
    "a metric of its own": (lambda m: with_metrics(m, mine=1), "unlike those of most clients"),
    "a list for a metric": (lambda m: with_metrics(m, train_loss=[1.0]), "unlike those of most clients"),
    "another name": (renamed, "unlike those of most clients"),
}


def spoiling(spoil: Spoil, *, nodes: Iterable[int] = (103,)) -> Callable[[list[Message]], list[Message]]:
    """Replace what some nodes send in every round of training."""

    def tamper(replies: list[Message]) -> list[Message]:
        out = []
        for reply in replies:
            hit = reply.metadata.src_node_id in nodes and reply.metadata.message_type == "train"
            made = spoil(reply) if hit else reply
            if made.has_error():  # made as a reply to a reply, it would come from the server
                made.metadata.__dict__["_src_node_id"] = reply.metadata.src_node_id
            out.append(made)
        return out

    return tamper


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_is_refused_and_named_and_every_round_completes(what: str, make_grid: MakeGrid, tmp_path: Path) -> None:
    spoil, words = GARBAGE[what]
    guarded = GuardedStrategy(FedAvg(), report_path=tmp_path / "guard.jsonl")
    result = run(guarded, make_grid(client, NODES, tamper=spoiling(spoil)))
    assert [m["guard-refused"] for m in result.train_metrics_clientapp.values()] == [1, 1, 1]
    assert [m["guard-accepted"] for m in result.train_metrics_clientapp.values()] == [NODES - 1] * 3
    refused = [e for e in guarded.events if e.event == "refused"]
    assert {e.node for e in refused} == {103}
    assert all(words in e.reason for e in refused), refused[0].reason
    others = 0.01 * np.mean([1 + i for i in range(NODES) if i != 3])
    np.testing.assert_allclose(arrays_of(result)["bias"], start()["bias"].numpy() + 3 * others, rtol=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "guard.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "opened"
    assert lines[0]["inner"] == "FedAvg"
    assert [(x["round"], x["node"]) for x in lines if x["event"] == "refused"] == [(1, 103), (2, 103), (3, 103)]


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_lives_through_garbage(name: str, make_grid: MakeGrid) -> None:
    """Three of twelve; Bulyan has enough left with seven."""
    kinds = dict(zip((100, 101, 102), ("NaN", "a missing array", "1e30"), strict=True))
    spoil = spoiling(lambda m: GARBAGE[kinds[m.metadata.src_node_id]][0](m), nodes=kinds)
    grid = make_grid(client, NODES, tamper=spoil)
    result = run(GuardedStrategy(STRATEGIES[name]()), grid)
    assert [m["guard-refused"] for m in result.train_metrics_clientapp.values()] == [3, 3, 3]
    for array in arrays_of(result).values():
        assert np.isfinite(array).all()
    assert not np.array_equal(arrays_of(result)["weight"], start()["weight"].numpy())


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("left", [0, 1, 2])
def test_every_strategy_lives_through_rounds_with_hardly_anybody_left(
    name: str, left: int, make_grid: MakeGrid
) -> None:
    """Some make no aggregate of so few; then the old model stays, and the report says so."""
    spoil = spoiling(GARBAGE["NaN"][0], nodes=range(100 + left, 100 + NODES))
    guarded = GuardedStrategy(STRATEGIES[name]())
    result = run(guarded, make_grid(client, NODES, tamper=spoil), rounds=2)
    assert [m["guard-accepted"] for m in result.train_metrics_clientapp.values()] == [left, left]
    skipped = [m["guard-skipped"] + m["guard-vetoed"] for m in result.train_metrics_clientapp.values()]
    assert set(skipped) == {int(left == 0 or name == "Bulyan")}
    if skipped[0]:
        assert result.arrays is None or not len(result.arrays)
        assert any("the old model stays" in e.reason for e in guarded.events)
    else:
        assert all(np.isfinite(array).all() for array in arrays_of(result).values())


def test_fortran_order_and_strides_are_no_fault(make_grid: MakeGrid) -> None:
    odd = spoiling(lambda m: with_arrays(m, lambda s: {**s, "weight": np.asfortranarray(s["weight"])}))
    guarded = GuardedStrategy(FedAvg(), Clip(clip_norm=0.2))
    result = run(guarded, make_grid(client, NODES, tamper=odd), rounds=1)
    plain = run(GuardedStrategy(FedAvg(), Clip(clip_norm=0.2)), make_grid(client, NODES), rounds=1)
    np.testing.assert_array_equal(arrays_of(result)["weight"], arrays_of(plain)["weight"])
    assert any(e.event == "bounded" for e in guarded.events)
    assert not any(e.event == "refused" for e in guarded.events)


def test_unguarded_such_replies_end_the_run_or_ruin_the_model(make_grid: MakeGrid) -> None:
    """What the guard is for: else the tests above would show nothing."""
    result = run(FedAvg(), make_grid(client, NODES, tamper=spoiling(GARBAGE["NaN"][0])))
    assert np.isnan(arrays_of(result)["weight"]).all()
    with pytest.raises(Exception, match="same keys"):
        run(FedAvg(), make_grid(client, NODES, tamper=spoiling(GARBAGE["a missing array"][0])))


def test_strangers_duplicates_and_the_silent_are_noted(make_grid: MakeGrid) -> None:
    def tamper(replies: list[Message]) -> list[Message]:
        if replies[0].metadata.message_type != "train":
            return replies
        stranger = copy.deepcopy(replies[0])
        stranger.metadata.__dict__["_src_node_id"] = 999
        return [*replies[:-1], replies[0], stranger]

    guarded = GuardedStrategy(FedAvg())
    run(guarded, make_grid(client, NODES, tamper=tamper), rounds=1)
    seen = {(e.event, e.reason) for e in guarded.events}
    assert ("refused", "a second reply in this round") in seen
    assert ("refused", "it was not asked in this round") in seen
    assert ("missing", "no reply") in seen
    assert guarded.events[-2].counts["accepted"] == NODES - 1


def test_an_absurd_number_of_examples_is_capped(make_grid: MakeGrid) -> None:
    claim = spoiling(lambda m: with_metrics(m, num_examples=10**15))
    alone = run(FedAvg(), make_grid(client, NODES, tamper=claim), rounds=1)
    guarded = GuardedStrategy(FedAvg(), limits=ReplyLimits(max_examples_ratio=2.0))
    held = run(guarded, make_grid(client, NODES, tamper=claim), rounds=1)
    moves = [0.01 * (1 + i) for i in range(NODES)]
    before = start()["bias"].numpy()
    np.testing.assert_allclose(arrays_of(alone)["bias"] - before, moves[3], rtol=1e-4)  # its word is the average
    expected = (sum(moves) + moves[3]) / (NODES + 1)  # it counts twice
    np.testing.assert_allclose(arrays_of(held)["bias"] - before, expected, rtol=1e-4)
    assert [(e.node, e.event) for e in guarded.events if e.node] == [(103, "capped")]


def test_clipping_bounds_what_one_client_can_do(make_grid: MakeGrid) -> None:
    far = spoiling(lambda m: with_arrays(m, lambda s: s["bias"].__iadd__(1e6)))
    guarded = GuardedStrategy(FedAvg(), Clip(clip_norm=0.2))
    result = run(guarded, make_grid(client, NODES, tamper=far), rounds=1)
    move = np.concatenate([(arrays_of(result)[k] - start()[k].numpy()).ravel() for k in ("weight", "bias")])
    assert np.linalg.norm(move) <= 0.2 + 1e-5
    lengths = [0.01 * (1 + i) * 4 for i in range(NODES)]  # sixteen weights, each moved by a hundredth of the number
    bounded = {e.node: e.reason for e in guarded.events if e.event == "bounded"}
    assert set(bounded) == {100 + i for i in range(NODES) if lengths[i] > 0.2 or i == 3}
    assert result.train_metrics_clientapp[1]["guard-bounded"] == len(bounded)
    assert bounded[103] == "update of l2 length 2e+06, bounded to 0.2"


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_bounded_update_keeps_its_direction_and_its_type(make_grid: MakeGrid, norm: Any) -> None:
    """What the inner strategy gets of a client that is the only one, and of one that is within the bound."""
    passed: list[dict[str, np.ndarray[Any, Any]]] = []

    class Watching(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            replies = list(replies)
            passed.extend({k: a.numpy() for k, a in m.content.array_records["arrays"].items()} for m in replies)
            return super().aggregate_train(server_round, replies)

    turned = spoiling(lambda m: with_arrays(m, lambda s: s["bias"].__iadd__(np.array([0, -3, 0, 4]))), nodes=(100,))
    bound = 0.05 if norm == "l2" else 0.02
    run(GuardedStrategy(Watching(), Clip(clip_norm=bound, norm=norm)), make_grid(client, 2, tamper=turned), rounds=1)
    change = np.concatenate([np.full(12, 0.01), 0.01 + np.array([0, -3, 0, 4])])
    expected = change * bound / np.linalg.norm(change, ord=2 if norm == "l2" else np.inf)
    for arrays, wanted in zip(passed, (expected, np.full(16, 0.02 if norm == "linf" else 0.0125)), strict=True):
        assert {k: a.dtype for k, a in arrays.items()} == {"weight": "float32", "bias": "float32", "batches": "int64"}
        assert arrays["batches"] == 1
        found = np.concatenate([(arrays[k] - start()[k].numpy()).ravel() for k in ("weight", "bias")])
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_statistics_are_bounded_by_themselves(make_grid: MakeGrid) -> None:
    """The bias plays the statistics: it moves far, and the weights are to keep their update all the same."""
    far = spoiling(lambda m: with_arrays(m, lambda s: s["bias"].__iadd__(100.0)), nodes=range(100, 100 + NODES))

    def moves(defence: Defence | None = None, **limits: Any) -> tuple[float, float]:
        guarded = GuardedStrategy(FedAvg(), defence, limits=ReplyLimits(**limits))
        result = run(guarded, make_grid(client, NODES, tamper=far), rounds=1)
        change = [np.linalg.norm(arrays_of(result)[k] - start()[k].numpy()) for k in ("weight", "bias")]
        return float(change[0]), float(change[1])

    free = moves()
    together = moves(Clip(clip_norm=0.5))
    apart = moves(Clip(clip_norm=0.5), statistics=("bias",))
    bounded = moves(Clip(clip_norm=0.5), statistics=("b??s",), statistics_clip_norm=2.0)
    assert together[0] < 0.01 * free[0]
    assert apart == pytest.approx(free, rel=1e-5)
    assert bounded == pytest.approx((free[0], 2.0), rel=1e-5)
    with pytest.raises(ConfigError, match="fits no array"):
        moves(statistics=("averages",))


class Normalised(nn.Module):
    """The classifier of `start` with the mean of what it saw, and a layer that is not trained."""

    mean: torch.Tensor
    scale: nn.Parameter
    weight: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(4))
        self.scale = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) * self.scale @ self.weight.T + self.bias


def test_with_a_module_buffers_and_frozen_parameters_are_known(make_grid: MakeGrid) -> None:
    """One client moves all of them; what it may not touch comes back as it was, in every round."""

    def training(message: Message, context: Any) -> Message:
        module = Normalised()
        module.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        with torch.no_grad():
            module.mean.add_(1.0)
            module.weight.add_(0.1)
            if context.node_config["partition-id"] == 0:
                module.mean.add_(50.0)
                module.scale.add_(5.0)
        metrics = MetricRecord({"num-examples": 50})
        return Message(RecordDict({"arrays": ArrayRecord(module.state_dict()), "metrics": metrics}), reply_to=message)

    limits = ReplyLimits(statistics_clip_norm=2.0)
    guarded = GuardedStrategy(FedAvg(fraction_evaluate=0.0), Clip(clip_norm=100.0), limits=limits, module=Normalised())
    result = guarded.start(
        grid=make_grid(training, 4), initial_arrays=ArrayRecord(Normalised().state_dict()), num_rounds=2
    )
    honest = math.sqrt(3)
    np.testing.assert_allclose(arrays_of(result)["mean"], 2 * (3 + 2 / honest) / 4, rtol=1e-6)
    np.testing.assert_array_equal(arrays_of(result)["scale"], 1.0)
    np.testing.assert_allclose(arrays_of(result)["weight"], 0.2, rtol=1e-6)
    said = [e.reason for e in guarded.events if e.event == "bounded" and e.round == 2]
    assert said == ["statistics of l2 length 88.33, bounded to 2", "it moved 'scale', which is frozen; put back"]
    assert {e.node for e in guarded.events if e.event == "bounded"} == {100}


def test_a_federation_goes_on_from_the_arrays_that_another_ended_with(make_grid: MakeGrid) -> None:
    """Their types are wider than those that clients send."""
    ended = run(FedAdam(), make_grid(client, NODES), rounds=1)
    assert ended.arrays["weight"].dtype == "float64"
    arrays = {name.replace("batches", "num_batches_tracked"): array for name, array in ended.arrays.items()}

    def counting(message: Message, context: Any) -> Message:
        state = dict(message.content.array_records["arrays"].to_torch_state_dict())
        types = {"num_batches_tracked": torch.int64}
        state = {k: (v + 1).to(types.get(k, torch.float32)) for k, v in state.items()}
        metrics = MetricRecord({"num-examples": 50})
        return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)

    guarded = GuardedStrategy(FedAvg(fraction_evaluate=0.0))
    guarded.start(grid=make_grid(counting, NODES), initial_arrays=ArrayRecord(arrays), num_rounds=2)
    assert {e.event for e in guarded.events} == {"closed"}


def test_tallies_say_who_when_how_often_and_why(make_grid: MakeGrid) -> None:
    kinds = {103: "NaN", 104: "1e30", 105: "an error that forges lines"}
    rounds = iter(range(1, 100))

    def tamper(replies: list[Message]) -> list[Message]:
        if replies[0].metadata.message_type != "train":
            return [with_metrics(m, accuracy=math.inf) if m.metadata.src_node_id == 106 else m for m in replies]
        number = next(rounds)
        if number == 4:
            return replies
        spoilt = spoiling(lambda m: GARBAGE[kinds[m.metadata.src_node_id]][0](m), nodes=kinds)(replies)
        return spoiling(lambda m: with_arrays(m, lambda s: s["bias"].__iadd__(number)), nodes=(107,))(spoilt)

    guarded = GuardedStrategy(FedAvg(), Clip(clip_norm=1.0))
    run(guarded, make_grid(client, NODES, tamper=tamper), rounds=5)
    tallies = {(t.node, t.event, t.phase): t for t in guarded.tallies()}
    assert len(tallies) == len(guarded.tallies()) == 5  # bounded at another length each round: one line all the same
    assert tallies[103, "refused", "train"].rounds == (1, 2, 3, 5)
    assert tallies[103, "refused", "train"].times == 4
    assert "NaN or infinite" in tallies[103, "refused", "train"].reason
    assert "limit 1e+09" in tallies[104, "refused", "train"].reason
    assert tallies[106, "refused", "evaluate"].times == 5
    assert "bounded to 1" in tallies[107, "bounded", "train"].reason
    assert [t.event for t in guarded.tallies()] == ["refused"] * 4 + ["bounded"]

    def shown(most: int) -> str:
        console = Console(file=StringIO(), width=120)
        console.print(guarded.table(most))
        assert isinstance(console.file, StringIO)
        return console.file.getvalue()

    text = shown(50)
    assert "The guard in 5 rounds: 17 refused, 4 bounded" in text
    assert "1-3, 5" in text
    assert "refused (evaluate)" in text
    assert "b [2J" in text  # shown as text, neither markup nor a code for the terminal
    assert "and 4 more rows" in shown(1)


def test_a_table_of_a_quiet_run_says_so(make_grid: MakeGrid) -> None:
    guarded = GuardedStrategy(FedAvg())
    run(guarded, make_grid(client, NODES), rounds=2)
    assert guarded.tallies() == []
    assert "2 rounds: nothing to object to" in str(guarded.table().title)


def test_the_report_has_whole_lines_after_ctrl_c(tmp_path: Path) -> None:
    """A process that only reports is interrupted; what it wrote can be read to the end."""
    report = tmp_path / "guard.jsonl"
    script = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in a background job
        "from pathlib import Path\n"
        "from mithridate.guard.events import Event, Journal\n"
        "journal = Journal(Path(sys.argv[1]), {})\n"
        "while True:\n"
        "    journal.note(Event(1, 'train', 'bounded', 7, 'x' * 5000))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(report)], stderr=subprocess.PIPE) as process:  # noqa: S603  (a fixed command)
        deadline = time.monotonic() + 60
        while not report.exists() or report.stat().st_size < 200_000:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, words = process.communicate(timeout=60)
    assert b"KeyboardInterrupt" in words
    text = report.read_text()
    assert text.endswith("\n")
    assert all(len(json.loads(line)["reason"]) == 5000 for line in text.splitlines()[1:])


@pytest.mark.parametrize("name", STRATEGIES)
def test_arrays_in_another_order_are_put_in_order(name: str, make_grid: MakeGrid) -> None:
    """Some strategies go by position, QFedAvg for one."""
    swap = spoiling(lambda m: with_arrays(m, lambda s: dict(reversed(s.items()))), nodes=range(100, 107))
    result = run(GuardedStrategy(STRATEGIES[name]()), make_grid(client, NODES, tamper=swap), rounds=1)
    plain = run(STRATEGIES[name](), make_grid(client, NODES), rounds=1)
    for key, array in arrays_of(plain).items():
        np.testing.assert_array_equal(arrays_of(result)[key], array)


class Linear(nn.Linear):
    """The classifier whose state `start` is; QFedAvg's has no counter."""

    def __init__(self, *, counter: bool = True) -> None:
        super().__init__(3, 4)
        if counter:
            self.register_buffer("batches", torch.tensor(0))


def trusted() -> Batch:
    """Samples that the model of `start` answers rightly."""
    x = torch.rand(40, 3, generator=torch.Generator().manual_seed(1))
    return Batch(x, (x @ start()["weight"].T + start()["bias"]).argmax(1))


def guarding(defence: Defence, inner: Strategy | None = None, **options: Any) -> GuardedStrategy:
    return GuardedStrategy(inner or FedAvg(), defence, module=Linear(), trusted=trusted(), **options)


def quality_of(arrays: dict[str, np.ndarray[Any, Any]]) -> Quality:
    module = Linear()
    module.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in arrays.items()})
    return quality(WhiteBox(module, nn.functional.cross_entropy), trusted())


def reversing(rounds: set[int]) -> Callable[[list[Message]], list[Message]]:
    """All clients send the model reversed, in some rounds of training."""
    count = iter(range(1, 1000))

    def tamper(replies: list[Message]) -> list[Message]:
        if replies[0].metadata.message_type != "train" or next(count) not in rounds:
            return replies
        return [
            with_arrays(m, lambda s: {k: -3 * v if v.dtype.kind == "f" and v.ndim else v for k, v in s.items()})
            for m in replies
        ]

    return tamper


GATE = Gate(max_loss_rise=0.3, max_accuracy_drop=0.5, reference="best")


def test_a_vetoed_round_keeps_the_old_arrays(make_grid: MakeGrid) -> None:
    guarded = guarding(GATE)
    result = run(guarded, make_grid(client, NODES, tamper=reversing({2})), rounds=2)
    once = run(FedAvg(), make_grid(client, NODES), rounds=1)
    for name, array in arrays_of(once).items():
        np.testing.assert_array_equal(arrays_of(result)[name], array)
    metrics = list(result.train_metrics_clientapp.values())
    assert [m["guard-vetoed"] for m in metrics] == [0, 1]
    (veto,) = [e for e in guarded.events if e.event == "vetoed"]
    assert veto.round == 2
    assert "gate: trusted loss" in veto.reason
    broken = run(FedAvg(), make_grid(client, NODES, tamper=reversing({2})), rounds=2)
    wrong, right = quality_of(arrays_of(broken)), quality_of(arrays_of(result))
    assert veto.measures == pytest.approx({"loss": wrong.loss, "worst-accuracy": wrong.worst}, rel=1e-5)
    assert metrics[0]["guard-loss"] == pytest.approx(right.loss, rel=1e-5)
    assert metrics[0]["guard-worst-accuracy"] == right.worst
    assert wrong.loss > right.loss + 0.3


class Refusing(Defence):
    """Admits what it is told to."""

    needs = frozenset({Need.MODEL})

    def __init__(self) -> None:
        self.admits = True

    def admit(self, before: Weights, view: View) -> Verdict:
        return ADMITTED if self.admits else Verdict(admit=False)  # without a word


@pytest.mark.parametrize("name", ["FedAvgM", "FedAdam", "FedAdagrad", "FedYogi", "QFedAvg"])
def test_after_a_veto_the_inner_strategy_remembers_nothing_of_the_round(name: str, make_grid: MakeGrid) -> None:
    """Momentum of a vetoed round would carry the poison into the next."""
    defence = Refusing()
    strategy = GuardedStrategy(STRATEGIES[name](), defence, module=Linear(counter=name != "QFedAvg"))
    grid = make_grid(client, NODES)

    def one_round(number: int, arrays: ArrayRecord) -> ArrayRecord | None:
        replies = grid.send_and_receive(strategy.configure_train(number, arrays, ConfigRecord(), grid))
        return strategy.aggregate_train(number, replies)[0]

    first = one_round(1, ArrayRecord(initial(strategy)))
    assert first is not None
    twin = copy.deepcopy(strategy)
    grid.tamper = reversing({1})
    defence.admits = False
    assert one_round(2, first) is None
    assert [e.reason for e in strategy.events if e.event == "vetoed"] == ["the defence refused the step"]
    grid.tamper = list
    defence.admits = True
    after = one_round(3, first)
    strategy = twin
    straight = one_round(3, first)
    assert after is not None
    assert straight is not None
    for key, array in straight.items():
        np.testing.assert_array_equal(after[key].numpy(), array.numpy())


def test_a_wrapped_strategy_is_put_back_too(make_grid: MakeGrid) -> None:
    inner = FedAvgM(server_momentum=0.9)
    private = DifferentialPrivacyServerSideFixedClipping(
        inner, noise_multiplier=0.0, clipping_norm=1e6, num_sampled_clients=NODES
    )
    guarded = guarding(GATE, private, weight_key="num-examples")
    run(guarded, make_grid(client, NODES, tamper=reversing({1})), rounds=1)
    assert guarded.inner is private
    assert private.strategy is inner
    assert inner.momentum_vector is None


def test_small_rises_do_not_add_up_against_the_best(make_grid: MakeGrid) -> None:
    def creep(replies: list[Message]) -> list[Message]:
        if replies[0].metadata.message_type != "train":
            return replies
        return [
            with_arrays(m, lambda s: {k: 0.9 * v if v.dtype.kind == "f" and v.ndim else v for k, v in s.items()})
            for m in replies
        ]

    losses = {}
    for reference in ("best", "previous"):
        gate = Gate(max_loss_rise=0.1, max_accuracy_drop=math.inf, reference=reference)
        result = run(guarding(gate), make_grid(client, NODES, tamper=creep), 12)
        losses[reference] = quality_of(arrays_of(result)).loss
    first = quality_of({k: v.numpy() for k, v in start().items()}).loss
    assert losses["best"] <= first + 0.1
    assert losses["previous"] > first + 0.2


@pytest.mark.parametrize("name", ["FedAvg", "FedAvgM", "FedAdam"])
def test_a_shortened_step_becomes_the_global_model_and_the_inner_strategys(name: str, make_grid: MakeGrid) -> None:
    """FedAvgM goes on from the arrays that it gave, not from those that it is handed."""
    guarded = GuardedStrategy(STRATEGIES[name](), BoundUpdate(clip_norm=0.01), module=Linear())
    grid = make_grid(client, NODES)
    arrays = ArrayRecord(start())
    for number in (1, 2, 3):
        replies = grid.send_and_receive(guarded.configure_train(number, arrays, ConfigRecord(), grid))
        after, _ = guarded.aggregate_train(number, replies)
        assert after is not None
        change = np.concatenate([(after[k].numpy() - arrays[k].numpy()).ravel() for k in ("weight", "bias")])
        assert np.linalg.norm(change) == pytest.approx(0.01, rel=1e-3)
        arrays = after
    inner = guarded.inner
    if isinstance(inner, FedAvgM):
        assert inner.current_arrays is arrays
    (noted,) = {e.reason for e in guarded.events if e.event == "bounded"}
    assert noted == "the defence shortened the step of the aggregate"


def test_a_round_starts_from_the_global_arrays_whatever_became_of_the_module(make_grid: MakeGrid) -> None:
    """Somebody measures with it in between, and leaves it in another state."""
    module = Linear()

    def spoilt(number: int, arrays: ArrayRecord) -> None:
        nn.init.zeros_(module.weight)

    guarded = GuardedStrategy(FedAvg(), BoundUpdate(clip_norm=0.01), module=module)
    result = guarded.start(
        grid=make_grid(client, NODES), initial_arrays=ArrayRecord(start()), num_rounds=2, evaluate_fn=spoilt
    )
    change = np.concatenate([(arrays_of(result)[k] - start()[k].numpy()).ravel() for k in ("weight", "bias")])
    assert np.linalg.norm(change) == pytest.approx(0.02, rel=1e-3)


def test_an_average_is_served_beside_the_model_that_learns(make_grid: MakeGrid) -> None:
    guarded = GuardedStrategy(FedAvg(), Ema(decay=0.5), module=Linear())
    arrays = ArrayRecord(start())
    assert guarded.served_arrays(arrays) is arrays  # before the first round
    result = run(guarded, make_grid(client, NODES), rounds=2)
    step = 0.01 * np.mean([1 + i for i in range(NODES)])
    served = guarded.served_arrays(result.arrays)
    first = start()["bias"].numpy()
    np.testing.assert_allclose(arrays_of(result)["bias"], first + 2 * step, rtol=1e-5)
    # The average starts at the first model: half of it after one step, a quarter after two.
    np.testing.assert_allclose(served["bias"].numpy(), first + (0.25 + 0.5 * 2) * step, rtol=1e-5)
    assert served["bias"].dtype == result.arrays["bias"].dtype
    plain = GuardedStrategy(FedAvg())
    result = run(plain, make_grid(client, NODES), rounds=1)
    assert plain.served_arrays(result.arrays) is result.arrays


def test_the_recommended_chain_takes_back_a_hostile_round_and_serves_what_it_tested(make_grid: MakeGrid) -> None:
    """It needs no setting that belongs to a model: the same preset as in a simulation, with the guard's own limits."""
    recommended = build("defence", {"name": "chain", "preset": "recommended"})
    guarded = guarding(recommended, limits=RECOMMENDED)
    result = run(guarded, make_grid(client, NODES, tamper=reversing({2})), rounds=3)
    assert [event.round for event in guarded.events if event.event == "vetoed"] == [2]
    served = guarded.served_arrays(result.arrays)
    np.testing.assert_array_equal(served["bias"].numpy(), start()["bias"].numpy())  # until the first test, in round 11
    assert not np.array_equal(served["bias"].numpy(), arrays_of(result)["bias"])


def shift(message: Message) -> Message:
    """Node 103 strays along the bias that all classes share, which changes no answer; the others equally far aside."""
    mine = message.metadata.src_node_id
    return with_arrays(message, lambda s: s["bias"].__iadd__(2.0 if mine == 103 else np.array([4, 0, 0, 0])) is None)


@pytest.mark.parametrize(("flagged", "length"), [("clip", "0.5"), ("drop", "0")])
def test_discrepancy_bounds_only_those_whose_model_answers_otherwise(
    make_grid: MakeGrid, flagged: Any, length: str
) -> None:
    """The start of the federation is the checkpoint that is looked back at."""
    guarded = guarding(DGC(threshold=0.3, lr=1.0, clip_norm=0.5, flagged=flagged))
    run(guarded, make_grid(client, NODES, tamper=spoiling(shift, nodes=(103, 104))), rounds=2)
    bounded = [(e.round, e.node) for e in guarded.events if e.event == "bounded"]
    assert bounded == [(1, 104), (2, 104)]
    assert all(e.reason.endswith(f"bounded to {length}") for e in guarded.events if e.event == "bounded")


looked_at: list[float | None] = []


class Looking(DGC):
    """Keeps the old models that it looked at."""

    def bound(self, updates: Updates, view: View) -> Updates:
        old = self.old_model(view)
        looked_at.append(None if old is None else float(old.parameters["bias"][0]))
        return super().bound(updates, view)


@pytest.mark.parametrize(("old", "rounds_back"), [("back", 2), ("checkpoint", None)])
def test_looking_back_takes_the_model_of_then(make_grid: MakeGrid, old: Any, rounds_back: int | None) -> None:
    looked_at.clear()
    guarded = guarding(Looking(threshold=1e9, old=old, back=2, lr=1.0))
    run(guarded, make_grid(client, 2), rounds=5)
    step = 0.01 * 1.5
    models = [float(start()["bias"][0]) + number * step for number in range(5)]
    expected = [models[0]] * 5 if rounds_back is None else [None, None, *models[:3]]
    assert looked_at == [None if e is None else pytest.approx(e, abs=1e-5) for e in expected]


class Counting(Defence):
    """Keeps notes of what it was asked."""

    def begin(self, view: View) -> None:
        view.memory["begun"] = view.memory.get("begun", torch.tensor(0)) + 1

    def committed(self, view: View) -> None:
        view.memory["committed"] = view.memory.get("committed", torch.tensor(0)) + 1
        view.memory["step"] = torch.tensor(view.step)


def test_a_round_is_one_defended_step(make_grid: MakeGrid) -> None:
    """A round in which nothing can be aggregated is none; if the strategy raises, nothing stays."""

    class Failing(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            if server_round == 3:
                raise RuntimeError("disk full")
            return super().aggregate_train(server_round, replies)

    nan = spoiling(GARBAGE["NaN"][0], nodes=range(100, 100 + NODES))
    rounds = iter(range(1, 10))

    def second(replies: list[Message]) -> list[Message]:
        return nan(replies) if replies and next(rounds) == 2 else replies

    guarded = GuardedStrategy(Failing(fraction_evaluate=0.0), Counting())
    with pytest.raises(RuntimeError, match="disk full"):
        run(guarded, make_grid(client, NODES, tamper=second), rounds=4)
    step = guarded._step
    assert step is not None
    assert {k: int(v) for k, v in step.memory.items()} == {"begun": 1, "committed": 1, "step": 1}
    assert step.step == 1


def test_a_defence_may_look_at_many_updates_in_parts(make_grid: MakeGrid) -> None:
    """More clients than are shown at a time: each row comes once, is that of its client, and goes back to it."""
    seen: list[torch.Tensor] = []

    class Halving(Defence):
        def bound(self, updates: Updates, view: View) -> Updates:
            assert list(updates.shapes) == ["weight", "bias"]
            seen.append(updates.rows)
            return updates.scaled(torch.where(updates.lengths() > 0.42, 0.5, 1.0))

    nodes = 19
    guarded = GuardedStrategy(FedAvg(), Halving())
    result = run(guarded, make_grid(client, nodes), rounds=1)
    rows = torch.cat(seen)
    assert len(seen) > 1
    assert rows.dtype == torch.float64
    expected = -0.01 * torch.arange(1, nodes + 1, dtype=torch.float64).unsqueeze(1).expand(nodes, 16)
    torch.testing.assert_close(rows, expected, atol=1e-6, rtol=0)  # a gradient: what was taken away
    moves = [0.01 * n * (0.5 if 0.04 * n > 0.42 else 1) for n in range(1, nodes + 1)]
    np.testing.assert_allclose(arrays_of(result)["bias"] - start()["bias"].numpy(), np.mean(moves), rtol=1e-4)


def test_nobody_sampled_is_a_round_too(make_grid: MakeGrid) -> None:
    none = FedAvg(fraction_train=0.0, min_train_nodes=0, fraction_evaluate=0.0)
    result = run(GuardedStrategy(none), make_grid(client, NODES), rounds=2)
    assert [m["guard-accepted"] for m in result.train_metrics_clientapp.values()] == [0, 0]
    assert not result.evaluate_metrics_clientapp


def test_all_garbage_keeps_the_old_model(make_grid: MakeGrid) -> None:
    everywhere = spoiling(GARBAGE["NaN"][0], nodes=range(100, 100 + NODES))
    grid = make_grid(client, NODES, tamper=everywhere)
    guarded = GuardedStrategy(FedAvg())
    messages = guarded.configure_train(1, ArrayRecord(start()), ConfigRecord(), grid)
    arrays, metrics = guarded.aggregate_train(1, grid.send_and_receive(messages))
    assert arrays is None
    assert metrics is not None
    assert metrics["guard-refused"] == NODES


def test_too_few_left_for_the_inner_strategy_is_a_veto_but_its_own_fault_is_raised(make_grid: MakeGrid) -> None:
    class Demanding(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            replies = list(replies)
            if len(replies) < NODES or server_round == 2:
                raise AggregationError("I want them all")
            return super().aggregate_train(server_round, replies)

    guarded = GuardedStrategy(Demanding())
    result = run(guarded, make_grid(client, NODES, tamper=spoiling(GARBAGE["NaN"][0])), rounds=1)
    assert result.train_metrics_clientapp[1]["guard-vetoed"] == 1
    assert any("could not aggregate what was left: I want them all" in e.reason for e in guarded.events)
    with pytest.raises(AggregationError):
        run(GuardedStrategy(Demanding()), make_grid(client, NODES), rounds=2)


def test_malformed_evaluations_are_dropped(make_grid: MakeGrid) -> None:
    def tamper(replies: list[Message]) -> list[Message]:
        for reply in replies:
            if reply.metadata.message_type == "evaluate" and reply.metadata.src_node_id == 105:
                with_metrics(reply, accuracy=math.inf)
            if reply.metadata.message_type == "evaluate" and reply.metadata.src_node_id == 106:
                without(reply, "metrics")
        return replies

    result = run(GuardedStrategy(FedAvg()), make_grid(client, NODES, tamper=tamper), rounds=1)
    metrics = result.evaluate_metrics_clientapp[1]
    assert metrics["guard-refused"] == 2
    assert metrics["accuracy"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"defence": Gate()}, "Gate needs the trusted set; give `module`"),
        ({"defence": Gate(), "module": Linear()}, "Gate needs the trusted set; give `module`"),
        ({"defence": Ema()}, "Ema needs the white-box model"),
        ({"defence": BoundUpdate()}, "BoundUpdate needs the white-box model"),
        ({"defence": DGC(), "trusted": trusted()}, "DGC needs the history of the model's own past"),
        ({"defence": chain(Clip(), Gate())}, "Chain needs the trusted set"),
        ({"defence": AT()}, "AT acts on training samples"),
        ({"defence": Skip()}, "skip: the server of a federation knows the one update"),
        ({"trusted": trusted()}, "only be looked at through a model"),
    ],
)
def test_a_defence_that_misses_something_is_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GuardedStrategy(FedAvg(), **options)


def test_what_cannot_work_is_refused_at_once() -> None:
    with pytest.raises(DataError, match="trusted samples: 3 in 'inputs' and 2 targets"):
        GuardedStrategy(FedAvg(), module=Linear(), trusted=Batch(torch.zeros(3, 3), torch.zeros(2)))
    with pytest.raises(ConfigError, match="trees"):
        GuardedStrategy(FedXgbBagging())

    class Own(FedAvg):
        def start(self, *args: Any, **kwargs: Any) -> Any:
            return super().start(*args, **kwargs)

    with pytest.raises(ConfigError, match="its own `start`"):
        GuardedStrategy(Own())
    with pytest.raises(ConfigError, match="before configure_train"):
        GuardedStrategy(FedAvg()).aggregate_train(1, [])


def test_a_module_of_another_architecture_is_refused_before_the_first_round(make_grid: MakeGrid) -> None:
    with pytest.raises(ConfigError, match=r"'weight' is \(4, 3\) and \(2, 3\) in the module"):
        run(GuardedStrategy(FedAvg(), module=nn.Linear(3, 2)), make_grid(client, NODES))


def test_a_second_start_begins_anew(make_grid: MakeGrid) -> None:
    guarded = guarding(chain(Clip(clip_norm=0.3), GATE))
    random.seed(1)
    first = run(guarded, make_grid(client, NODES))
    first_step = guarded._step
    random.seed(1)
    second = run(guarded, make_grid(client, NODES))
    assert guarded._step is not first_step
    assert guarded._step is not None
    assert guarded._step.step == 3
    for name, array in arrays_of(first).items():
        np.testing.assert_array_equal(arrays_of(second)[name], array)


class Ordered(FedMedian):
    """A strategy that goes by position, as several do; it notes in which order arrays come."""

    seen: list[list[str]]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        self.seen = [list(m.content.array_records["arrays"]) for m in replies]
        return super().aggregate_train(server_round, replies)


@pytest.mark.parametrize("reordered", [False, True], ids=["in order", "another order"])
def test_a_reply_that_was_changed_keeps_the_order_of_the_model(make_grid: MakeGrid, reordered: bool) -> None:
    """Statistics stand between the layers of a model, and its parameters by themselves in what a defence bounds."""
    with seeded_default(0):
        module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    first = {name: t.numpy().copy() for name, t in module.state_dict().items()}

    def moved(message: Message, context: Any) -> Message:
        far = 100.0 if context.node_config["partition-id"] == 0 else 0.01
        arrays = {k: a + far if a.dtype.kind == "f" else a for k, a in first.items()}
        if reordered and context.node_config["partition-id"] == 0:
            arrays = dict(reversed(arrays.items()))
        record = ArrayRecord({k: Array(np.asarray(a)) for k, a in arrays.items()})
        content = RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 50})})
        return Message(content, reply_to=message)

    inner = Ordered(fraction_evaluate=0.0)
    guarded = GuardedStrategy(inner, Clip(clip_norm=1.0), module=module)
    initial_arrays = ArrayRecord({k: Array(a) for k, a in first.items()})
    result = guarded.start(grid=make_grid(moved, 3), initial_arrays=initial_arrays, num_rounds=1)
    assert {e.node for e in guarded.events if e.event == "bounded"} == {100}
    assert inner.seen == [list(first)] * 3
    for name, array in arrays_of(result).items():
        np.testing.assert_allclose(array, first[name] + (0.01 if first[name].dtype.kind == "f" else 0), rtol=1e-5)
