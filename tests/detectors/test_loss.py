"""The loss of single samples, now and since an old model."""

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mithridate.core.batch import Batch
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.model import WhiteBox
from mithridate.core.past import Weights
from mithridate.core.view import Need, View
from mithridate.detectors.loss import Loss
from mithridate.training.history import History

if TYPE_CHECKING:
    from tests.detectors.conftest import World


def test_it_is_minus_the_cross_entropy_of_the_received_label(world: "World") -> None:
    x, y = world.fresh
    logits = world.model(x).detach().double().numpy()
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert world.scores(Loss()) == pytest.approx(log_p[np.arange(len(y)), y.numpy()], rel=1e-5, abs=1e-5)
    assert Loss().needs == {Need.MODEL}


def test_it_is_the_learners_own_criterion(world: "World") -> None:
    def hinge(logits: Tensor, labels: Tensor) -> Tensor:
        return F.multi_margin_loss(logits, labels)

    view = View(0, {}, {Need.MODEL: WhiteBox(world.model, hinge)}, Loss().needs)
    each = F.multi_margin_loss(world.model(world.fresh.x), world.fresh.y, reduction="none").detach()
    assert torch.allclose(Loss().score(world.fresh, view, {}), -each)


def test_with_an_epoch_it_is_the_fall_since_then(world: "World") -> None:
    weight = world.model.get_parameter("1.weight").detach()
    old = Weights({"1.weight": 0.1 * weight.flip(0)}, {})
    detector = Loss(epoch=3)
    assert detector.needs == {Need.MODEL, Need.HISTORY}
    view = world.view(detector, HISTORY=History(checkpoints={3: old}))
    x, y = world.fresh
    then = F.cross_entropy(x.flatten(1) @ (0.1 * weight.flip(0)).T, y, reduction="none")
    now = F.cross_entropy(world.model(x), y, reduction="none").detach()
    assert torch.allclose(detector.score(world.fresh, view, {}), then - now, atol=1e-5)
    with pytest.raises(ConfigError, match="it looks back at burn-in epoch 2"):
        Loss(epoch=2).score(world.fresh, view, {})


def test_a_label_that_the_model_does_not_have_is_an_error(world: "World") -> None:
    with pytest.raises(DataError, match="3 outputs"):
        world.scores(Loss(), Batch(world.fresh.x, world.fresh.y + 1))
