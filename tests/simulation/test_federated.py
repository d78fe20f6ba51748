"""Federated rounds: who brings what, what the server makes of it, what is refused, and that runs repeat."""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim import SGD

from mithridate.aggregators.median import Median
from mithridate.attacks.clean import Clean
from mithridate.bench.store import TRACE_SCHEMA
from mithridate.core.aggregator import Context
from mithridate.core.batch import Batch
from mithridate.core.defence import ADMITTED, Defence, Verdict
from mithridate.core.errors import CheckpointError, ConfigError, DataError, ThreatModelError
from mithridate.core.past import Snapshot, Weights
from mithridate.core.registry import build, make
from mithridate.core.update_attack import Honest, UpdateAttack
from mithridate.core.updates import Updates
from mithridate.core.view import Need, View
from mithridate.core.watch import Monitor, Reading
from mithridate.data.shards import Shards
from mithridate.data.stream import Stream
from mithridate.defences.bound_update import BoundUpdate
from mithridate.defences.chain import chain
from mithridate.defences.clip import Clip
from mithridate.defences.dgc import DGC
from mithridate.defences.dsc import DSC
from mithridate.defences.ema import Ema
from mithridate.defences.filter import Filter
from mithridate.defences.gate import Gate
from mithridate.defences.skip import Skip
from mithridate.defences.trades import Trades
from mithridate.models.norm_layers import norm_layer
from mithridate.simulation.clients import FederatedRun, Federation, federate
from mithridate.simulation.federated import hostile_clients, run_federated
from mithridate.simulation.online import OnlineRun, run_online
from mithridate.simulation.per_client.gradients import client_gradients
from mithridate.simulation.per_client.sums import summed_gradients
from mithridate.simulation.run import Outcome, Progress, victim_optimiser
from mithridate.simulation.server_round import unmeasured_parameters
from mithridate.simulation.trace import COLUMNS
from mithridate.testing import toy_learner
from mithridate.training.history import History
from mithridate.training.learner import Learner, Update
from mithridate.update_attacks.accumulative import AccumulativeUpdates
from mithridate.update_attacks.alie import Alie
from mithridate.update_attacks.clean import CleanUpdates
from mithridate.update_attacks.direct import Direct
from mithridate.update_attacks.hostile import HostileShare
from mithridate.update_attacks.sign_flip import SignFlip
from tests.recipes import timeless_rows

RUN = FederatedRun(rounds=2, lr=0.05)
PLAIN = FederatedRun(rounds=0, lr=0.05, momentum=0.0, batch_norm="frozen")


@pytest.fixture(scope="module")
def federation(stream: Stream) -> Federation:
    return federate(stream, Shards(clients=10), seed=0)


class Looks(HostileShare):
    """Keeps what it is shown, and sends what it would have sent anyway."""

    seen: ClassVar[list[tuple[Tensor, Tensor]]] = []

    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        total = honest.own_total
        self.seen.append((total, honest.own.sum(0)))
        return honest.own


class Doubled(nn.Linear):
    """A layer whose formula nobody knows."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Watched(Learner):
    """Keeps what each round came to."""

    def apply(self, update: Updates, *, batch_loss: float, learned: int, buffers: Mapping[str, Tensor]) -> Update:
        self.applied: list[Updates] = [*getattr(self, "applied", []), update]
        self.learned: list[int] = [*getattr(self, "learned", []), learned]
        return super().apply(update, batch_loss=batch_loss, learned=learned, buffers=buffers)


NewLearner = Callable[..., Watched]


@pytest.fixture(scope="module")
def server(stream: Stream) -> NewLearner:
    """Makes learners that all stand at the end of the same burn-in, with the run's optimiser."""
    burned_in = toy_learner(stream)

    def new(run: FederatedRun = RUN, defence: Defence | None = None, **options: Any) -> Watched:
        model = copy.deepcopy(burned_in.model)
        return Watched(model, victim_optimiser(model, run), defence=defence, **options)

    return new


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors.values()])


def parameters_of(learner: Learner) -> Tensor:
    return flat(dict(learner.model.named_parameters()))


def rows_of(learner: Learner, data: Batch, mode: Any = "eval") -> Tensor:
    return client_gradients(learner.model, F.cross_entropy, data.x, data.y, mode=mode, way="mapped")


def column(outcome: Outcome, name: str) -> list[Any]:
    return [dict(row)[name] for row in outcome.trace]


def equal_bits(a: Snapshot, b: Snapshot) -> bool:
    pairs = [(a.parameters[n], b.parameters[n]) for n in a.parameters]
    pairs += [(a.buffers[n], b.buffers[n]) for n in a.buffers]
    for key, state in a.optimiser["state"].items():
        pairs += [(state[k], b.optimiser["state"][key][k]) for k in state if isinstance(state[k], Tensor)]
    return a.step == b.step and all(torch.equal(x, y) for x, y in pairs)


# Who brings what.


def test_a_round_holds_samples_of_its_clients_own_shards(stream: Stream, federation: Federation) -> None:
    run = FederatedRun(per_round=4, local_batch=3)
    images = {image.tobytes(): i for i, image in enumerate(stream.victim.x)}
    for number in range(3):
        who, data = federation.round(number, run)
        assert data.x.shape == (4, 3, *stream.info.shape)
        for client, pixels, labels in zip(who, data.x, data.y, strict=True):
            found = [images[(image * 255).round().to(torch.uint8).numpy().tobytes()] for image in pixels]
            assert len(set(found)) == 3
            assert set(found) <= set(federation.shards[client].tolist())
            assert stream.victim.y[found].tolist() == labels.tolist()


def test_a_round_depends_on_its_number_and_the_seed_alone(stream: Stream, federation: Federation) -> None:
    run = FederatedRun(per_round=4, local_batch=3)
    who, data = federation.round(5, run)
    federation.round(1, run)
    again, same = federation.round(5, run)
    assert np.array_equal(who, again)
    assert torch.equal(data.x, same.x)
    others = [federation.round(6, run), dataclasses.replace(federation, seed=1).round(5, run)]
    assert not any(torch.equal(data.x, other.x) for _, other in others)


def test_all_clients_bring_their_whole_shards_by_default(stream: Stream, federation: Federation) -> None:
    who, data = federation.round(0, RUN)
    assert who.tolist() == list(range(10))
    assert data.y.shape == (10, 10)
    assert sorted(data.y.flatten().tolist()) == sorted(stream.victim.y.tolist())
    uneven = Federation(stream, [np.arange(7), np.arange(7, 30)], seed=0)
    assert uneven.round(0, RUN)[1].y.shape == (2, 7)  # as many as the smallest


def test_what_a_client_draws_does_not_depend_on_what_others_hold(stream: Stream) -> None:
    """A shard of one image needs no draw; the others' draws are the same beside it."""
    run = FederatedRun(local_batch=1)
    shards = [np.arange(5, 12), np.arange(3, 4), np.arange(20, 40)]
    _, mixed = Federation(stream, shards, seed=0).round(2, run)
    _, long = Federation(stream, [shards[0], np.arange(3, 5), shards[2]], seed=0).round(2, run)
    assert torch.equal(mixed.x[1, 0], stream.victim.batch(np.array([3])).x[0])
    assert torch.equal(mixed.x[[0, 2]], long.x[[0, 2]])


def test_a_stream_that_augments_does_so_here_too(stream: Stream, federation: Federation) -> None:
    settings = dataclasses.replace(stream.settings, augment_stream=True)
    moving = dataclasses.replace(federation, stream=dataclasses.replace(stream, settings=settings))
    _, plain = federation.round(0, RUN)
    _, moved = moving.round(0, RUN)
    assert torch.equal(plain.y, moved.y)
    assert not torch.equal(plain.x, moved.x)
    assert torch.equal(moved.x, moving.round(0, RUN)[1].x)
    assert not torch.equal(moved.x, moving.round(1, RUN)[1].x)


# What the server makes of it.


def test_an_honest_federation_is_sgd_on_the_union(federation: Federation, server: NewLearner) -> None:
    run = dataclasses.replace(PLAIN, rounds=2)
    learner, by_hand = server(run), server(run)
    outcome = run_federated(learner, federation, CleanUpdates(), run)
    _, data = federation.round(0, run)
    x, y = data.x.flatten(0, 1), data.y.flatten()
    by_hand.model.eval()
    for step in range(3):  # two rounds and the trigger: all bring everything in each
        loss = F.cross_entropy(by_hand.model(x), y)
        assert outcome.trace[step + 1]["batch_loss"] == pytest.approx(loss.item(), rel=1e-5)
        grads = torch.autograd.grad(loss, list(by_hand.model.parameters()))
        assert outcome.trace[step + 1]["bounded_norm"] == pytest.approx(
            torch.cat([g.flatten() for g in grads]).norm().item(), rel=1e-4
        )
        with torch.no_grad():
            for p, g in zip(by_hand.model.parameters(), grads, strict=True):
                p.sub_(run.lr * g)
    moved = parameters_of(server()) - parameters_of(by_hand)
    assert moved.norm() > 0.01
    assert torch.allclose(parameters_of(learner), parameters_of(by_hand), atol=1e-4 * float(moved.norm()))
    assert learner.learned == [10, 10, 10]


def test_momentum_and_weight_decay_are_the_servers(federation: Federation, server: NewLearner) -> None:
    run = FederatedRun(rounds=2, lr=0.03, momentum=0.7, weight_decay=0.01, batch_norm="frozen")
    learner, by_hand = server(run), server(run)
    run_federated(learner, federation, CleanUpdates(), run)
    optimiser = SGD(by_hand.model.parameters(), lr=0.03, momentum=0.7, weight_decay=0.01)
    for gradient in learner.applied:
        for name, g in gradient.named().items():
            by_hand.model.get_parameter(name).grad = g
        optimiser.step()
    assert torch.equal(parameters_of(learner), parameters_of(by_hand))


def test_rows_are_numbered_named_and_fit_the_schema(federation: Federation, server: NewLearner) -> None:
    learner = server()
    outcome = run_federated(learner, federation, SignFlip(poison_ratio=0.2), RUN)
    assert column(outcome, "step") == [0, 1, 2, 3]
    assert column(outcome, "phase") == ["start", "accumulative", "accumulative", "trigger"]
    for row in outcome.trace:
        assert tuple(row) == COLUMNS == tuple(TRACE_SCHEMA.names)
    assert column(outcome, "poisoned") == [0.0, 0.2, 0.2, 0.2]
    assert column(outcome, "quarantined") == [0, 0, 0, 0]
    accuracies = column(outcome, "accuracy")
    assert (outcome.accuracy_start, outcome.accuracy_before_trigger) == (accuracies[0], accuracies[-2])
    assert outcome.drop == accuracies[-2] - accuracies[-1]
    assert (outcome.steps, outcome.stopped_by, outcome.status, learner.step) == (2, "steps", "finished", 3)
    assert learner.evaluate([federation.stream.test.all()]).accuracy == accuracies[-1]
    for row in outcome.trace[1:]:
        assert 0 < row["craft_seconds"] + row["update_seconds"] <= row["seconds"]


def test_the_mean_length_of_rows_is_of_those_that_were_sent(federation: Federation, server: NewLearner) -> None:
    rows = rows_of(server(), federation.round(0, PLAIN)[1])
    for scale in (0.0, 5.0):
        outcome = run_federated(server(PLAIN), federation, SignFlip(poison_ratio=0.3, scale=scale), PLAIN)
        lengths = rows.norm(dim=1)
        expected = float((scale * lengths[:3].sum() + lengths[3:].sum()) / 10)
        assert outcome.trace[1]["gradient_norm"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("norm", "how"), [("l2", "scale"), ("linf", "scale"), ("linf", "project")])
def test_a_bound_acts_after_or_before_the_aggregation(
    federation: Federation, server: NewLearner, norm: Any, how: Any
) -> None:
    rows = rows_of(server(), federation.round(0, PLAIN)[1])

    def one(row: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(row, ord=math.inf if norm == "linf" else 2)
        return length

    def clipped(row: Tensor, bound: float) -> Tensor:
        return row.clamp(-bound, bound) if how == "project" else row * min(1.0, bound / float(one(row)))

    bound = 0.7 * float(torch.stack([one(row) for row in rows]).median())
    expected = {
        "after": clipped(rows.mean(0), 0.5 * float(one(rows.mean(0)))),
        "before": torch.stack([clipped(row, bound) for row in rows]).mean(0),
    }
    places: tuple[tuple[Literal["after", "before"], float], ...] = (
        ("after", 0.5 * float(one(rows.mean(0)))),
        ("before", bound),
    )
    for where, limit in places:
        run = dataclasses.replace(PLAIN, bound=where)
        learner = server(run, Clip(clip_norm=limit, norm=norm, how=how))
        outcome = run_federated(learner, federation, CleanUpdates(), run)
        assert torch.allclose(learner.applied[0].rows[0], expected[where], atol=1e-6)
        assert outcome.trace[1]["bounded_norm"] == pytest.approx(float(expected[where].norm()), rel=1e-4)
        assert outcome.trace[1]["gradient_norm"] == pytest.approx(float(rows.norm(dim=1).mean()), rel=1e-4)
    assert not torch.allclose(expected["after"], expected["before"], atol=1e-3)


@pytest.mark.parametrize("rule", [None, {"name": "median"}], ids=["sums", "rows"])
@pytest.mark.parametrize("attack", [CleanUpdates(), SignFlip(poison_ratio=0.3)])
@pytest.mark.parametrize("samples", [1, 7])
def test_batch_norm_synchronised_records_the_union(
    federation: Federation,
    server: NewLearner,
    samples: int,
    attack: UpdateAttack,
    rule: dict[str, Any] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("SUMMED_PASS", "EVALUATION_BATCH"):
        monkeypatch.setattr(f"mithridate.simulation.server_round.{name}", 15)  # a few clients at a time
    run = FederatedRun(rounds=0, local_batch=samples, rule=rule)
    learner = server(run)
    flags = [m.training for m in learner.model.modules()]
    run_federated(learner, federation, attack, run)
    assert [m.training for m in learner.model.modules()] == flags
    fed: dict[str, Tensor] = {}
    with_hooks = server().model.eval()
    for name, module in with_hooks.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, x, name=name: fed.update({name: x[0]}))
    with torch.no_grad():
        with_hooks(federation.round(0, run)[1].x.flatten(0, 1))
    assert len(fed) == 4
    found, start = learner.snapshot().buffers, server().snapshot().buffers
    for name, x in fed.items():
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        assert torch.allclose(
            found[f"{name}.running_mean"], 0.9 * start[f"{name}.running_mean"] + 0.1 * mean, atol=1e-6
        )
        assert torch.allclose(found[f"{name}.running_var"], 0.9 * start[f"{name}.running_var"] + 0.1 * var, atol=1e-6)
        assert found[f"{name}.num_batches_tracked"] == start[f"{name}.num_batches_tracked"] + 1
    if isinstance(attack, CleanUpdates) and rule is None:
        rows = rows_of(server(), federation.round(0, run)[1])  # gradients use the running statistics from before
        assert torch.allclose(learner.applied[0].rows[0], rows.mean(0), atol=1e-6)


def test_batch_norm_averaged_is_the_mean_over_clients(
    federation: Federation, server: NewLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mithridate.simulation.server_round.PASS", 12)  # some clients at a time
    run = FederatedRun(rounds=0, batch_norm="averaged", local_batch=4)
    learner = server(run)
    run_federated(learner, federation, CleanUpdates(), run)
    _, data = federation.round(0, run)
    each = []
    for pixels in data.x:
        alone = server(run)
        alone.model.train()
        with torch.no_grad():
            alone.model(pixels)
        each.append(alone.snapshot().buffers)
    found = learner.snapshot().buffers
    for name, b in found.items():
        mean = torch.stack([buffers[name].double() for buffers in each]).mean(0)
        assert b.dtype == each[0][name].dtype
        assert torch.allclose(b.double(), mean, atol=1e-5)
    synchronised = server(run)
    run_federated(synchronised, federation, CleanUpdates(), dataclasses.replace(run, batch_norm="synchronised"))
    other = synchronised.snapshot().buffers
    assert any(not torch.allclose(found[n].double(), other[n].double(), atol=1e-3) for n in found)
    rows = rows_of(server(), data, "train")  # each client's own statistics in its gradient
    assert torch.allclose(learner.applied[0].rows[0], rows.mean(0), atol=1e-6)


def test_dropout_and_statistics_of_each_clients_own_are_refused(federation: Federation, server: NewLearner) -> None:
    run = FederatedRun(rounds=0, batch_norm="averaged", local_batch=4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout(0.1))
    learner = Watched(model, victim_optimiser(model, run))
    with pytest.raises(ConfigError, match="dropout would draw anew"):
        run_federated(learner, federation, CleanUpdates(), run)
    run_federated(
        learner, federation, CleanUpdates(), dataclasses.replace(run, batch_norm="frozen")
    )  # eval mode draws nothing


def test_batch_norm_frozen_is_not_touched(federation: Federation, server: NewLearner) -> None:
    learner, start = server(), server().snapshot()
    run_federated(learner, federation, CleanUpdates(), dataclasses.replace(RUN, batch_norm="frozen"))
    after = learner.snapshot()
    assert all(torch.equal(after.buffers[n], start.buffers[n]) for n in start.buffers)
    assert not torch.equal(parameters_of(learner), flat(start.parameters))


class Looking(Defence):
    """Notes what it is shown, keeps nothing of it."""

    def __init__(self) -> None:
        self.bounded: list[Tensor] = []

    def bound(self, updates: Updates, view: View) -> Updates:
        self.bounded.append(updates.rows.clone())
        return updates.with_rows(torch.zeros_like(updates.rows))


@pytest.fixture
def ruled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Context]]:
    """What the rule `median` is shown from now on; it gives the first row, and one more."""
    shown: list[tuple[Tensor, Context]] = []

    def combine(_: Median, rows: Tensor, context: Context) -> Tensor:
        shown.append((rows.clone(), context))
        return rows[0] + 1

    monkeypatch.setattr(Median, "combine", combine)
    return shown


def norm_places(model: nn.Module) -> Tensor:
    """Which parameters belong to normalisation layers."""
    owners = dict(model.named_modules())
    kinds = (nn.BatchNorm2d, nn.GroupNorm)
    return torch.cat(
        [
            torch.full((p.numel(),), isinstance(owners[name.rpartition(".")[0]], kinds))
            for name, p in model.named_parameters()
        ]
    )


@pytest.mark.parametrize("bound", ["after", "before"])
def test_norm_parameters_can_be_left_out_of_distances(
    federation: Federation, server: NewLearner, ruled: list[tuple[Tensor, Context]], bound: Any
) -> None:
    run = dataclasses.replace(PLAIN, distances="without_norm", bound=bound, rule={"name": "median"})
    defence = Looking()
    learner = server(run, defence)
    rows = rows_of(server(), federation.round(0, PLAIN)[1])
    apart = norm_places(learner.model)
    assert 0 < int(apart.sum()) < len(apart) / 2
    run_federated(learner, federation, CleanUpdates(), run)
    shown = torch.cat(defence.bounded) if bound == "before" else ruled[0][0]
    assert torch.allclose(shown, rows[:, ~apart], atol=1e-6)
    assert len(ruled) == 1
    if bound == "after":
        assert torch.equal(defence.bounded[0], shown[:1] + 1)  # what the rule made of them
    else:
        assert not ruled[0][0].any()
    applied = learner.applied[0].rows[0]
    assert torch.allclose(applied[apart], rows.mean(0)[apart], atol=1e-6)  # the mean, unbounded
    rest = applied[~apart]
    assert torch.equal(rest, torch.zeros_like(rest) if bound == "after" else torch.ones_like(rest))


def test_normalisation_layers_are_known_by_type() -> None:
    model = nn.Sequential(
        nn.Linear(2, 2), nn.LayerNorm(3), norm_layer("group", 4, 2), nn.InstanceNorm1d(5, affine=True), nn.RMSNorm(6)
    )
    names = {name for name, _ in model.named_parameters()}
    assert names - unmeasured_parameters(model, FederatedRun(distances="without_norm")) == {"0.weight", "0.bias"}
    assert unmeasured_parameters(model, FederatedRun()) == frozenset()


SUMMED: dict[str, tuple[UpdateAttack, Defence | None, FederatedRun]] = {
    "honest": (CleanUpdates(), None, RUN),
    "accumulative": (AccumulativeUpdates(poison_ratio=0.3, lam=0.5, spread=0.1), Clip(clip_norm=0.3), RUN),
    "accumulative, all": (AccumulativeUpdates(poison_ratio=1.0, lam=0.5), Clip(clip_norm=0.3), RUN),
    "a clip after": (SignFlip(), Clip(clip_norm=0.1, norm="linf"), RUN),
    "a clip before": (SignFlip(), Clip(clip_norm=0.05), dataclasses.replace(RUN, bound="before")),
    "apart": (Direct(), Clip(clip_norm=0.05), dataclasses.replace(RUN, bound="before", distances="without_norm")),
    "a chain": (
        SignFlip(),
        chain(Clip(clip_norm=0.2), Clip(clip_norm=0.1), BoundUpdate(clip_norm=0.01)),
        dataclasses.replace(RUN, bound="before", local_batch=3),
    ),
}


OWN_SUMS = {"accumulative": 2 * 3, "accumulative, all": 2 * 10, "apart": 10}
"""Of hostile clients' updates, those that an attack wants the sum of, in all rounds."""


@pytest.mark.parametrize("name", SUMMED)
def test_sums_are_those_of_the_rows(
    federation: Federation, server: NewLearner, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack, defence, run = SUMMED[name]
    calls: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(len(args[2]))
        return summed_gradients(*args, **options)

    monkeypatch.setattr("mithridate.simulation.server_round.SUMMED_PASS", 4)  # a few clients at a time
    monkeypatch.setattr("mithridate.simulation.server_round.summed_gradients", counted)
    summed, by_rows = server(run, defence), server(run, defence)
    first = run_federated(summed, federation, attack, run)
    honest = 10 - hostile_clients(attack, 10)
    assert sum(calls) == 3 * honest + OWN_SUMS.get(name, 0)  # every honest client of three rounds, none by rows
    monkeypatch.setattr("mithridate.simulation.server_round.summed_gradients", lambda *_, **__: "not today")
    second = run_federated(by_rows, federation, attack, run)
    for one, other in zip(timeless_rows(first.trace), timeless_rows(second.trace), strict=True):
        for key, value in one.items():
            assert value == (pytest.approx(other[key], rel=1e-3, abs=1e-6) if isinstance(value, float) else other[key])
    moved = float((parameters_of(by_rows) - parameters_of(server())).norm())
    assert torch.allclose(parameters_of(summed), parameters_of(by_rows), atol=1e-3 * moved)
    ours, theirs = summed.snapshot().buffers, by_rows.snapshot().buffers
    assert all(torch.allclose(ours[n].double(), theirs[n].double(), atol=1e-4) for n in ours)


class Halving(Clip):
    """A user's: overrides the bound of a defence that needs no rows."""

    def bound(self, updates: Updates, view: View) -> Updates:
        return updates.with_rows(updates.rows / 2)


def test_a_bound_that_looks_at_rows_sees_them(federation: Federation, server: NewLearner) -> None:
    run = dataclasses.replace(PLAIN, bound="before")
    learner = server(run, Halving(clip_norm=1e-3))
    run_federated(learner, federation, CleanUpdates(), run)
    rows = rows_of(server(), federation.round(0, run)[1])
    assert torch.allclose(learner.applied[0].rows[0], rows.mean(0) / 2, atol=1e-6)


class Noting(Clip):
    """A user's: counts its calls, in its notes and beside them."""

    calls: ClassVar[list[bool]] = []

    def bound(self, updates: Updates, view: View) -> Updates:
        self.calls.append(True)
        view.memory["calls"] += 1
        return super().bound(updates, view)


def test_who_is_asked_whether_it_looks_at_rows_keeps_no_note_of_that(
    federation: Federation, server: NewLearner
) -> None:
    run = dataclasses.replace(PLAIN, bound="before")
    learner = server(run, Noting(clip_norm=0.05))
    learner.memory["calls"] = torch.zeros(())
    Noting.calls.clear()
    run_federated(learner, federation, CleanUpdates(), run)
    assert int(learner.memory["calls"]) == len(Noting.calls) - 1 > 0


def test_an_update_that_is_not_finite_is_refused_where_rows_are_not_formed(
    federation: Federation, server: NewLearner
) -> None:
    learner = server(PLAIN)
    data = federation.round(0, PLAIN)[1]

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        broken = torch.equal(labels, data.y[2])
        return F.cross_entropy(logits, labels) * (math.inf if broken else 1.0)

    learner.criterion = loss
    outcome = run_federated(learner, federation, CleanUpdates(), PLAIN)
    assert outcome.trace[1]["quarantined"] == 1
    rows = rows_of(server(), data)
    kept = torch.arange(10) != 2
    assert torch.allclose(learner.applied[0].rows[0], rows[kept].mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("attack", "rule", "who"),
    [
        (CleanUpdates(), {"name": "median"}, "the rule median"),
        (CleanUpdates(), {"name": "krum", "hostile": 1}, "the rule krum"),
        (Alie(), None, "Alie"),
    ],
)
def test_who_looks_at_all_rows_needs_them_held(
    federation: Federation, server: NewLearner, attack: UpdateAttack, rule: dict[str, Any] | None, who: str
) -> None:
    learner = server()
    start = learner.snapshot()
    run = dataclasses.replace(RUN, max_matrix=1e-6, rule=rule)
    with pytest.raises(ConfigError, match=rf"{who} looks at all updates.*10 clients of [\d,]+ parameters.*max_matrix"):
        run_federated(learner, federation, attack, run)
    assert equal_bits(learner.snapshot(), start)


@dataclasses.dataclass(frozen=True)
class Sending(HostileShare):
    """Sends one number everywhere, or a row of its own making."""

    value: float = math.nan
    share: float = 0.3
    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL})

    @property
    def ratio(self) -> float:
        return self.share

    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        return torch.full_like(honest.own, self.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bound", ["after", "before"])
def test_updates_that_are_not_finite_are_refused_and_counted(
    federation: Federation, server: NewLearner, value: float, bound: Any
) -> None:
    run = dataclasses.replace(PLAIN, bound=bound)
    learner = server(run, Clip(clip_norm=100.0))
    outcome = run_federated(learner, federation, Sending(value=value), run)
    rows = rows_of(server(), federation.round(0, run)[1])
    assert torch.allclose(learner.applied[0].rows[0], rows[3:].mean(0), atol=1e-6)
    assert column(outcome, "quarantined") == [0, 3]
    assert (outcome.quarantined, outcome.status, learner.learned) == (3, "finished", [7])
    assert outcome.trace[1]["gradient_norm"] == pytest.approx(float(rows[3:].norm(dim=1).mean()), rel=1e-4)


def test_refused_updates_cannot_stop_a_server_whose_rule_then_has_too_few(
    federation: Federation, server: NewLearner
) -> None:
    """Krum with three hostile clients needs nine rows; of ten, three send NaN: the round brings nothing, and passes."""
    run = dataclasses.replace(PLAIN, rule={"name": "krum", "hostile": 3})
    learner = server(run)
    before = learner.snapshot()
    outcome = run_federated(learner, federation, Sending(), run)
    assert (outcome.quarantined, outcome.status) == (3, "finished")
    assert all(torch.equal(p, before.parameters[name]) for name, p in learner.model.named_parameters())


def test_a_rule_is_told_whose_rows_it_sees(
    federation: Federation, server: NewLearner, ruled: list[tuple[Tensor, Context]]
) -> None:
    """Honest rows come first; the hostile clients' rows, here the first three of the round, are refused."""
    run = dataclasses.replace(PLAIN, per_round=6, rule={"name": "median"})
    who = federation.round(0, run)[0].tolist()
    for attack, expected in ((Sending(share=0.5), who[3:]), (SignFlip(poison_ratio=0.5), who[3:] + who[:3])):
        ruled.clear()
        run_federated(server(run), federation, attack, run)
        assert [context.clients.tolist() for _, context in ruled] == [expected]


@pytest.mark.parametrize("bound", ["after", "before"])
@pytest.mark.parametrize("rule", [False, True])
def test_a_round_without_a_finite_update_moves_nothing(
    federation: Federation, server: NewLearner, bound: Any, rule: bool
) -> None:
    run = dataclasses.replace(PLAIN, bound=bound, rule={"name": "median"} if rule else None)
    learner = server(run, Clip())
    outcome = run_federated(learner, federation, Sending(share=1.0), run)
    assert torch.equal(parameters_of(learner), parameters_of(server()))
    assert (outcome.quarantined, learner.learned) == (10, [0])


@pytest.mark.parametrize("name", ["alie", "min_max"])
def test_who_hides_among_honest_rows_stops_no_run_in_which_none_is_finite(
    federation: Federation, server: NewLearner, name: str
) -> None:
    run = dataclasses.replace(RUN, rounds=2)
    learner = server(run)
    with torch.no_grad():
        next(learner.model.parameters()).fill_(math.nan)
    outcome = run_federated(learner, federation, build("update_attack", {"name": name}), run)
    assert (outcome.status, column(outcome, "quarantined")) == ("diverged", [0, 10, 10, 10])


@pytest.mark.parametrize(
    ("ratio", "hostile"), [(0.0, 0), (0.01, 1), (0.1, 1), (0.11, 2), (0.3, 3), (0.7, 7), (0.95, 10), (1.0, 10)]
)
def test_hostile_clients_are_rounded_up(federation: Federation, server: NewLearner, ratio: float, hostile: int) -> None:
    outcome = run_federated(server(PLAIN), federation, Sending(share=ratio), PLAIN)
    assert outcome.trace[1]["quarantined"] == hostile
    assert outcome.trace[1]["poisoned"] == hostile / 10


class Spying(HostileShare):
    """Sends the honest rows; keeps what it was shown."""

    every_row: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL, Need.VALIDATION, Need.TRIGGER, Need.ACCURACY})
    shown: ClassVar[list[Honest]] = []
    views: ClassVar[list[View]] = []
    steps: ClassVar[list[tuple[str, int]]] = []

    @property
    def ratio(self) -> float:
        return 0.3

    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        self.shown.append(honest)
        self.views.append(view)
        self.steps.append(("craft", view.step))
        return honest.own

    def craft_trigger(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        self.steps.append(("trigger", view.step))
        return honest.own

    def after_step(self, view: View, rng: Generator) -> None:
        self.steps.append(("after step", view.step))


def test_what_an_attacker_is_shown(stream: Stream, federation: Federation, server: NewLearner) -> None:
    for spied in (Spying.shown, Spying.views, Spying.steps):
        spied.clear()
    run = dataclasses.replace(PLAIN, rounds=1, bound="before")
    clip = Clip(clip_norm=0.2)
    learner = server(run, clip)
    run_federated(learner, federation, Spying(), run)
    _, data = federation.round(0, run)
    rows = rows_of(server(), data)
    bounded = clip.bound(Updates(rows, {}), View()).rows
    (honest,), (view,) = Spying.shown, Spying.views
    assert torch.allclose(honest.own, rows[:3], atol=1e-6)
    assert torch.allclose(honest.total, rows[3:].sum(0), atol=1e-5)
    assert torch.allclose(honest.bounded_total, bounded[3:].sum(0), atol=1e-5)
    assert honest.rows is not None
    assert torch.allclose(honest.rows, bounded[3:], atol=1e-6)
    assert torch.allclose(honest.mean, rows.mean(0), atol=1e-6)
    assert (honest.n_honest, honest.clients) == (7, 10)
    assert torch.equal(honest.x, data.x[:3])
    assert torch.equal(honest.y, data.y[:3])
    trigger = federation.round(1, run)[1]
    assert torch.equal(view.clean_trigger.x, trigger.x.flatten(0, 1))
    assert torch.equal(view.validation.x, stream.validation.all().x)
    assert Spying.steps == [("craft", 0), ("after step", 1), ("trigger", 1)]
    assert torch.allclose(learner.applied[0].rows[0], bounded.mean(0), atol=1e-6)


class Peeking(HostileShare):
    """Looks at what it does not declare."""

    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        return honest.own * float(view.accuracy[0])


def test_an_attack_sees_only_what_it_declares(federation: Federation, server: NewLearner) -> None:
    with pytest.raises(
        ThreatModelError, match=r"Peeking looked at the .*accuracy that the service publishes, but does not declare"
    ):
        run_federated(server(), federation, Peeking(), RUN)


# Repeating, stopping, going on.


ATTACKS: list[dict[str, Any]] = [
    {"name": "accumulative", "preset": "paper", "poison_ratio": 0.2, "trigger": "reoptimised", "alpha": 0.3}
    | {"spread": 0.2, "resample_validation": True, "validation_size": 20},
    {"name": "noise", "poison_ratio": 0.4},
]
DEFENDED: dict[str, tuple[Defence | None, dict[str, Any] | None]] = {
    "clip": (Clip(clip_norm=0.3), None),
    "a rule with memory": (None, {"name": "centered_clipping", "worker_momentum": 0.5}),
    "average": (Ema(decay=0.7), None),
    "rule and chain": (
        chain(Clip(clip_norm=0.5), Skip(watch="gradient")),
        {"name": "trimmed_mean", "hostile": 2},
    ),
}


class Killed(Exception):
    """Stands for a power cut."""


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("defended", DEFENDED)
@pytest.mark.parametrize("settings", ATTACKS, ids=lambda s: str(s["name"]))
def test_an_interrupted_run_goes_on_to_the_same_rows(
    federation: Federation, server: NewLearner, settings: dict[str, Any], defended: str, after: int
) -> None:
    defence, rule = DEFENDED[defended]
    run = FederatedRun(rounds=3, lr=0.05, per_round=6, local_batch=4, rule=rule)
    attack = build("update_attack", settings)
    whole_learner = server(run, defence)
    whole = run_federated(whole_learner, federation, attack, run)
    kept: list[tuple[Progress, Snapshot, dict[str, Tensor]]] = []
    learner = server(run, defence)

    def on_step(progress: Progress) -> None:
        if len(progress.rows) == after + 1:
            kept.append(copy.deepcopy((progress, learner.snapshot(), learner.memory)))
            raise Killed

    with pytest.raises(Killed):
        run_federated(learner, federation, attack, run, on_step=on_step)
    progress, snapshot, memory = kept[0]
    again = server(run, defence)
    again.restore(snapshot)
    again.memory.update(memory)
    resumed = run_federated(again, federation, attack, run, progress=progress)
    assert timeless_rows(resumed.trace) == timeless_rows(whole.trace)
    assert equal_bits(again.snapshot(), whole_learner.snapshot())


def test_the_same_seed_gives_the_same_rows_and_another_does_not(stream: Stream, server: NewLearner) -> None:
    run = dataclasses.replace(RUN, per_round=6, local_batch=4)
    attack = build("update_attack", {"name": "noise", "poison_ratio": 0.4})
    traces = []
    for seed in (0, 0, 1):
        federation = federate(stream, Shards(clients=10), seed=seed)
        traces.append(timeless_rows(run_federated(server(run), federation, attack, run).trace))
    assert traces[0] == traces[1]
    assert traces[0] != traces[2]


class Alarm(Monitor):
    """Rings from one round on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def alarm(self, readings: Sequence[Reading]) -> str | None:
        return f"rang at {readings[-1].step}" if readings[-1].step >= self.step else None


@pytest.mark.parametrize(
    ("on_alarm", "phases", "stopped_by"),
    [
        ("record", ["start", "accumulative", "accumulative", "accumulative", "trigger"], "steps"),
        ("trigger", ["start", "accumulative", "trigger"], "monitor"),
        ("halt", ["start", "accumulative"], "monitor"),
    ],
)
def test_an_alarm_does_what_it_is_set_to(
    federation: Federation, server: NewLearner, on_alarm: Any, phases: list[str], stopped_by: str
) -> None:
    run = FederatedRun(rounds=3, on_alarm=on_alarm)
    outcome = run_federated(server(run), federation, CleanUpdates(), run, monitors=[Alarm(1)])
    assert column(outcome, "phase") == phases
    assert (outcome.stopped_by, outcome.first_alarm_step) == (stopped_by, 1)
    assert (outcome.status == "halted") == (on_alarm == "halt") == (outcome.drop is None)


@pytest.mark.parametrize("attack", [CleanUpdates(phase=False), Direct()])
def test_without_a_phase_the_same_trigger_comes_first(
    federation: Federation, server: NewLearner, attack: UpdateAttack
) -> None:
    run = dataclasses.replace(PLAIN, rounds=4, per_round=5)
    learner = server(run)
    outcome = run_federated(learner, federation, attack, run)
    assert column(outcome, "phase") == ["start", "trigger"]
    rows = rows_of(server(), federation.round(4, run)[1])
    sign = -1 if isinstance(attack, Direct) else 1
    assert torch.allclose(learner.applied[0].rows[0], sign * rows.mean(0), atol=1e-6)


# Defences in a round.


class Counting(Defence):
    """A user's: counts steps and rounds, changes nothing."""

    def begin(self, view: View) -> None:
        view.memory["rounds"] = view.memory.get("rounds", torch.zeros(())) + 1


def test_a_defence_that_only_takes_notes_may_stand_before_a_federation(
    federation: Federation, server: NewLearner
) -> None:
    learner = server(RUN, Counting())
    run_federated(learner, federation, CleanUpdates(), RUN)
    assert learner.memory["rounds"] == 3


def test_a_gate_rolls_back_parameters_statistics_and_momentum(
    stream: Stream, federation: Federation, server: NewLearner
) -> None:
    run = dataclasses.replace(RUN, rounds=1)
    seen: list[Snapshot] = []
    learner = server(run, Gate(max_loss_rise=0.2, max_accuracy_drop=math.inf), trusted=stream.trusted.all())
    attack = AccumulativeUpdates(trigger="reversed", lam=0.0, clean_weight=1.0, trigger_norm=100.0)
    outcome = run_federated(learner, federation, attack, run, on_step=lambda _: seen.append(learner.snapshot()))
    assert column(outcome, "admitted") == [True, True, False]
    assert "trusted loss" in outcome.trace[-1]["verdict"]
    assert seen[0].optimiser["state"][0]["momentum_buffer"].abs().sum() > 0
    assert equal_bits(learner.snapshot(), seen[0])
    assert outcome.trace[-1]["update_norm"] == 0
    assert outcome.trace[-1]["accuracy"] == outcome.trace[-2]["accuracy"]
    free = run_federated(server(run), federation, attack, run)
    assert free.drop is not None
    assert free.drop > 0.3


def test_an_average_is_what_is_served(federation: Federation, server: NewLearner) -> None:
    run = FederatedRun(rounds=3, lr=0.05)
    learner, plain = server(run, Ema(decay=0.5)), server(run)
    states = [plain.snapshot()]
    tests = [federation.stream.test.all()]
    outcome = run_federated(learner, federation, CleanUpdates(), run)
    free = run_federated(plain, federation, CleanUpdates(), run, on_step=lambda _: states.append(plain.snapshot()))
    states.append(plain.snapshot())
    assert equal_bits(learner.snapshot(), plain.snapshot())  # the model that learns is the same
    average = {**states[0].parameters, **states[0].buffers}
    for i, state in enumerate(states):
        now = {**state.parameters, **state.buffers}
        average = {n: torch.lerp(t, now[n], 0.5) if t.is_floating_point() else now[n] for n, t in average.items()}
        averaged = server(run)
        averaged.put_parameters({n: average[n] for n in state.parameters})
        averaged.put_buffers({n: average[n] for n in state.buffers})
        score = averaged.evaluate(tests)
        assert outcome.trace[i]["loss"] == pytest.approx(score.loss, rel=1e-4)
    assert column(outcome, "loss")[2] != pytest.approx(column(free, "loss")[2], rel=1e-3)
    assert outcome.accuracy_after_buffers is None  # another model's statistics say nothing
    assert free.accuracy_after_buffers is not None


def test_buffers_alone_are_the_trigger_rounds(federation: Federation, server: NewLearner) -> None:
    run = dataclasses.replace(RUN, rounds=0)
    learner = server(run)
    outcome = run_federated(learner, federation, Direct(trigger_scale=20.0), run)
    mixed = server(run)
    mixed.put_buffers(learner.snapshot().buffers)
    assert outcome.accuracy_after_buffers == mixed.evaluate([federation.stream.test.all()]).accuracy
    assert outcome.drop is not None
    assert outcome.drop > 0.1
    frozen = dataclasses.replace(run, batch_norm="frozen")
    still = run_federated(server(frozen), federation, Direct(trigger_scale=20.0), frozen)
    assert still.accuracy_after_buffers == still.accuracy_start


@pytest.mark.parametrize("defence", [DSC(), Filter(), Trades(), chain(Clip(), DSC())], ids=lambda d: type(d).__name__)
def test_a_defence_that_acts_on_samples_is_refused(
    stream: Stream, federation: Federation, server: NewLearner, defence: Defence
) -> None:
    learner = server(RUN, defence, trusted=stream.trusted.all(), history=History(keep=1))
    with pytest.raises(ConfigError, match="acts on training samples, and the server of a federation sees none"):
        run_federated(learner, federation, CleanUpdates(), RUN)
    assert learner.step == 0


BEFORE = dataclasses.replace(RUN, bound="before")
WITHOUT_NORM = dataclasses.replace(RUN, distances="without_norm")


@pytest.mark.parametrize(
    ("defence", "run", "refused"),
    [
        (Skip(), RUN, ""),
        (Skip(watch="gradient"), RUN, ""),
        (Skip(watch="loss"), RUN, 'skip: .*set watch = "gradient"'),
        (chain(Skip()), BEFORE, 'bound = "after"'),
        (DGC(), RUN, ""),
        (DGC(), BEFORE, ""),
        (chain(Clip(), DGC()), WITHOUT_NORM, 'distances = "all"'),
        (Clip(), WITHOUT_NORM, ""),
        (Gate(), RUN, ""),
        (Ema(), RUN, ""),
        (chain(Gate(), Ema(), BoundUpdate()), BEFORE, ""),
    ],
)
def test_defences_are_checked_before_anything_is_learned(
    federation: Federation, server: NewLearner, defence: Defence, run: FederatedRun, refused: str
) -> None:
    if not refused:
        defence.check_federation(run, 10)
        return
    learner = server(run, defence)
    with pytest.raises(ConfigError, match=refused):
        run_federated(learner, federation, CleanUpdates(), run)
    assert learner.step == 0


def test_skip_watches_the_updates_of_rounds(federation: Federation, server: NewLearner) -> None:
    run = FederatedRun(rounds=3, lr=0.01, momentum=0.0)
    learner = server(run, Skip(watch="gradient", warmup=2, threshold=20.0))
    attack = AccumulativeUpdates(trigger="reversed", lam=0.0, clean_weight=1.0, trigger_scale=100.0)
    outcome = run_federated(learner, federation, attack, run)
    assert column(outcome, "admitted") == [True] * 4 + [False]
    assert outcome.drop == 0


# Learner.apply.


def test_a_gradient_made_elsewhere_is_stepped_on_and_recorded(stream: Stream, server: NewLearner) -> None:
    history = History(keep=3)
    learner = server(PLAIN, history=history)
    start = learner.snapshot()
    rows = torch.ones(1, len(parameters_of(learner)))
    shapes = {name: p.shape for name, p in learner.model.named_parameters()}
    buffers = {name: b + 1 for name, b in learner.model.named_buffers()}
    stale = next(learner.model.parameters())
    stale.grad = torch.full_like(stale, 100.0)
    with learner.taking():
        done = learner.apply(Updates(rows, shapes), batch_loss=0.5, learned=4, buffers=buffers)
    assert torch.allclose(parameters_of(learner), flat(start.parameters) - 0.05, atol=1e-6)
    assert all(torch.equal(b, buffers[name]) for name, b in learner.model.named_buffers())
    assert (done.batch_loss, done.learned, done.verdict, learner.step) == (0.5, 4, ADMITTED, 1)
    assert done.gradient_norm == done.bounded_norm == pytest.approx(math.sqrt(rows.shape[1]), rel=1e-5)
    assert done.update_norm == pytest.approx(0.05 * math.sqrt(rows.shape[1]), rel=1e-3)
    assert all(p.grad is None for p in learner.model.parameters())
    old = history.back(0)  # the newest that is kept: before the update
    assert old is not None
    assert torch.equal(flat(old.parameters), flat(start.parameters))


class Recalling(Defence):
    """Notes how far back what it is shown lies, at the moment when rows are bounded and ruled."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.HISTORY})

    def __init__(self) -> None:
        self.labels: list[tuple[str, str]] = []

    def bound(self, updates: Updates, view: View) -> Updates:
        found = [view.history.back(k) for k in (0, 1)]
        self.labels.append((found[0].label if found[0] else "none", found[1].label if found[1] else "none"))
        return updates


@pytest.mark.parametrize("bound", ["after", "before"])
def test_looking_back_counts_from_the_model_as_it_is(federation: Federation, server: NewLearner, bound: Any) -> None:
    """As online: no update back is the current model, not the one before it."""
    run = dataclasses.replace(RUN, bound=bound, per_round=2)
    defence = Recalling()
    run_federated(server(run, defence, history=History(keep=3)), federation, CleanUpdates(), run)
    assert list(dict.fromkeys(defence.labels)) == [
        ("before update 0", "none"),
        ("before update 1", "before update 0"),
        ("before update 2", "before update 1"),
    ]


class Deciding(Defence):
    def __init__(self, verdict: Verdict | Exception) -> None:
        self.verdict = verdict

    def admit(self, before: Weights, view: View) -> Verdict:
        if isinstance(self.verdict, Exception):
            raise self.verdict
        return self.verdict


@pytest.mark.parametrize("verdict", [Verdict(admit=False, reason="no"), ArithmeticError("odd")], ids=["no", "raises"])
def test_a_refused_round_leaves_everything_as_it_was(server: NewLearner, verdict: Any) -> None:
    learner = server(RUN, Deciding(ADMITTED))
    shapes = {name: p.shape for name, p in learner.model.named_parameters()}
    rows = torch.ones(1, len(parameters_of(learner)))
    buffers = {name: b + 1 for name, b in learner.model.named_buffers()}

    def applied(buffers: Mapping[str, Tensor]) -> Update:
        with learner.taking():
            return learner.apply(Updates(rows, shapes), batch_loss=0.0, learned=1, buffers=buffers)

    applied(buffers)
    before = learner.snapshot()
    assert isinstance(learner.defence, Deciding)
    learner.defence.verdict = verdict
    other = {name: b + 1 for name, b in buffers.items()}
    if isinstance(verdict, Exception):
        with pytest.raises(ArithmeticError):
            applied(other)
    else:
        done = applied(other)
        assert (done.update_norm, done.verdict) == (0.0, verdict)
    assert equal_bits(learner.snapshot(), before)


def test_foreign_statistics_are_refused_before_the_step(server: NewLearner) -> None:
    learner = server()
    before = learner.snapshot()
    shapes = {name: p.shape for name, p in learner.model.named_parameters()}
    update = Updates(torch.ones(1, len(parameters_of(learner))), shapes)

    def step() -> None:
        with learner.taking():
            learner.apply(update, batch_loss=0.0, learned=1, buffers={})

    with pytest.raises(CheckpointError, match="buffers are of another model"):
        step()
    assert equal_bits(learner.snapshot(), before)
    assert all(p.grad is None for p in learner.model.parameters())


# What cannot be run.


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"per_round": 11}, "11 of 10 clients asked for"),
        ({"local_batch": 11}, r"local_batch = 11, and a client of round 0 holds 10 samples"),
    ],
    ids=str,
)
def test_more_than_there_is_is_refused_before_anything_is_learned(
    federation: Federation, server: NewLearner, run: dict[str, Any], message: str
) -> None:
    learner = server()
    with pytest.raises(DataError, match=message):
        run_federated(learner, federation, CleanUpdates(), FederatedRun(**run))
    assert learner.step == 0


def test_a_later_round_that_asks_for_too_much_is_found_at_the_start(stream: Stream, server: NewLearner) -> None:
    shards = [np.arange(i * 9, i * 9 + (2 if i == 7 else 9)) for i in range(10)]
    federation = Federation(stream, shards, seed=0)
    run = FederatedRun(rounds=30, per_round=2, local_batch=5)
    first = next(r for r in range(31) if 7 in federation.round(r, dataclasses.replace(run, local_batch=1))[0])
    assert first > 0
    learner = server(run)
    with pytest.raises(DataError, match=f"a client of round {first} holds 2 samples"):
        run_federated(learner, federation, CleanUpdates(), run)
    assert learner.step == 0


@pytest.mark.parametrize(
    "values",
    [{"rounds": -1}, {"per_round": 0}, {"local_batch": 0}, {"lr": 0.0}, {"max_matrix": 0.0}, {"bound": "never"}],
    ids=str,
)
def test_settings_out_of_range_are_refused(values: dict[str, Any]) -> None:
    (key,) = values
    with pytest.raises(ConfigError, match=rf"\[federated\]: {key}"):
        make(FederatedRun, values, where="[federated]")


def test_a_client_of_one_sample_has_no_statistics_to_average(server: NewLearner, stream: Stream) -> None:
    """Single pixels in the last maps: no variance, and a verdict. The small net has larger ones, and goes through."""
    run = FederatedRun(rounds=0, batch_norm="averaged", local_batch=1)
    federation = federate(stream, Shards(clients=10), seed=0)
    run_federated(server(run), federation, CleanUpdates(), run)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4))
    learner = Learner(model, SGD(model.parameters(), lr=0.1))
    before = copy.deepcopy(model.state_dict())
    row = run_federated(learner, federation, CleanUpdates(), run).trace[-1]
    assert (row["admitted"], row["update_norm"], row["batch_loss"]) == (False, 0.0, None)
    assert "10 clients of 1 samples each are too few for BatchNorm" in row["verdict"]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


class Own(nn.Module):
    """A user's: an unknown layer, no BatchNorm, one parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.ones(64), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(64))
        self.last = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(x.flatten(1) * self.scale * self.frozen)
        return logits


@pytest.mark.parametrize("attack", [CleanUpdates(), SignFlip(), AccumulativeUpdates(poison_ratio=0.1), Alie()])
def test_a_users_own_module_runs(federation: Federation, attack: UpdateAttack) -> None:
    torch.manual_seed(0)
    model = Own()
    learner = Learner(model, SGD([p for p in model.parameters() if p.requires_grad], lr=0.5))
    outcome = run_federated(learner, federation, attack, RUN)
    assert math.isfinite(outcome.trace[-1]["loss"] or math.nan)
    assert torch.equal(model.frozen, torch.ones(64))
    assert not torch.equal(model.scale, torch.ones(64))


@pytest.mark.parametrize("rule", [None, {"name": "median"}], ids=["mean", "median"])
@pytest.mark.parametrize("many", [(), (3,)], ids=["a number", "many labels"])
def test_targets_may_be_numbers_of_any_shape(many: tuple[int, ...], rule: dict[str, Any] | None) -> None:
    """Of honest clients and hostile ones: a sample's targets stay together wherever clients' samples are joined."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 6)).astype(np.float32), (rng.random((80, *many)) < 0.5).astype(np.float32)
    federation = federate(Stream.from_arrays(x, y, victim=40), Shards(clients=5), seed=0)
    run = FederatedRun(rounds=1, lr=0.05, rule=rule)
    model = nn.Linear(6, 3) if many else nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))
    criterion = F.binary_cross_entropy_with_logits if many else F.mse_loss
    _, data = federation.round(0, run)
    before = criterion(model(data.x.flatten(0, 1)), data.y.flatten(0, 1)).item()
    learner = Learner(model, victim_optimiser(model, run), criterion=criterion)
    outcome = run_federated(learner, federation, SignFlip(poison_ratio=0.4), run)
    assert [row["admitted"] for row in outcome.trace[1:]] == [True, True]
    assert outcome.trace[1]["batch_loss"] == pytest.approx(before, rel=1e-5)


def test_an_online_learner_is_the_federation_of_one_client(stream: Stream, server: NewLearner) -> None:
    """One client that brings the whole victim part in a round: an online step on it, with BatchNorm in eval mode."""
    settings = dataclasses.replace(stream.settings, batch_size=100)
    whole = dataclasses.replace(stream, settings=settings)

    run = FederatedRun(rounds=0, lr=0.05, batch_norm="frozen")
    learner, online = server(run), server(run)
    online.update_mode = "eval"
    federated = run_federated(learner, federate(whole, Shards(clients=1), seed=0), CleanUpdates(), run)
    other = run_online(online, whole, Clean(), OnlineRun(steps=0, lr=0.05, update_mode="eval"), seed=0)
    for name in ("accuracy", "loss", "batch_loss", "bounded_norm", "update_norm"):
        assert federated.trace[1][name] == pytest.approx(other.trace[1][name], rel=1e-4)


@pytest.mark.parametrize(("every", "measured"), [(1, {0, 1, 2, 3, 4, 5}), (3, {0, 3, 4, 5})])
def test_rounds_are_measured_in_turn_at_the_start_and_around_the_trigger(
    federation: Federation, server: NewLearner, every: int, measured: set[int]
) -> None:
    run = FederatedRun(rounds=4, lr=0.05)
    whole = run_federated(server(run), federation, CleanUpdates(), run)
    outcome = run_federated(server(run), federation, CleanUpdates(), dataclasses.replace(run, evaluate_every=every))
    for key in ("accuracy", "loss"):
        assert [row[key] for row in outcome.trace] == [
            row[key] if row["step"] in measured else None for row in whole.trace
        ]
    assert outcome.accuracy_before_trigger == whole.accuracy_before_trigger
    assert (outcome.read_step, whole.read_step) == (4 // every * every, 4)


def test_rounds_between_are_measured_on_a_subset(federation: Federation, server: NewLearner) -> None:
    run = FederatedRun(rounds=4, lr=0.05)
    whole = run_federated(server(run), federation, CleanUpdates(), run)
    some = dataclasses.replace(run, evaluate_every=2, evaluate_size=50)
    outcome = run_federated(server(run), federation, CleanUpdates(), some)
    n = len(federation.stream.test)
    assert [row["test_samples"] for row in outcome.trace] == [n, None, 50, None, n, n]
    assert (outcome.read_step, outcome.read_samples) == (4, 50)
    for key in ("accuracy_start", "accuracy_before_trigger", "accuracy_after_trigger", "drop"):
        assert getattr(outcome, key) == getattr(whole, key)
    with pytest.raises(ConfigError, match="evaluate_size"):
        run_federated(server(run), federation, CleanUpdates(), dataclasses.replace(run, evaluate_size=n + 1))


@pytest.mark.parametrize("batch_norm", ["frozen", "averaged"])
@pytest.mark.parametrize("known", [True, False])
def test_the_sum_of_hostile_updates_is_that_of_their_rows(
    federation: Federation, server: NewLearner, monkeypatch: pytest.MonkeyPatch, batch_norm: Any, *, known: bool
) -> None:
    """Whether it is formed without rows, or from them where statistics or a layer want that."""
    monkeypatch.setattr(Looks, "seen", [])
    run = dataclasses.replace(RUN, batch_norm=batch_norm, local_batch=4)
    learner = server(run)
    if not known:
        learner.model.fc2 = Doubled(32, 4)
        learner.optimiser = victim_optimiser(learner.model, run)
    run_federated(learner, federation, Looks(poison_ratio=0.5), run)
    assert len(Looks.seen) == 3
    for total, rows in Looks.seen:
        assert float((total - rows).norm()) < 1e-5 * float(rows.norm())
