"""Gradient clipping: no step is longer than its bound, and a bound that never binds is no defence."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from mithridate.attacks.noise import Noise
from mithridate.core.batch import Batch
from mithridate.core.defence import Defence
from mithridate.core.errors import ConfigError
from mithridate.core.registry import build
from mithridate.core.updates import Updates
from mithridate.core.view import View
from mithridate.data.stream import Stream
from mithridate.defences.clip import Clip
from mithridate.defences.none import Standard
from mithridate.simulation.online import OnlineRun, run_online
from mithridate.simulation.run import Outcome
from mithridate.training.learner import Learner
from tests.recipes import timeless_rows

RUN = OnlineRun(steps=3, images=0)


def learner_of(burned_in: Learner, defence: Defence | None, lr: float = 0.05, momentum: float = 0.9) -> Learner:
    model = copy.deepcopy(burned_in.model)
    return Learner(model, SGD(model.parameters(), lr=lr, momentum=momentum), defence=defence)


def run(burned_in: Learner, stream: Stream, defence: Defence | None) -> Outcome:
    return run_online(learner_of(burned_in, defence), stream, Noise(eps=0.3), RUN)


def rows(outcome: Outcome) -> list[dict[str, Any]]:
    return timeless_rows(outcome.trace)


def test_no_gradient_in_the_trace_is_longer_than_the_bound(burned_in: Learner, stream: Stream) -> None:
    free = rows(run(burned_in, stream, None))
    norms = [row["gradient_norm"] for row in free[1:]]
    bound = sorted(norms)[1]  # some steps are longer, some shorter
    clipped = rows(run(burned_in, stream, Clip(clip_norm=bound)))
    for row in clipped[1:]:
        assert row["bounded_norm"] == pytest.approx(min(row["gradient_norm"], bound), rel=1e-5)
    assert any(row["gradient_norm"] > 1.01 * bound for row in clipped[1:])
    assert [row["bounded_norm"] for row in free] == [row["gradient_norm"] for row in free]


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("how", ["scale", "project"])
def test_an_infinite_bound_is_no_defence_bit_for_bit(burned_in: Learner, stream: Stream, norm: Any, how: Any) -> None:
    free = rows(run(burned_in, stream, None))
    assert rows(run(burned_in, stream, Clip(clip_norm=math.inf, norm=norm, how=how))) == free
    assert rows(run(burned_in, stream, Standard())) == free
    assert rows(run(burned_in, stream, Clip(clip_norm=0.01, norm=norm, how=how))) != free


def test_a_clipped_step_of_plain_sgd_is_as_long_as_lr_times_the_bound(burned_in: Learner, stream: Stream) -> None:
    learner = learner_of(burned_in, Clip(clip_norm=0.01), lr=0.5, momentum=0.0)
    done = learner.update(stream.victim_batch(0, 0))
    assert done.gradient_norm > 0.02
    assert done.update_norm == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_a_clipped_step_keeps_its_direction(burned_in: Learner, stream: Stream) -> None:
    """Scaling a gradient by c is scaling the learning rate by c, for plain SGD."""
    batch: Batch = stream.victim_batch(0, 0)
    clipped = learner_of(burned_in, Clip(clip_norm=0.01), momentum=0.0)
    done = clipped.update(batch)
    slower = learner_of(burned_in, None, lr=0.05 * 0.01 / done.gradient_norm, momentum=0.0)
    slower.update(batch)
    for p, q in zip(clipped.model.parameters(), slower.model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-7)


def clip(rows: Tensor, **settings: Any) -> Tensor:
    made: Clip = build("defence", {"name": "clip", **settings})
    shapes = {"a": torch.Size([rows.shape[1] - 1]), "b": torch.Size([1])}
    return made.bound(Updates(rows, shapes), View()).rows


def test_each_rule_on_known_gradients() -> None:
    gradient = torch.tensor(
        [[3.0, -4.0, 0.0], [0.3, 0.4, 0.0], [0.0, 0.0, 0.0]]
    )  # lengths 5, 0.5, 0; largest 4, 0.4, 0
    l2 = clip(gradient, clip_norm=1.0)
    assert torch.allclose(l2, torch.tensor([[0.6, -0.8, 0.0], [0.3, 0.4, 0.0], [0.0, 0.0, 0.0]]))
    assert torch.allclose(clip(gradient, clip_norm=1.0, how="project"), l2)
    linf = clip(gradient, clip_norm=1.0, norm="linf")
    assert torch.allclose(linf, torch.tensor([[0.75, -1.0, 0.0], [0.3, 0.4, 0.0], [0.0, 0.0, 0.0]]))
    project = clip(gradient, clip_norm=1.0, norm="linf", how="project")
    assert torch.allclose(project, torch.tensor([[1.0, -1.0, 0.0], [0.3, 0.4, 0.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_bound_must_be_positive(value: float) -> None:
    with pytest.raises(ConfigError, match="clip_norm"):
        build("defence", {"name": "clip", "clip_norm": value})


def test_the_defaults_are_a_length_of_one() -> None:
    made = Clip()
    assert (made.clip_norm, made.norm, made.how) == (1.0, "l2", "scale")


def lengths_alone(lengths: list[float]) -> Updates:
    def form() -> Tensor:
        raise AssertionError("nobody should look at rows")

    return Updates(form, {"a": torch.Size([3])}, lengths=torch.tensor(lengths))


def test_scaling_by_l2_lengths_forms_no_row() -> None:
    """What makes clipping a thousand clients' updates cheap: lengths are enough."""
    factors = Clip(clip_norm=2.0).bound(lengths_alone([4.0, 1.0, 0.0]), View()).factors
    assert factors is not None
    assert factors.tolist() == [0.5, 1.0, 1.0]
    updates = lengths_alone([4.0])
    assert Clip(clip_norm=math.inf).bound(updates, View()) is updates
    for looking in (Clip(norm="linf"), Clip(norm="linf", how="project")):
        with pytest.raises(AssertionError, match="look at rows"):
            looking.bound(lengths_alone([4.0]), View())
