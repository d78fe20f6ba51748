"""One client's samples that the model cannot take: that client is left out by name, and the others' round goes on."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mithridate.core.batch import Batch
from mithridate.core.targets import IGNORED
from mithridate.core.update_attack import UpdateAttack
from mithridate.data.shards import Shards
from mithridate.data.stream import Stream
from mithridate.defences.gate import Gate
from mithridate.simulation.clients import FederatedRun, Federation, federate
from mithridate.simulation.federated import run_federated
from mithridate.simulation.run import Outcome, victim_optimiser
from mithridate.simulation.unfit_clients import left_out, taken_clients
from mithridate.testing import toy_learner, toy_stream
from mithridate.training.learner import Learner
from mithridate.update_attacks.accumulative import AccumulativeUpdates
from mithridate.update_attacks.alie import Alie
from mithridate.update_attacks.clean import CleanUpdates
from mithridate.update_attacks.sign_flip import SignFlip

CLIENTS = 5  # all with the same number of samples, so that each round has them all
RUN = FederatedRun(rounds=2, lr=0.05)


@pytest.fixture(scope="module")
def stream() -> Stream:
    return toy_stream(0)


@pytest.fixture(scope="module")
def burned_in(stream: Stream) -> Learner:
    return toy_learner(stream)


def pixels(stream: Stream) -> Stream:
    """The stream with pixels as floats, so that some can be spoiled."""
    return dataclasses.replace(
        stream,
        victim=dataclasses.replace(stream.victim, x=stream.victim.x.astype(np.float32) / 255, y=stream.victim.y.copy()),
    )


def spoiled(stream: Stream, bad: int, kind: str) -> Federation:
    """A federation of which one client has a bad sample."""
    federation = federate(pixels(stream), Shards(clients=CLIENTS), seed=0)
    x, y, sample = federation.stream.victim.x, federation.stream.victim.y, federation.shards[bad][0]
    if kind == "nothing counts":
        y[federation.shards[bad]] = IGNORED
    elif kind == "label":
        y[sample] = 4
    else:
        x[sample, 0, 3, 3] = {"nan": math.nan, "inf": math.inf, "outside": 1.5}[kind]
    return federation


def without(federation: Federation, bad: int) -> Federation:
    """The others alone, each with the samples that it draws beside the bad one."""
    return Others(federation.stream, federation.shards, federation.seed, bad)


@dataclasses.dataclass(frozen=True)
class Others(Federation):
    """A federation in which one client never shows up."""

    bad: int = -1

    def round(
        self, number: int, run: FederatedRun, device: torch.device | str = "cpu"
    ) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], Batch]:
        who, data = super().round(number, run, device)
        others = who != self.bad
        return who[others], data.take(torch.from_numpy(others))


def learn(
    burned_in: Learner, federation: Federation, attack: UpdateAttack, run: FederatedRun = RUN
) -> tuple[Outcome, dict[str, Tensor]]:
    model = copy.deepcopy(burned_in.model)
    optimiser = victim_optimiser(model, run)
    learner = Learner(model, optimiser, defence=Gate(), trusted=federation.stream.trusted.all())
    return run_federated(learner, federation, attack, run), model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nan", "inf", "outside", "label", "nothing counts"])
@pytest.mark.parametrize(
    ("attack", "run"),
    [
        (CleanUpdates(), RUN),
        (SignFlip(poison_ratio=0.2), RUN),
        (AccumulativeUpdates(poison_ratio=0.2), dataclasses.replace(RUN, bound="before")),
        (Alie(poison_ratio=0.4), dataclasses.replace(RUN, rule={"name": "median"})),
        (CleanUpdates(), dataclasses.replace(RUN, batch_norm="averaged")),
    ],
    ids=["clean", "sign flip", "accumulative", "every row", "averaged"],
)
def test_the_others_learn_as_if_one_were_not_there(
    burned_in: Learner, stream: Stream, attack: UpdateAttack, run: FederatedRun, kind: str
) -> None:
    federation = spoiled(stream, 4, kind)
    outcome, model = learn(burned_in, federation, attack, run)
    rows = outcome.trace[1:]
    assert [row["quarantined"] for row in rows] == [1, 1, 1]
    assert all("left out client 4, with samples that are not finite" in row["verdict"] for row in rows)
    assert outcome.status == "finished"
    expected, other = learn(burned_in, without(federation, 4), attack, run)
    if attack.ratio == 0:  # else the number of hostile clients follows from that of all
        assert [row["batch_loss"] for row in rows] == [row["batch_loss"] for row in expected.trace[1:]]
        assert all(torch.equal(model[name], t) for name, t in other.items())
    assert all(bool(t.isfinite().all()) for t in model.values())


@pytest.mark.parametrize("bad", range(CLIENTS))
def test_whoever_it_is_is_named(burned_in: Learner, stream: Stream, bad: int) -> None:
    outcome, _ = learn(burned_in, spoiled(stream, bad, "nan"), SignFlip(poison_ratio=0.4))
    assert all(f"left out client {bad}," in row["verdict"] for row in outcome.trace[1:])
    assert outcome.quarantined == 3


def test_a_round_of_nobody_is_refused_and_the_run_goes_on(burned_in: Learner, stream: Stream) -> None:
    federation = spoiled(stream, 0, "nan")
    federation.stream.victim.x[:] = math.nan
    outcome, model = learn(burned_in, federation, SignFlip(poison_ratio=0.4))
    rows = outcome.trace[1:]
    assert [(row["admitted"], row["quarantined"]) for row in rows] == [(False, CLIENTS)] * 3
    assert all("no client's samples can be learned from; left out clients" in row["verdict"] for row in rows)
    assert all(torch.equal(model[name], t) for name, t in burned_in.model.state_dict().items())


@pytest.mark.parametrize("error", [RuntimeError, IndexError, AssertionError])
@pytest.mark.parametrize("attack", [CleanUpdates(), SignFlip(poison_ratio=0.4)])
def test_samples_that_the_model_stumbles_over_are_left_out(
    burned_in: Learner, stream: Stream, error: Callable[[str], Exception], attack: UpdateAttack
) -> None:
    """Whatever it is about them: here all pixels of one sample are 1."""

    class Choosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(burned_in.model)

        def forward(self, x: Tensor) -> Tensor:
            if x.ndim == 4 and bool((x == 1).flatten(1).all(1).any()):
                raise error("not this one")
            out: Tensor = self.inner(x)
            return out

    federation = federate(pixels(stream), Shards(clients=CLIENTS), seed=0)
    federation.stream.victim.x[federation.shards[1][0]] = 1.0
    learner = Learner(model := Choosy(), victim_optimiser(model, RUN))
    rows = run_federated(learner, federation, attack, RUN).trace[1:]
    assert all("left out client 1," in row["verdict"] and row["admitted"] for row in rows)
    assert [row["quarantined"] for row in rows] == [1, 1, 1]


def test_what_is_nobodys_fault_is_an_error(burned_in: Learner, stream: Stream) -> None:
    class Broken(SignFlip):
        def craft(self, *_: object) -> Tensor:
            raise RuntimeError("the attack is broken")

    with pytest.raises(RuntimeError, match="the attack is broken"):
        learn(burned_in, federate(stream, Shards(clients=CLIENTS), seed=0), Broken(poison_ratio=0.4))


@pytest.mark.parametrize("bad", [(), (0,), (6,), (2, 3), tuple(range(7))])
def test_the_ones_that_a_model_does_not_take_are_found(bad: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 3))
    x = torch.randint(10, (7, 2, 3), generator=torch.Generator().manual_seed(0))
    for client in bad:
        x[client, 1, 2] = 10
    taken = taken_clients(Learner(model, torch.optim.SGD(model.parameters())), Batch(x, torch.zeros(7, 2).long()))
    assert [i for i, t in enumerate(taken.tolist()) if not t] == list(bad)


@pytest.mark.parametrize("batch_norm", ["synchronised", "averaged"])
def test_a_single_value_a_channel_is_a_verdict(stream: Stream, batch_norm: Literal["synchronised", "averaged"]) -> None:
    run = dataclasses.replace(RUN, local_batch=1, per_round=1, batch_norm=batch_norm)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4))
    learner = Learner(model, victim_optimiser(model, run))
    before = copy.deepcopy(model.state_dict())
    outcome = run_federated(learner, federate(stream, Shards(clients=CLIENTS), seed=0), CleanUpdates(), run)
    assert [(row["admitted"], row["step"]) for row in outcome.trace[1:]] == [(False, 1), (False, 2), (False, 3)]
    assert all("too few for BatchNorm to train on" in row["verdict"] for row in outcome.trace[1:])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_verdict_names_so_many() -> None:
    assert left_out([]) == ""
    assert left_out([3]).startswith("left out client 3, with")
    assert left_out(list(range(20))).startswith("left out clients 0, 1, 2, 3, 4, 5, 6, 7 and 12 more, with")
