"""A robust rule as a defence: which rule acts on what, alone, in a chain, and against attacks on rounds."""

import copy
from statistics import mean
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mithridate.core.aggregator import Context
from mithridate.core.batch import Batch
from mithridate.core.defence import Defence
from mithridate.core.errors import ConfigError, ThreatModelError
from mithridate.core.registry import build, config_of
from mithridate.core.update import Gradient
from mithridate.core.view import Need, View
from mithridate.data.shards import Shards
from mithridate.data.stream import Stream
from mithridate.defences.bound_update import BoundUpdate
from mithridate.defences.chain import Chain, chain
from mithridate.defences.clip import Clip
from mithridate.defences.gate import Gate
from mithridate.defences.robust import Robust
from mithridate.simulation.clients import FederatedRun, federate
from mithridate.simulation.federated import federated_optimiser, run_federated
from mithridate.simulation.online import Outcome
from mithridate.testing import toy_learner, toy_stream
from mithridate.training.learner import Learner

RUN = FederatedRun(rounds=3, lr=0.05)
RULES: list[dict[str, Any]] = [
    {"name": "median"},
    {"name": "krum", "hostile": 2},
    {"name": "trimmed_mean", "hostile": 2},
    {"name": "geometric_median"},
    {"name": "bulyan", "hostile": 1},
]


@pytest.fixture(scope="module")
def stream() -> Stream:
    return toy_stream(0)


@pytest.fixture(scope="module")
def burned_in(stream: Stream) -> Learner:
    return toy_learner(stream)


def rows_of(n: int = 10, width: int = 7) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(0))


def gradient_of(rows: Tensor, clients: Tensor | None = None) -> Gradient:
    return Gradient(rows, {"w": torch.Size([rows.shape[1]])}, clients)


def outcome_of(burned_in: Learner, stream: Stream, defence: Defence | None, run: FederatedRun = RUN) -> Outcome:
    model = copy.deepcopy(burned_in.model)
    optimiser = federated_optimiser(model.parameters(), run)
    learner = Learner(model, optimiser, defence=defence, trusted=stream.trusted.all())
    attack = build("update_attack", {"name": "sign_flip", "poison_ratio": 0.2, "scale": 10.0})
    return run_federated(learner, federate(stream, Shards(clients=10), seed=0), attack, run)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: str(r["name"]))
def test_it_is_the_rule(rule: dict[str, Any]) -> None:
    rows = rows_of()
    kept = rows.clone()
    made = Robust(rule=rule).aggregate(gradient_of(rows), View())
    context = Context(clients=torch.arange(10), rng=torch.Generator())
    assert torch.equal(made.rows[0], build("aggregator", rule).aggregate(rows, context))
    assert made.rows.shape == (1, 7)
    assert torch.equal(rows, kept)
    assert not torch.allclose(made.rows[0], rows.mean(0))


def test_a_rule_that_remembers_clients_is_told_who_they_are() -> None:
    """Worker momentum keeps a note a client: the same rows in the next round, under other names, are other rows."""
    rows, ids = rows_of(), torch.arange(10) + 5
    defence = Robust(rule={"name": "centered_clipping", "worker_momentum": 0.9})
    found = []
    for second in (ids, ids.flip(0)):
        view = View()
        defence.aggregate(gradient_of(rows, ids), view)
        assert view.memory["momentum.clients"].tolist() == ids.tolist()  # notes go where the learner saves them
        defence.aggregate(gradient_of(rows, second), view)
        found.append(dict(zip(view.memory["momentum.clients"].tolist(), view.memory["momentum.rows"], strict=True)))
    assert torch.allclose(found[0][5], rows[0])
    assert torch.allclose(found[1][5], 0.9 * rows[0] + 0.1 * rows[9], atol=1e-6)


def test_equal_rules_are_equal_and_the_table_is_whole() -> None:
    short, whole = Robust(rule={"name": "krum"}), Robust(rule=config_of(build("aggregator", {"name": "krum"})))
    assert short == whole
    assert hash(short) == hash(whole)
    assert short != Robust(rule={"name": "krum", "hostile": 1})
    assert Robust().rule["name"] == "median"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"name": "krumm"}, "unknown aggregator 'krumm'"),
        ({"name": "krum", "hostil": 2}, "robust, rule krum: unknown key 'hostil'"),
        ({"name": "krum", "hostile": -1}, "hostile"),
        ({}, "has no `name`"),
    ],
    ids=str,
)
def test_a_rule_that_is_none_is_named(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Robust(rule=rule)


@pytest.mark.parametrize(("name", "fewest"), [("krum", 11), ("bulyan", 19)])
def test_too_few_clients_for_the_rule_are_refused_with_the_bound(name: str, fewest: int) -> None:
    defence = Robust(rule={"name": name, "hostile": 4})
    defence.check(fewest)
    with pytest.raises(ConfigError, match=rf"{fewest - 1} rows are too few for 4 hostile ones.*= {fewest}"):
        defence.check(fewest - 1)
    with pytest.raises(ConfigError, match="too few"):
        defence.aggregate(gradient_of(rows_of(fewest - 1)), View())


# The server's own update.


def test_fltrust_is_given_the_gradient_on_the_trusted_set(burned_in: Learner, stream: Stream) -> None:
    defence = Robust(rule={"name": "fltrust"})
    assert defence.needs == {Need.MODEL, Need.TRUSTED}
    assert Robust().needs == frozenset()
    x, y = stream.trusted.all()
    learner = Learner(copy.deepcopy(burned_in.model), burned_in.optimiser, defence=defence, trusted=Batch(x, y))
    model = learner.model.eval()
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    own = torch.cat([g.flatten() for g in grads])
    rows = torch.stack([own, -own, 3 * own + 0.01, torch.randn(len(own), generator=torch.Generator().manual_seed(0))])
    shapes = {name: p.shape for name, p in model.named_parameters()}
    made = defence.aggregate(Gradient(rows, shapes), learner.view()).rows[0]
    context = Context(clients=torch.arange(4), rng=torch.Generator(), trusted=own)
    expected = build("aggregator", {"name": "fltrust"}).aggregate(rows, context)
    assert torch.allclose(made, expected, atol=1e-6)
    assert float(torch.cosine_similarity(made, own, dim=0)) > 0.5
    opposed = defence.aggregate(Gradient(-rows[:1].repeat(4, 1), shapes), learner.view()).rows
    assert not opposed.any()  # nobody points the server's way


def test_fltrust_needs_trusted_samples_and_whole_updates(burned_in: Learner, stream: Stream) -> None:
    learner = Learner(copy.deepcopy(burned_in.model), burned_in.optimiser, defence=Robust(rule={"name": "fltrust"}))
    with pytest.raises(ThreatModelError, match="needs the trusted set"):
        learner.defence.aggregate(gradient_of(rows_of()), learner.view())
    learner.trusted = stream.trusted.all()
    with pytest.raises(ConfigError, match=r'and the rows have 7; give distances = "all"'):
        learner.defence.aggregate(gradient_of(rows_of()), learner.view())


# In rounds.


@pytest.mark.parametrize("rule", [*RULES, {"name": "fltrust"}], ids=lambda r: str(r["name"]))
def test_it_holds_where_the_mean_falls(burned_in: Learner, stream: Stream, rule: dict[str, Any]) -> None:
    """Two of ten clients turn their updates round and send them tenfold."""
    free = outcome_of(burned_in, stream, None)
    held = outcome_of(burned_in, stream, Robust(rule=rule))
    assert free.accuracy_after_trigger is not None
    assert held.accuracy_after_trigger is not None
    assert free.accuracy_after_trigger < 0.5
    assert held.accuracy_after_trigger > 0.75


@pytest.mark.parametrize("bound", ["after", "before"])
def test_it_works_in_a_chain_with_a_bound_and_a_gate(burned_in: Learner, stream: Stream, bound: Any) -> None:
    run = FederatedRun(rounds=3, lr=0.05, bound=bound)
    defence = chain(Robust(rule={"name": "trimmed_mean", "hostile": 2}), Clip(clip_norm=0.1), Gate(max_loss_rise=0.5))
    outcome = outcome_of(burned_in, stream, defence, run)
    assert all(row["bounded_norm"] <= 0.1 * (1 + 1e-4) for row in outcome.trace[1:])
    assert outcome.accuracy_after_trigger is not None
    assert outcome.accuracy_after_trigger > 0.75
    alone = outcome_of(burned_in, stream, Robust(rule={"name": "trimmed_mean", "hostile": 2}), run)
    assert mean(row["bounded_norm"] for row in alone.trace[1:]) > 0.1
    vetoing = chain(Gate(max_loss_rise=0.0, max_accuracy_drop=0.0), Clip(clip_norm=50.0))
    assert outcome_of(burned_in, stream, vetoing, run).rolled_back >= 3  # the mean, with the same attack


def test_the_last_rule_of_a_chain_counts(burned_in: Learner, stream: Stream) -> None:
    last = outcome_of(burned_in, stream, chain(Robust(rule={"name": "mean"}), Robust()))
    alone = outcome_of(burned_in, stream, chain(Robust()))
    first = outcome_of(burned_in, stream, chain(Robust(), Robust(rule={"name": "mean"})))
    assert [r["loss"] for r in last.trace] == [r["loss"] for r in alone.trace]
    assert [r["loss"] for r in first.trace] != [r["loss"] for r in alone.trace]


def test_a_chain_without_a_rule_is_the_mean(burned_in: Learner, stream: Stream) -> None:
    bounded = outcome_of(burned_in, stream, BoundUpdate(clip_norm=0.01))
    chained = outcome_of(burned_in, stream, Chain(parts=(config_of(BoundUpdate(clip_norm=0.01)),)))
    assert [r["loss"] for r in bounded.trace] == [r["loss"] for r in chained.trace]


def test_a_rule_leaves_norm_parameters_to_the_mean(burned_in: Learner, stream: Stream) -> None:
    run = FederatedRun(rounds=1, lr=0.05, distances="without_norm")
    outcome = outcome_of(burned_in, stream, Robust(rule={"name": "krum"}), run)
    whole = outcome_of(burned_in, stream, Robust(rule={"name": "krum"}), FederatedRun(rounds=1, lr=0.05))
    assert outcome.trace[1]["bounded_norm"] != whole.trace[1]["bounded_norm"]
    with pytest.raises(ConfigError, match='give distances = "all"'):
        outcome_of(burned_in, stream, Robust(rule={"name": "fltrust"}), run)


def test_online_there_is_one_client_and_nothing_to_rule(burned_in: Learner, stream: Stream) -> None:
    batch = stream.victim_batch(0, 0)
    states = []
    for defence in (None, Robust(rule={"name": "krum"})):
        model = copy.deepcopy(burned_in.model)
        learner = Learner(model, federated_optimiser(model.parameters(), RUN), defence=defence)
        learner.update(batch)
        states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*states)
