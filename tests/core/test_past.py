"""What a model was: weights that share its memory or do not, and that answer through its module."""

import copy
from collections.abc import Mapping
from dataclasses import FrozenInstanceError
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mithridate.core.errors import CheckpointError
from mithridate.core.model import WhiteBox
from mithridate.core.past import Snapshot, Weights

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
