"""The discrepancy as a detector, and where no old model is there yet."""

import math
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
from scipy.special import log_softmax

from mithridate.core.errors import ConfigError
from mithridate.core.past import Weights
from mithridate.core.view import Need
from mithridate.detectors.discrepancy import Discrepancy
from mithridate.training.history import History

if TYPE_CHECKING:
    from tests.detectors.conftest import World


def test_it_is_minus_kl_from_the_old_answer_to_the_new(world: "World") -> None:
    weight = world.model.get_parameter("1.weight").detach()
    past = History(checkpoints={2: Weights({"1.weight": weight + 3}, {}), 5: Weights({"1.weight": 0.2 * weight}, {})})
    x = world.fresh.x.flatten(1).double().numpy()
    w = weight.double().numpy()
    q = log_softmax(x @ w.T, axis=1)
    for epoch, old in ((None, w + 3), (2, w + 3), (5, 0.2 * w)):
        p = log_softmax(x @ old.T, axis=1)
        detector = Discrepancy(epoch=epoch)
        found = detector.score(world.fresh, world.view(detector, HISTORY=past), {})
        expected = -(np.exp(p) * (p - q)).sum(1)
        assert found.numpy() == pytest.approx(expected, rel=1e-4, abs=2e-5)
        assert (float(found.min()) < -0.5) is (epoch == 5)  # the same shift of all logits changes no answer


@pytest.mark.parametrize(("policy", "score"), [("pass", 0.0), ("closed", -math.inf)])
def test_a_young_stream_follows_the_named_policy(
    world: "World", policy: Literal["pass", "closed"], score: float
) -> None:
    detector = Discrepancy(old="back", back=2, on_missing=policy)
    assert detector.lookback == 2
    assert detector.needs == {Need.MODEL, Need.HISTORY}
    past = History(keep=3)
    for step in range(2):
        past.record(step, world.model)
        assert set(detector.score(world.fresh, world.view(detector, HISTORY=past), {}).tolist()) == {score}
    past.record(2, world.model)
    same = detector.score(world.fresh, world.view(detector, HISTORY=past), {})
    assert float(same.abs().max()) < 1e-6


def test_a_checkpoint_that_was_not_kept_is_an_error_in_the_name_of_who_asks(world: "World") -> None:
    detector = Discrepancy(epoch=7)
    with pytest.raises(ConfigError, match="it looks back at burn-in epoch 7, which is not kept"):
        detector.score(world.fresh, world.view(detector, HISTORY=History()), {})
    assert Discrepancy().lookback == 0


def test_moved_answers_are_kl_from_the_poisoned_answer_to_the_clean_one_now_and_then(world: "World") -> None:
    weight = world.model.get_parameter("1.weight").detach()
    past = History(checkpoints={5: Weights({"1.weight": 0.2 * weight}, {})})
    received = world.fresh._replace(x=(world.fresh.x + 0.3 * world.fresh.x.flip(0)).clamp(0, 1))
    detector = Discrepancy(epoch=5, moved_answers=True)
    view = world.view(detector, HISTORY=past)
    moved = detector.moved(world.fresh, received, view)
    clean, poisoned = (x.flatten(1).double().numpy() for x in (world.fresh.x, received.x))
    for name, w in (("moved_now", weight.double().numpy()), ("moved_then", 0.2 * weight.double().numpy())):
        p, q = log_softmax(poisoned @ w.T, axis=1), log_softmax(clean @ w.T, axis=1)
        assert moved[name].numpy() == pytest.approx((np.exp(p) * (p - q)).sum(1), rel=1e-4, abs=2e-5)
    assert float((moved["moved_now"] - moved["moved_then"]).abs().max()) > 0.1
    assert float(detector.moved(world.fresh, world.fresh, view)["moved_now"].abs().max()) < 1e-6
    assert Discrepancy(epoch=5).moved(world.fresh, received, view) == {}
