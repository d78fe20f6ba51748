"""What a model was: weights that share its memory or do not, and that answer through its module."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError
from types import MappingProxyType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mithridate.attacks.accumulative import Accumulative
from mithridate.core.batch import Batch
from mithridate.core.defence import Defence
from mithridate.core.errors import CheckpointError, ConfigError
from mithridate.core.model import WhiteBox
from mithridate.core.past import Snapshot, Weights
from mithridate.core.view import Need, View
from mithridate.core.watch import Detector
from mithridate.defences.dgc import DGC
from mithridate.defences.dsc import DSC
from mithridate.defences.filter import Filter
from mithridate.detectors.discrepancy import Discrepancy
from mithridate.detectors.loss import Loss
from mithridate.testing import toy_learner, toy_stream
from mithridate.training.history import History
from mithridate.training.learner import Learner

X = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net() -> nn.Sequential:
    """With statistics that are not the initial ones, and mixed train flags."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 10))
        net(torch.rand(16, 3, 4, 4))
    net[2].eval()
    return net


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in net.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_weights_share_memory_until_they_are_copied(net: nn.Sequential) -> None:
    live = Weights.of(net, "now")
    copied = live.copied()
    assert (live.label, copied.label) == ("now", "now")
    assert not any(t.requires_grad for t in copied.parameters.values())
    kept = {**copied.parameters, **copied.buffers}
    assert same(kept, state_of(net))
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.add_(1)
    assert same({**live.parameters, **live.buffers}, net.state_dict())
    assert not any(torch.equal(t, net.state_dict()[name]) for name, t in kept.items())


def test_an_old_model_answers_through_the_new_ones_module(net: nn.Sequential) -> None:
    old = Weights.of(copy.deepcopy(net)).copied()
    expected = WhiteBox(net, F.cross_entropy).logits(X).detach()
    with torch.no_grad():
        net.get_parameter("4.weight").mul_(-2)
        net.get_buffer("1.running_mean").add_(1)
    flags, state = [m.training for m in net.modules()], state_of(net)
    assert torch.equal(old.logits(net, X), expected)
    assert [m.training for m in net.modules()] == flags
    assert same(state_of(net), state)
    wider = Weights({**old.parameters, "4.bias": torch.zeros(11)}, old.buffers, "wider")
    for foreign in (wider, Weights(old.parameters, {}, "wider")):
        with pytest.raises(CheckpointError, match=r"the old model \(wider\) is of another architecture"):
            foreign.logits(net, X)


def test_values_are_frozen() -> None:
    values: list[Any] = [Snapshot(MappingProxyType({}), {}, {}, 0), Weights({}, {})]
    for value in values:
        with pytest.raises(FrozenInstanceError):
            setattr(value, next(iter(value.__dataclass_fields__)), None)


# An old model that is the current one.


def looking_back() -> dict[str, Callable[[Learner, Batch], object]]:
    """Every way in which a component looks at an old checkpoint, at the first step."""

    def view(learner: Learner, needs: frozenset[Need], owner: str) -> View:
        available = {Need.MODEL: learner.white_box, Need.HISTORY: learner.history}
        return View(available=available, granted=needs, owner=owner)

    def scored(detector: Detector) -> Callable[[Learner, Batch], object]:
        return lambda learner, batch: detector.score(batch, view(learner, detector.needs, "it"), {})

    def learned(defence: Defence) -> Callable[[Learner, Batch], object]:
        def learn(learner: Learner, batch: Batch) -> object:
            learner.defence = defence
            return learner.update(batch)

        return learn

    def hidden(learner: Learner, _: Batch) -> object:
        attack = Accumulative(beta=0.5)
        return attack.hidden_from(view(learner, attack.needs, "accumulative"))

    class Own(Defence):
        needs: ClassVar[frozenset[Need]] = frozenset({Need.HISTORY})

        def begin(self, view: View) -> None:
            view.history.checkpoint(who="a user's own")

    return {
        "discrepancy": scored(Discrepancy()),
        "loss": scored(Loss(epoch=0)),
        "dsc": learned(DSC(mu=0.0, tau=0.0)),
        "filter": learned(Filter(detector={"name": "discrepancy"}, fpr=0.2)),
        "beta": hidden,
        "a user's own": learned(Own()),
    }


@pytest.mark.parametrize("shared", [True, False], ids=["the same tensors", "a copy"])
@pytest.mark.parametrize("who", looking_back())
def test_whoever_looks_back_at_the_current_model_is_told(who: str, shared: bool) -> None:
    stream = toy_stream(0)
    learner, batch = toy_learner(stream), stream.victim_batch(0, 0)
    now = Weights.of(learner.model)
    look = looking_back()[who]
    look(toy_learner(stream), batch)  # at an older one it may
    learner.history = History(keep=8, checkpoints={0: now if shared else now.copied()})
    before = now.copied()
    with pytest.raises(ConfigError, match=r"holds the weights of the current model: it would compare it with itself"):
        look(learner, batch)
    assert before.is_of(learner.model)


def test_who_compares_a_step_further_may_start_at_the_current_model() -> None:
    stream = toy_stream(0)
    learner = toy_learner(stream, defence=DGC())
    learner.history = History(checkpoints={0: Weights.of(learner.model).copied()})
    assert learner.update(stream.victim_batch(0, 0)).verdict.admit


def test_weights_know_whose_they_are() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    same = Weights.of(model).copied()
    assert same.is_of(model)
    assert not Weights({"0.weight": torch.ones(2, 2)}, {}).is_of(model)
    assert not Weights.of(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))).is_of(model)
    same.buffers["1.running_mean"].add_(1)
    assert not same.is_of(model)
