"""What is asked of each client's row is asked of the aggregate: one that is not finite is a verdict, and no weights."""

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from mithridate.aggregators.mean import Mean
from mithridate.core.aggregator import Context
from mithridate.core.defence import Defence
from mithridate.core.registry import settings
from mithridate.core.update_attack import Honest, UpdateAttack
from mithridate.core.updates import Updates
from mithridate.core.view import View
from mithridate.data.shards import Shards
from mithridate.data.stream import Stream
from mithridate.defences.bound_update import BoundUpdate
from mithridate.defences.clip import Clip
from mithridate.defences.gate import Gate
from mithridate.simulation.clients import FederatedRun, federate
from mithridate.simulation.federated import run_federated
from mithridate.simulation.run import victim_optimiser
from mithridate.training.learner import Learner
from mithridate.update_attacks.clean import CleanUpdates
from mithridate.update_attacks.hostile import HostileShare


class Breaking(Defence):
    """A bound that breaks."""

    def bound(self, updates: Updates, view: View) -> Updates:
        return updates.with_rows(torch.full_like(updates.rows, math.nan))

    def check_federation(self, run: Any, clients: int) -> None:
        """Whatever it is."""


@settings
class Loud(HostileShare):
    """Rows of the largest floats: each is finite, and their sum is not."""

    def craft(self, honest: Honest, view: View, rng: torch.Generator) -> Tensor:
        return torch.full_like(honest.own, 3e38)


def off() -> Defence:
    return Clip(clip_norm=math.inf)


def assert_refused(
    burned_in: Learner, stream: Stream, defence: Defence, attack: UpdateAttack, run: FederatedRun
) -> None:
    """Every round is a verdict, and the model as it was."""
    model = copy.deepcopy(burned_in.model)
    learner = Learner(model, victim_optimiser(model, run), defence=defence, trusted=stream.trusted.all())
    outcome = run_federated(learner, federate(stream, Shards(clients=6), seed=0), attack, run)
    rows = outcome.trace[1:]
    assert (len(rows), outcome.rolled_back) == (3, 3)
    assert all("is not finite" in row["verdict"] for row in rows)
    for name, before in burned_in.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], before), name


@pytest.mark.parametrize(
    "defence", [off, Gate, lambda: BoundUpdate(clip_norm=0.1), lambda: Clip(clip_norm=1.0, norm="linf", how="project")]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_rule_that_breaks_is_a_verdict(
    burned_in: Learner,
    stream: Stream,
    defence: Callable[[], Defence],
    value: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def combine(self: Mean, rows: Tensor, context: Context) -> Tensor:
        return torch.full_like(rows[0], value)

    monkeypatch.setattr(Mean, "combine", combine)
    run = FederatedRun(rounds=2, lr=0.05, rule={"name": "mean"})
    assert_refused(burned_in, stream, defence(), CleanUpdates(), run)


@pytest.mark.parametrize("bound", ["after", "before"])
def test_a_bound_that_breaks_is_a_verdict(
    burned_in: Learner, stream: Stream, bound: Literal["after", "before"]
) -> None:
    assert_refused(burned_in, stream, Breaking(), CleanUpdates(), FederatedRun(rounds=2, lr=0.05, bound=bound))


def test_rows_that_are_finite_and_whose_sum_is_not_are_a_verdict(burned_in: Learner, stream: Stream) -> None:
    assert_refused(burned_in, stream, off(), Loud(poison_ratio=0.5), FederatedRun(rounds=2, lr=0.05))
