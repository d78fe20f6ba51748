"""A robust rule in the server: what it is shown, what it makes of a round, alone and beside a defence."""

import copy
import dataclasses
from collections.abc import Mapping
from statistics import mean
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.optim import SGD

from mithridate.core.aggregator import Context
from mithridate.core.defence import Defence
from mithridate.core.errors import ConfigError
from mithridate.core.registry import build, config_of, make
from mithridate.core.update_attack import Honest
from mithridate.core.updates import Updates
from mithridate.core.view import View
from mithridate.data.shards import Shards
from mithridate.data.stream import Stream
from mithridate.defences.bound_update import BoundUpdate
from mithridate.defences.chain import chain
from mithridate.defences.clip import Clip
from mithridate.defences.gate import Gate
from mithridate.simulation.clients import FederatedRun, Federation, federate
from mithridate.simulation.federated import run_federated
from mithridate.simulation.online import OnlineRun
from mithridate.simulation.per_client.gradients import client_gradients
from mithridate.simulation.run import Outcome, Progress, victim_optimiser
from mithridate.simulation.server_round import unmeasured_parameters
from mithridate.training.learner import Learner, Update
from mithridate.update_attacks.clean import CleanUpdates
from mithridate.update_attacks.hostile import HostileShare

Rule = dict[str, Any]
RULES: list[Rule] = [
    {"name": "median"},
    {"name": "krum", "hostile": 2},
    {"name": "trimmed_mean", "hostile": 2},
    {"name": "geometric_median"},
    {"name": "bulyan", "hostile": 1},
]
PLAIN = FederatedRun(rounds=0, lr=0.05, momentum=0.0, batch_norm="frozen")


@pytest.fixture(scope="module")
def federation(stream: Stream) -> Federation:
    return federate(stream, Shards(clients=10), seed=0)


class Server(Learner):
    """Keeps what each round came to."""

    def apply(self, update: Updates, *, batch_loss: float, learned: int, buffers: Mapping[str, Tensor]) -> Update:
        self.applied: list[Tensor] = [*getattr(self, "applied", []), update.rows[0].clone()]
        return super().apply(update, batch_loss=batch_loss, learned=learned, buffers=buffers)


def server_of(burned_in: Learner, stream: Stream, run: FederatedRun, defence: Defence | None = None) -> Server:
    model = copy.deepcopy(burned_in.model)
    return Server(model, victim_optimiser(model, run), defence=defence, trusted=stream.trusted.all())


def rows_of(learner: Learner, federation: Federation, run: FederatedRun, number: int = 0) -> Tensor:
    _, data = federation.round(number, run)
    return client_gradients(learner.model, F.cross_entropy, data.x, data.y, way="mapped")


def outcome_of(
    burned_in: Learner,
    stream: Stream,
    rule: Rule | None,
    *,
    defence: Defence | None = None,
    rounds: int = 3,
    **options: Any,
) -> Outcome:
    """Two of ten clients turn their updates round and send them tenfold."""
    run = FederatedRun(rounds=rounds, lr=0.05, rule=rule, **options)
    attack = build("update_attack", {"name": "sign_flip", "poison_ratio": 0.2, "scale": 10.0})
    federation = federate(stream, Shards(clients=10), seed=0)
    return run_federated(server_of(burned_in, stream, run, defence), federation, attack, run)


# The setting.


def test_equal_rules_are_equal_and_the_table_is_whole() -> None:
    short = FederatedRun(rule={"name": "krum"})
    whole = FederatedRun(rule=config_of(build("aggregator", {"name": "krum"})))
    assert short == whole
    assert hash(short) == hash(whole)
    assert short.rule == whole.rule
    assert short != FederatedRun(rule={"name": "krum", "hostile": 1})
    assert (short.rule_name, FederatedRun().rule_name) == ("krum", "mean")
    assert short.aggregator == build("aggregator", {"name": "krum"})
    assert (FederatedRun().rule, FederatedRun().aggregator) == (None, None)
    assert dataclasses.replace(short, rounds=3).aggregator == short.aggregator
    assert dataclasses.replace(short, rule=None).aggregator is None
    assert copy.deepcopy(short) == short


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"name": "krumm"}, "unknown aggregator 'krumm'"),
        ({"name": "krum", "hostil": 2}, r"\[federated\] rule krum: unknown key 'hostil': did you mean 'hostile'"),
        ({"name": "krum", "hostile": -1}, "hostile"),
        ({}, r"\[federated\] rule has no `name`"),
    ],
    ids=str,
)
def test_a_rule_that_is_none_is_named(rule: Rule, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(FederatedRun, {"rule": rule}, where="[federated]")


def test_online_there_is_one_client_and_no_rule() -> None:
    with pytest.raises(ConfigError, match=r"\[run\]: unknown key 'rule'"):
        make(OnlineRun, {"rule": {"name": "krum"}}, where="[run]")


@pytest.mark.parametrize(("name", "fewest"), [("krum", 11), ("bulyan", 19)])
def test_too_few_clients_for_the_rule_are_refused_with_the_bound(
    burned_in: Learner, stream: Stream, federation: Federation, name: str, fewest: int
) -> None:
    run = FederatedRun(rule={"name": name, "hostile": 4})
    run.check(fewest, trusted=False)
    with pytest.raises(ConfigError, match=rf"{fewest - 1} rows are too few for 4 hostile ones.*= {fewest}"):
        run.check(fewest - 1, trusted=False)
    learner = server_of(burned_in, stream, run)
    with pytest.raises(ConfigError, match="10 rows are too few"):
        run_federated(learner, federation, CleanUpdates(), run)
    assert learner.step == 0
    FederatedRun().check(1, trusted=False)  # the mean stands any number


# What it is shown, and what becomes of it.


@pytest.mark.parametrize("rule", RULES, ids=lambda r: str(r["name"]))
def test_the_update_is_what_the_rule_makes_of_the_rows(
    burned_in: Learner, stream: Stream, federation: Federation, rule: Rule
) -> None:
    run = dataclasses.replace(PLAIN, rule=rule)
    learner = server_of(burned_in, stream, run)
    rows = rows_of(burned_in, federation, run)
    run_federated(learner, federation, CleanUpdates(), run)
    context = Context(clients=torch.arange(10), rng=torch.Generator())
    expected = build("aggregator", rule).aggregate(rows, context)
    torch.testing.assert_close(learner.applied[0], expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(learner.applied[0], rows.mean(0), atol=1e-5)


def test_the_mean_is_a_rule_like_no_rule(burned_in: Learner, stream: Stream, federation: Federation) -> None:
    applied = []
    for rule in (None, {"name": "mean"}):
        run = dataclasses.replace(PLAIN, rule=rule)
        learner = server_of(burned_in, stream, run)
        run_federated(learner, federation, CleanUpdates(), run)
        applied.append(learner.applied[0])
    torch.testing.assert_close(*applied, rtol=1e-4, atol=1e-6)


def test_a_rule_that_remembers_clients_is_told_who_they_are(
    burned_in: Learner, stream: Stream, federation: Federation
) -> None:
    """Worker momentum keeps a note a client: in the next round others come too, in another order."""
    rule = {"name": "centered_clipping", "worker_momentum": 0.9}
    run = dataclasses.replace(PLAIN, rounds=1, per_round=6, rule=rule)
    learner, progress = server_of(burned_in, stream, run), Progress()
    rounds = [federation.round(number, run)[0].tolist() for number in (0, 1)]
    assert rounds[0] != rounds[1]
    assert set(rounds[0]) & set(rounds[1])
    rows = [rows_of(learner, federation, run, 0)]
    run_federated(
        learner,
        federation,
        CleanUpdates(),
        run,
        progress=progress,
        on_step=lambda _: rows.append(rows_of(learner, federation, run, 1)),
    )
    notes = dict(zip(progress.rule["momentum.clients"].tolist(), progress.rule["momentum.rows"], strict=True))
    first, second = (dict(zip(who, sent, strict=True)) for who, sent in zip(rounds, rows, strict=True))
    for client in {*rounds[0], *rounds[1]} & notes.keys():
        expected = first.get(client, second.get(client))
        assert expected is not None
        if client in first and client in second:
            expected = 0.9 * first[client] + 0.1 * second[client]
        torch.testing.assert_close(notes[client], expected.to(notes[client].dtype), rtol=1e-4, atol=1e-6)
    assert set(rounds[1]) <= notes.keys()
    assert learner.memory == {}  # the rule's notes are not the defence's


# The server's own update.


def own_update(learner: Learner) -> Tensor:
    assert learner.trusted is not None
    model = copy.deepcopy(learner.model).eval()
    grads = torch.autograd.grad(F.cross_entropy(model(learner.trusted.x), learner.trusted.y), list(model.parameters()))
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("distances", ["all", "without_norm"])
def test_fltrust_is_given_the_gradient_on_the_trusted_set(
    burned_in: Learner, stream: Stream, federation: Federation, distances: Any
) -> None:
    """Of the parameters that distances look at; the others follow the mean."""
    run = dataclasses.replace(PLAIN, rule={"name": "fltrust"}, distances=distances)
    learner = server_of(burned_in, stream, run)
    own, rows = own_update(learner), rows_of(learner, federation, run)
    apart = unmeasured_parameters(learner.model, run)
    kept = torch.cat([torch.full((p.numel(),), name not in apart) for name, p in learner.model.named_parameters()])
    assert bool(kept.all()) is (distances == "all")
    run_federated(learner, federation, CleanUpdates(), run)
    context = Context(clients=torch.arange(10), rng=torch.Generator(), trusted=own[kept])
    expected = rows.mean(0)
    expected[kept] = build("aggregator", {"name": "fltrust"}).aggregate(rows[:, kept], context)
    torch.testing.assert_close(learner.applied[0], expected, rtol=1e-4, atol=1e-6)
    assert float(torch.cosine_similarity(learner.applied[0][kept], own[kept], dim=0)) > 0


@dataclasses.dataclass(frozen=True)
class Opposing(HostileShare):
    """All clients send the opposite of what the server would do itself."""

    own: Tensor

    @property
    def ratio(self) -> float:
        return 1.0

    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        return -self.own.expand(honest.hostile, -1)


def test_where_nobody_points_the_servers_way_nothing_moves(
    burned_in: Learner, stream: Stream, federation: Federation
) -> None:
    run = dataclasses.replace(PLAIN, rule={"name": "fltrust"})
    learner = server_of(burned_in, stream, run)
    run_federated(learner, federation, Opposing(own=own_update(learner)), run)
    assert not learner.applied[0].any()


def test_fltrust_needs_trusted_samples(burned_in: Learner, stream: Stream, federation: Federation) -> None:
    run = FederatedRun(rule={"name": "fltrust"})
    learner = server_of(burned_in, stream, run)
    learner.trusted = None
    with pytest.raises(ConfigError, match=r"fltrust compares with the server's own update.*\[data\] trusted"):
        run_federated(learner, federation, CleanUpdates(), run)
    assert learner.step == 0
    run.check(10, trusted=True)


# In rounds.


@pytest.mark.parametrize("rule", [*RULES, {"name": "fltrust"}], ids=lambda r: str(r["name"]))
def test_it_holds_where_the_mean_falls(burned_in: Learner, stream: Stream, rule: Rule) -> None:
    free = outcome_of(burned_in, stream, None)
    held = outcome_of(burned_in, stream, rule)
    assert free.accuracy_after_trigger is not None
    assert held.accuracy_after_trigger is not None
    assert free.accuracy_after_trigger < 0.5
    assert held.accuracy_after_trigger > 0.75


@pytest.mark.parametrize("bound", ["after", "before"])
def test_it_works_beside_a_bound_and_a_gate(burned_in: Learner, stream: Stream, bound: Any) -> None:
    rule = {"name": "trimmed_mean", "hostile": 2}
    defence = chain(Clip(clip_norm=0.1), Gate(max_loss_rise=0.5))
    outcome = outcome_of(burned_in, stream, rule, defence=defence, bound=bound)
    assert all(row["bounded_norm"] is not None for row in outcome.trace[1:])
    assert all((row["bounded_norm"] or 0.0) <= 0.1 * (1 + 1e-4) for row in outcome.trace[1:])
    assert outcome.accuracy_after_trigger is not None
    assert outcome.accuracy_after_trigger > 0.75
    alone = outcome_of(burned_in, stream, rule, bound=bound)
    assert mean(row["bounded_norm"] or 0.0 for row in alone.trace[1:]) > 0.1
    vetoing = chain(Gate(max_loss_rise=0.0, max_accuracy_drop=0.0), Clip(clip_norm=50.0))
    assert outcome_of(burned_in, stream, None, defence=vetoing, bound=bound).rolled_back >= 3  # the mean


def test_a_rule_beside_a_chain_is_a_rule_beside_its_part(burned_in: Learner, stream: Stream) -> None:
    bound = BoundUpdate(clip_norm=0.01)
    for rule in (None, {"name": "krum"}):
        losses = [
            [row["loss"] for row in outcome_of(burned_in, stream, rule, defence=defence).trace]
            for defence in (bound, chain(bound))
        ]
        assert losses[0] == losses[1]


def test_a_rule_leaves_norm_parameters_to_the_mean(burned_in: Learner, stream: Stream, federation: Federation) -> None:
    run = dataclasses.replace(PLAIN, rule={"name": "krum"}, distances="without_norm")
    learner = server_of(burned_in, stream, run)
    rows = rows_of(learner, federation, run)
    run_federated(learner, federation, CleanUpdates(), run)
    apart = unmeasured_parameters(learner.model, run)
    kept = torch.cat([torch.full((p.numel(),), name not in apart) for name, p in learner.model.named_parameters()])
    torch.testing.assert_close(learner.applied[0][~kept], rows.mean(0)[~kept], rtol=1e-4, atol=1e-6)
    distances = (rows[:, kept] - learner.applied[0][kept]).norm(dim=1)
    assert float(distances.min()) < 1e-4 * float(distances.max())  # krum takes one client's row


def test_an_optimiser_of_the_users_own_steps_on_what_the_rule_made(
    burned_in: Learner, stream: Stream, federation: Federation
) -> None:
    run = dataclasses.replace(PLAIN, rule={"name": "median"})
    learner = server_of(burned_in, stream, run)
    learner.optimiser = SGD(learner.model.parameters(), lr=0.5)
    before = torch.cat([p.detach().flatten() for p in learner.model.parameters()])
    run_federated(learner, federation, CleanUpdates(), run)
    after = torch.cat([p.detach().flatten() for p in learner.model.parameters()])
    torch.testing.assert_close(after, before - 0.5 * learner.applied[0], rtol=1e-4, atol=1e-6)
