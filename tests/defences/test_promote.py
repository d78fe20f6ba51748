"""Only what was tested is served: an average that passes, every few steps; learning goes on as if nobody looked."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.registry import build
from mithridate.data.stream import Stream
from mithridate.defences.promote import Promote
from mithridate.testing import toy_learner
from mithridate.training.learner import Learner
from tests.defences.states import same, wrong
from tests.defences.test_gate import Counting

OPEN: dict[str, Any] = {"level": 0.0, "max_loss_rise": 100.0}
"""Limits that nothing breaks."""


def served(learner: Learner) -> dict[str, Tensor]:
    weights = learner.defence.serve(learner.view())
    assert weights is not None
    return {**weights.parameters, **weights.buffers}


def state(learner: Learner) -> dict[str, Tensor]:
    tensors = (*learner.model.named_parameters(), *learner.model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in tensors}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_what_passes_is_served_every_few_steps(stream: Stream) -> None:
    """The average of all states so far by hand, from the third and the sixth step on; the start before."""
    learner = toy_learner(stream, defence=Promote(every=3, decay=0.5, **OPEN))
    average = expected = {name: tensor.double() for name, tensor in state(learner).items()}
    for i in range(1, 8):
        learner.update(stream.victim_batch(i % 5, 0))
        now = state(learner)
        average = {n: 0.5 * t + 0.5 * now[n] if now[n].is_floating_point() else now[n] for n, t in average.items()}
        expected = average if i % 3 == 0 else expected
        for name, tensor in served(learner).items():
            torch.testing.assert_close(tensor.double(), expected[name].double(), rtol=1e-5, atol=1e-6)


def test_harm_is_never_served_and_what_recovers_is(stream: Stream) -> None:
    """The model forgets all under wrong labels and learns anew; who asks meets the old answers, then the new ones."""
    learner = toy_learner(stream, defence=Promote(every=2, decay=0.5, level=0.1), lr=0.1)
    before, start = served_at_start(learner, stream)
    for i in range(8):
        learner.update(wrong(stream.victim_batch(i % 5, 0)))
        assert equal(served(learner), before)
    assert learner.evaluate([stream.test.all()]).accuracy == start
    learner.defence, promote = build("defence", {"name": "none"}), learner.defence
    assert learner.evaluate([stream.test.all()]).accuracy < start - 0.3
    learner.defence = promote
    for i in range(60):
        learner.update(stream.victim_batch(i % 5, 0))
    assert not equal(served(learner), before)
    assert learner.evaluate([stream.test.all()]).accuracy > start - 0.05


def test_the_recommended_chain_keeps_the_model_that_learns_from_being_lost(stream: Stream) -> None:
    """Under the same harm, which alone would teach it the wrong answers; and it serves what is learned afterwards."""
    recommended = build("defence", {"name": "chain", "preset": "recommended"})
    learner = toy_learner(stream, defence=recommended, lr=0.1)
    start = learner.evaluate([stream.test.all()]).accuracy
    refused = sum(not learner.update(wrong(stream.victim_batch(i % 5, 0))).verdict.admit for i in range(20))
    assert refused >= 10
    assert learner.evaluate([stream.test.all()]).accuracy > start - 0.02
    learner.defence = build("defence", {"name": "none"})
    assert learner.evaluate([stream.test.all()]).accuracy > start - 0.3
    learner.defence = recommended
    for i in range(20):
        assert learner.update(stream.victim_batch(i % 5, 0)).verdict.admit


def served_at_start(learner: Learner, stream: Stream) -> tuple[dict[str, Tensor], float]:
    """The model as it is before its first step, and its accuracy."""
    assert learner.defence.serve(learner.view()) is None
    return state(learner), learner.evaluate([stream.test.all()]).accuracy


def test_learning_goes_on_as_if_nobody_looked(stream: Stream) -> None:
    learners = [toy_learner(stream, defence=defence) for defence in (None, Promote(every=2))]
    for i in range(5):
        updates = [learner.update(stream.victim_batch(i, 0)) for learner in learners]
        assert updates[0].update_norm == updates[1].update_norm
    assert same(learners[0].snapshot(), learners[1].snapshot())


def test_the_trusted_samples_are_looked_at_when_it_is_their_turn(stream: Stream) -> None:
    base = toy_learner(stream)
    model = Counting(base.model)
    promote = Promote(every=3, trusted_size=20)
    learner = Learner(model, SGD(model.parameters(), lr=0.1), defence=promote, trusted=stream.trusted.all())
    seen = []
    for i in range(7):
        learner.update(stream.victim_batch(i % 5, 0))
        seen.append(model.seen)
    assert seen == [20, 20, 40, 40, 40, 60, 60]


def test_a_step_that_was_taken_back_is_none(stream: Stream) -> None:
    """In a chain behind a gate, only steps that stay move the average and the count."""
    parts = [{"name": "gate", "preset": "paired"}, {"name": "promote", "every": 2, "decay": 0.0, **OPEN}]
    learner = toy_learner(stream, defence=build("defence", {"name": "chain", "parts": parts}), lr=0.5)
    start = state(learner)
    assert learner.update(stream.victim_batch(0, 0)).verdict.admit
    for _ in range(3):
        assert not learner.update(wrong(stream.victim_batch(1, 0))).verdict.admit
        assert equal(served(learner), start)
    assert learner.update(stream.victim_batch(0, 0)).verdict.admit
    assert equal(served(learner), state(learner))


def test_trusted_samples_that_show_nothing_are_refused_before_any_step(stream: Stream) -> None:
    trusted = stream.trusted.all()
    for samples, error, words in (
        (trusted.take(trusted.y == 1), DataError, "promote: .*one class"),
        (Batch(trusted.x, torch.full((len(trusted.y), 4), 0.3)), ConfigError, "never hit"),
    ):
        learner = toy_learner(stream, defence=Promote())
        learner.trusted, before = samples, learner.snapshot()
        with pytest.raises(error, match=words):
            learner.update(stream.victim_batch(0, 0))
        assert same(learner.snapshot(), before)


def test_it_is_idle_only_if_it_changes_nothing() -> None:
    idle: dict[str, Any] = {"every": 1, "decay": 0.0, "level": 0.0}
    assert Promote(**idle).idle
    changes: tuple[dict[str, Any], ...] = ({"every": 2}, {"decay": 0.5}, {"level": 0.1}, {"max_loss_rise": 1.0})
    for change in changes:
        assert not Promote(**{**idle, **change}).idle
