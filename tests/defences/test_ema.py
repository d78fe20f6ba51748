"""The served average: what it is, that no step that was taken back enters it, and that learning goes on as before."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from mithridate.attacks.noise import Noise
from mithridate.core.batch import Batch
from mithridate.core.defence import ADMITTED, Verdict
from mithridate.core.past import Weights
from mithridate.core.view import View
from mithridate.data.stream import Stream
from mithridate.defences.ema import Ema
from mithridate.simulation.online import OnlineRun, run_online
from mithridate.testing import toy_learner
from mithridate.training.learner import Learner


def state(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in learner.model.state_dict().items()}


def served(learner: Learner) -> dict[str, Tensor]:
    weights = learner.defence.serve(learner.view())
    assert weights is not None
    return {**weights.parameters, **weights.buffers}


def parameters_of(learner: Learner, tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].detach().flatten() for name, _ in learner.model.named_parameters()])


def average(states: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """By hand, in float64: the first state, then one after the other; counters are the newest."""
    out = {name: tensor.double() for name, tensor in states[0].items()}
    for now in states[1:]:
        for name, tensor in now.items():
            out[name] = decay * out[name] + (1 - decay) * tensor.double()
    return {n: t if states[0][n].is_floating_point() else states[-1][n].double() for n, t in out.items()}


def test_it_serves_the_average_of_all_states_parameters_and_statistics(stream: Stream) -> None:
    learner = toy_learner(stream, defence=Ema(decay=0.7))
    states = [state(learner)]
    assert learner.defence.serve(learner.view()) is None
    for i in range(4):
        learner.update(stream.victim_batch(i, 0))
        states.append(state(learner))
        learner.evaluate([stream.test.all()])  # asking changes nothing, however often
        expected = average(states, 0.7)
        held = served(learner)
        assert {n for n in expected if "running" in n}
        for name, tensor in expected.items():
            torch.testing.assert_close(held[name].double(), tensor, rtol=1e-5, atol=1e-6)
            assert held[name].dtype == states[0][name].dtype


def test_a_refused_step_never_enters_the_average(stream: Stream) -> None:
    class Choosy(Ema):
        def admit(self, before: Weights, view: View) -> Verdict:
            return ADMITTED if next(turns) else Verdict(admit=False, reason="a later part")

    turns = itertools.cycle([True, False, False])
    learner = toy_learner(stream, defence=Choosy(decay=0.5))
    states = [state(learner)]
    for i in range(5):
        if learner.update(stream.victim_batch(i, 0)).verdict.admit:
            states.append(state(learner))
        expected, held = average(states, 0.5), served(learner)
        for name, tensor in expected.items():
            torch.testing.assert_close(held[name].double(), tensor, rtol=1e-5, atol=1e-6)
    assert len(states) == 3


def test_serving_changes_what_is_measured_and_not_what_is_learned(stream: Stream) -> None:
    learners = {name: toy_learner(stream, defence=d) for name, d in (("ema", Ema(decay=0.9)), ("none", None))}
    run = OnlineRun(steps=3, images=0)
    outcomes = {name: run_online(learner, stream, Noise(eps=0.3), run) for name, learner in learners.items()}
    assert all(torch.equal(t, learners["none"].model.state_dict()[n]) for n, t in state(learners["ema"]).items())
    for column, equal in (("loss", False), ("batch_loss", True), ("update_norm", True), ("admitted", True)):
        columns = [[dict(row)[column] for row in outcome.trace[1:]] for outcome in outcomes.values()]
        assert (columns[0] == columns[1]) is equal, column
    assert outcomes["ema"].trace[0]["loss"] == outcomes["none"].trace[0]["loss"]


def test_a_share_of_a_bad_step_is_served_at_once_and_the_rest_later(stream: Stream) -> None:
    """The docstring's limitation: it delays. One huge step, then the model stands still (learning rate 0)."""
    learner = toy_learner(stream, defence=Ema(decay=0.8), lr=2.0)
    start = parameters_of(learner, learner.model.state_dict())
    batch = stream.victim_batch(0, 0)
    learner.update(Batch(batch.x, (batch.y + 1) % 4))
    moved = parameters_of(learner, learner.model.state_dict()) - start
    learner.optimiser = SGD(learner.model.parameters(), lr=0.0)
    learner.update_mode = "eval"
    shares = []
    for i in range(1, 12):
        shares.append(float((parameters_of(learner, served(learner)) - start).norm() / moved.norm()))
        learner.update(stream.victim_batch(i % 5, 0))
    assert shares == pytest.approx([1 - 0.8**i for i in range(1, 12)], rel=1e-4)


def test_half_precision_is_averaged_in_single_and_served_in_half() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).bfloat16()
    learner = Learner(model, SGD(model.parameters(), lr=1e-3), defence=Ema(decay=0.999))
    batch = Batch(torch.rand(8, 1, 8, 8).bfloat16(), torch.arange(8) % 4)
    learner.update(batch)
    learner.update(batch)
    assert learner.memory["parameter.1.weight"].dtype == torch.float32
    assert {t.dtype for t in served(learner).values()} == {torch.bfloat16}
    learner.evaluate([batch])


def test_a_learner_that_is_put_back_with_its_notes_serves_what_it_served_then(stream: Stream) -> None:
    learner = toy_learner(stream, defence=Ema(decay=0.6))
    learner.update(stream.victim_batch(0, 0))
    learner.update(stream.victim_batch(1, 0))
    then, before, notes = served(learner), learner.snapshot(), dict(learner.memory)
    learner.update(stream.victim_batch(2, 0))
    now, after, later = served(learner), learner.snapshot(), dict(learner.memory)
    assert any(not torch.equal(then[name], tensor) for name, tensor in now.items())
    for weights, snapshot, memory in ((then, before, notes), (now, after, later)):
        learner.restore(snapshot)
        learner.memory = dict(memory)
        assert all(torch.equal(weights[name], tensor) for name, tensor in served(learner).items())


@pytest.mark.parametrize("cut", [1, 3])
def test_a_resumed_learner_goes_on_with_the_same_bits(stream: Stream, cut: int) -> None:
    def learn(learner: Learner, steps: range) -> list[Any]:
        scores = []
        for i in steps:
            learner.update(stream.victim_batch(i, 0))
            scores.append(learner.evaluate([stream.test.all()]))
        return scores

    whole = toy_learner(stream, defence=Ema(decay=0.9))
    learn(whole, range(cut))
    resumed = toy_learner(stream, defence=Ema(decay=0.9))
    resumed.restore(whole.snapshot())
    resumed.memory = {key: tensor.clone() for key, tensor in whole.memory.items()}
    assert learn(whole, range(cut, 5)) == learn(resumed, range(cut, 5))
    assert whole.memory.keys() == resumed.memory.keys()
    assert all(torch.equal(whole.memory[key], tensor) for key, tensor in resumed.memory.items())
