"""What clients report is theirs: no minority decides what is usual, no number is believed, no log grows without end."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    FedMedian,
    QFedAvg,
    Strategy,
)

import mithridate as mi
from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError
from mithridate.defences.clip import Clip
from mithridate.defences.gate import Gate
from mithridate.guard import events as journals
from mithridate.guard.events import Event, Journal
from mithridate.guard.flower import UNLIMITED, GuardedStrategy
from mithridate.guard.limits import RECOMMENDED, ReplyLimits

NODES = 9
MakeGrid = Callable[..., Any]
Metrics = Callable[[int], dict[str, Any]]
START = {"weight": torch.zeros(4, 3), "bias": torch.zeros(4)}
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "FedAvg": FedAvg,
    "FedMedian": FedMedian,
    "QFedAvg": lambda: QFedAvg(client_learning_rate=0.1, q=0.5, train_loss_key="loss"),
    "wrapped": lambda: DifferentialPrivacyServerSideFixedClipping(
        QFedAvg(client_learning_rate=0.1, q=0.5, train_loss_key="loss"), 1e-9, 10.0, NODES
    ),
}


def client(metrics: Metrics, *, moves: Metrics = lambda number: {}, keys: Metrics = lambda number: {}) -> Any:
    """Moves every weight up by a tenth, or as `moves` says, and reports a loss of 1 and what `metrics` says."""

    def app(message: Message, context: Any) -> Message:
        number = context.node_config["partition-id"]
        state = dict(message.content.array_records["arrays"].to_torch_state_dict())
        state = {k: v + moves(number).get("by", 0.1) for k, v in state.items()}
        said = {"num-examples": 50, "loss": 1.0, **metrics(number)}
        names = {"arrays": "arrays", "metrics": "metrics", **keys(number)}
        content = RecordDict({names["metrics"]: MetricRecord(said)})
        if message.metadata.message_type == "train":
            content[names["arrays"]] = ArrayRecord(state)
        return Message(content, reply_to=message)

    return app


def run(strategy: Strategy, grid: Any, rounds: int = 2) -> Any:
    return strategy.start(grid=grid, initial_arrays=ArrayRecord(START), num_rounds=rounds)


def moved(result: Any) -> float:
    """By how much the weights went up, on average."""
    return float(np.mean([array.numpy().mean() for array in result.arrays.values()]))


def refused(guarded: GuardedStrategy) -> set[int | None]:
    return {event.node for event in guarded.events if event.event == "refused"}


# What is usual.


@pytest.mark.parametrize("name", ["FedAvg", "FedMedian", "QFedAvg"])
@pytest.mark.parametrize("hostile", [1, 2, 4])
def test_lists_of_their_own_length_let_no_minority_decide(name: str, hostile: int, make_grid: MakeGrid) -> None:
    """Honest clients report as many losses as they made steps; those who agree are few, and hostile."""

    def said(number: int) -> dict[str, Any]:
        return {"mine": 1.0} if number < hostile else {"losses": [1.0] * number, "accuracy": 0.5}

    guarded = GuardedStrategy(STRATEGIES[name](), limits=RECOMMENDED)
    result = run(guarded, make_grid(client(said), NODES))
    assert refused(guarded) <= {100 + number for number in range(hostile)}
    for metrics in result.train_metrics_clientapp.values():
        assert metrics["guard-accepted"] >= NODES - hostile
        assert metrics["accuracy"] == pytest.approx(0.5)
        assert not {"losses", "mine"} & set(metrics)
    honest = run(STRATEGIES[name](), make_grid(client(lambda number: {}), NODES))
    assert moved(result) == pytest.approx(moved(honest), rel=0.02)


@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_a_tie_is_no_majority(phase: str, make_grid: MakeGrid) -> None:
    def said(number: int) -> dict[str, Any]:
        return {"one": 1.0} if number % 2 else {"other": 1.0}

    guarded = GuardedStrategy(FedAvg(), limits=RECOMMENDED)
    result = run(guarded, make_grid(client(said), 4))
    assert refused(guarded) == set()
    metrics = result.train_metrics_clientapp if phase == "train" else result.evaluate_metrics_clientapp
    assert [m["guard-accepted"] for m in metrics.values()] == [4, 4]
    assert all("one" not in m and "other" not in m and m["loss"] == 1.0 for m in metrics.values())


def test_names_of_records_are_nobodys_business_where_no_more_than_half_agree(make_grid: MakeGrid) -> None:
    guarded = GuardedStrategy(FedAvg(), limits=RECOMMENDED)
    app = client(lambda number: {}, keys=lambda number: {"arrays": f"arrays {number}", "metrics": f"of {number}"})
    result = run(guarded, make_grid(app, NODES))
    assert refused(guarded) == set()
    assert moved(result) == pytest.approx(0.2, rel=1e-5)


def test_more_than_half_decide(make_grid: MakeGrid) -> None:
    guarded = GuardedStrategy(FedAvg(), limits=RECOMMENDED)
    run(guarded, make_grid(client(lambda number: {"losses": [1.0] * (3 if number < 5 else number)}), NODES))
    assert refused(guarded) == {105, 106, 107, 108}


# Losses that are weights.


@pytest.mark.parametrize("loss", [0.0, 1e-30, 1e-300, 1e30, 1e290, 0, 10**200])
@pytest.mark.parametrize("name", ["QFedAvg", "wrapped"])
def test_no_loss_counts_for_much_more_or_less_than_others(name: str, loss: float, make_grid: MakeGrid) -> None:
    app = client(lambda number: {"loss": loss} if number == 3 else {}, moves=lambda n: {"by": -0.1} if n == 3 else {})
    honest = run(GuardedStrategy(STRATEGIES[name](), limits=RECOMMENDED), make_grid(client(lambda n: {}), NODES))
    guarded = GuardedStrategy(STRATEGIES[name](), limits=RECOMMENDED)
    result = run(guarded, make_grid(app, NODES))
    assert {(e.event, e.node) for e in guarded.events if e.node} == {("capped", 103)}
    assert moved(result) > 0.3 * moved(honest) > 0
    if name == "QFedAvg":  # as it is without a guard: the model stands still, or follows the liar
        with np.errstate(over="ignore", invalid="ignore"):
            bare = run(STRATEGIES[name](), make_grid(app, NODES))
        assert not moved(bare) > 0.3 * moved(honest)


@pytest.mark.parametrize("loss", [-5.0, -1e-30, -1, [1.0], [0.5, 0.5]])
def test_a_loss_that_can_be_none_is_refused(loss: Any, make_grid: MakeGrid) -> None:
    guarded = GuardedStrategy(STRATEGIES["QFedAvg"](), limits=RECOMMENDED)
    result = run(guarded, make_grid(client(lambda number: {"loss": loss} if number == 3 else {}), NODES))
    assert refused(guarded) == {103}
    reasons = [event.reason for event in guarded.events if (event.event, event.phase) == ("refused", "train")]
    assert len(reasons) == 2  # rounds
    assert all("loss is" in reason for reason in reasons)
    assert moved(result) > 0


def test_a_loss_that_is_no_weight_is_left_alone(make_grid: MakeGrid) -> None:
    guarded = GuardedStrategy(FedAvg(), limits=RECOMMENDED)
    run(guarded, make_grid(client(lambda number: {"loss": -5.0} if number == 3 else {}), NODES))
    assert {event.event for event in guarded.events} == {"closed"}
    named = GuardedStrategy(FedAvg(), limits=RECOMMENDED, loss_key="loss")
    run(named, make_grid(client(lambda number: {"loss": -5.0} if number == 3 else {}), NODES))
    assert refused(named) == {103}


def test_bounds_of_losses() -> None:
    assert ReplyLimits().bounded_losses([1.0, 2.0, 3.0, 100.0, 0.0]) == [1.0, 2.0, 3.0, 20.0, 0.2]
    assert ReplyLimits(max_loss_ratio=float("inf")).bounded_losses([1.0, 0.0, 1e9]) == [1.0, 0.0, 1e9]
    assert ReplyLimits().bounded_losses([0.0, 0.0, 0.0, 5.0]) == [0.0, 0.0, 0.0, 5.0]
    assert ReplyLimits().bounded_losses([]) == []


# A guard without limits, and the recommended ones.


@pytest.mark.parametrize(
    ("defence", "limits", "warns"),
    [
        (None, None, True),
        (None, ReplyLimits(max_examples=5), True),
        (None, RECOMMENDED, False),
        (None, ReplyLimits(max_update_norm=1.0), False),
        (Clip(clip_norm=1.0), None, False),
    ],
)
def test_a_guard_that_bounds_nothing_says_so(
    defence: Any, limits: ReplyLimits | None, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="flwr.mithridate"):
        logging.getLogger("flwr").addHandler(caplog.handler)
        try:
            guarded = GuardedStrategy(FedAvg(), defence, limits=limits, report_path=tmp_path / "guard.jsonl")
        finally:
            logging.getLogger("flwr").removeHandler(caplog.handler)
    assert (UNLIMITED in caplog.text) == warns
    assert (json.loads((tmp_path / "guard.jsonl").read_text()).get("warning") == UNLIMITED) == warns
    assert (UNLIMITED in str(guarded.table().caption)) == warns


@pytest.mark.parametrize("by", [-1e3, -1e6, 1e8])
def test_under_the_recommended_limits_one_client_moves_little(by: float, make_grid: MakeGrid) -> None:
    app = client(
        lambda number: {"num-examples": 10**6} if number == 3 else {}, moves=lambda n: {"by": by} if n == 3 else {}
    )
    free = run(GuardedStrategy(FedAvg()), make_grid(app, NODES), rounds=3)
    guarded = GuardedStrategy(FedAvg(), limits=mi.guard.RECOMMENDED)
    result = run(guarded, make_grid(app, NODES), rounds=3)
    assert abs(moved(free)) > 100
    # eight honest clients and one that weighs three times as much and moves twice as far, if need be the other way
    assert 0.3 * (8 - 6) / 11 * 0.99 <= moved(result) <= 0.3 * (8 + 6) / 11 * 1.01
    assert {(e.event, e.node) for e in guarded.events if e.node} == {("bounded", 103), ("capped", 103)}


def test_the_recommended_limits_leave_like_clients_alone(make_grid: MakeGrid) -> None:
    """Whose updates are up to twice, whose data up to three times as much as is usual."""
    app = client(lambda n: {"num-examples": 50 + 11 * n, "loss": 1 + n / 9}, moves=lambda n: {"by": 0.1 + 0.012 * n})
    bare, guarded = (
        QFedAvg(client_learning_rate=0.1, train_loss_key="loss"),
        GuardedStrategy(QFedAvg(client_learning_rate=0.1, train_loss_key="loss"), limits=RECOMMENDED),
    )
    first, second = run(bare, make_grid(app, NODES)), run(guarded, make_grid(app, NODES))
    assert all(first.arrays[k].numpy().tobytes() == second.arrays[k].numpy().tobytes() for k in START)
    assert {event.event for event in guarded.events} == {"closed"}


# The module and the trusted samples are those of the federation.


def digits(n: int = 6, features: int = 3, classes: int = 4) -> Batch:
    rng = torch.Generator().manual_seed(0)
    return Batch(torch.randn(n, features, generator=rng), torch.arange(n) % classes)


@pytest.mark.parametrize(
    ("module", "trusted", "words"),
    [
        (nn.Linear(3, 5), digits(), r"'weight' is \(4, 3\) and \(5, 3\) in the module"),
        (nn.Sequential(nn.Linear(3, 4)), digits(), "'weight' is not in the module"),
        (nn.Linear(3, 4), digits(features=2), "cannot be judged on the trusted samples"),
        (nn.Linear(3, 4), digits(classes=5), r"labels span \[0, 4\], but the model has 4 outputs"),
    ],
)
def test_a_module_or_samples_of_another_model_are_refused_in_the_first_round(
    module: nn.Module, trusted: Batch, words: str, make_grid: MakeGrid
) -> None:
    guarded = GuardedStrategy(FedAvg(), Gate(), module=module, trusted=trusted)
    with pytest.raises(mi.UserError, match=words):
        run(guarded, make_grid(client(lambda number: {}), NODES))


def test_statistics_that_no_round_fills_judge_nobody(make_grid: MakeGrid) -> None:
    module = nn.Sequential()
    module.register_parameter("weight", nn.Parameter(torch.zeros(4, 3)))
    module.register_parameter("bias", nn.Parameter(torch.zeros(4)))
    module.add_module("bn", nn.BatchNorm1d(3, affine=False))
    guarded = GuardedStrategy(FedAvg(), Gate(), module=module, trusted=digits())
    with pytest.raises(ConfigError, match=r"'bn\.running_mean' is not among the model's arrays"):
        run(guarded, make_grid(client(lambda number: {}), NODES))


# A log without end.


def note(journal: Journal, number: int, **more: Any) -> None:
    journal.note(
        Event(number, "train", **{"event": "bounded", "node": 7, "reason": f"update of length {number}", **more})
    )


def test_events_in_memory_are_bounded_and_counts_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "KEPT_EVENTS", 50)
    monkeypatch.setattr(journals, "KEPT_ROUNDS", 10)
    monkeypatch.setattr(journals, "KEPT_TALLIES", 20)
    journal = Journal(None, {})
    for number in range(200):
        note(journal, number)
        note(journal, number, event="closed", node=None)
    assert len(journal.events) == 50
    (tally,) = journal.tallies()
    assert (tally.times, tally.rounds) == (200, tuple(range(190, 200)))
    assert "The guard in 200 rounds: 200 bounded" in str(journal.table(5).title)
    for number in range(300):  # a reason is a client's own words
        note(journal, 200, event="refused", reason="error: " + "a" * number)
    assert len(journal.tallies()) <= 20 + 2
    assert sum(tally.times for tally in journal.tallies()) == 500
    assert "300 refused" in str(journal.table(5).title)


def test_a_report_is_turned_over_before_it_fills_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "LARGEST_FILE", 2_000)
    path = tmp_path / "guard.jsonl"
    journal = Journal(path, {"inner": "FedAvg"})
    for number in range(500):
        note(journal, number)
        assert path.stat().st_size <= 2_000
    older = path.with_name("guard.jsonl.1")
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, older.name]
    files = [[json.loads(line) for line in file.read_text().splitlines()] for file in (older, path)]
    assert [first["inner"] for first, *_ in files] == ["FedAvg", "FedAvg"]  # each says whose report it is
    rounds = [line["round"] for _, *lines in files for line in lines]
    assert rounds == list(range(rounds[0], 500))


def test_a_federation_goes_on_when_its_log_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_grid: MakeGrid
) -> None:
    guarded = GuardedStrategy(FedAvg(), limits=RECOMMENDED, report_path=tmp_path / "guard.jsonl")

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    app = client(lambda number: {"loss": float("nan")} if number == 3 else {})
    result = run(guarded, make_grid(app, NODES))
    monkeypatch.undo()
    assert moved(result) == pytest.approx(0.2, rel=1e-5)
    assert refused(guarded) == {103}
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written .*choose another report_path"):
        GuardedStrategy(FedAvg(), limits=RECOMMENDED, report_path=tmp_path / "file" / "guard.jsonl")
