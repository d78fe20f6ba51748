"""DSC, AT and the calibration of DSC's threshold, on the toy stream."""

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch.nn import functional as F

from mithridate.attacks.pgd import PGD
from mithridate.core.batch import Batch
from mithridate.core.discrepancy import memorization_discrepancy
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.modes import Precision
from mithridate.core.past import Weights
from mithridate.core.view import Need, View
from mithridate.defences.at import AT
from mithridate.defences.correction import Correcting, CorrectionLoss
from mithridate.defences.dsc import DSC
from mithridate.defences.fat import Fat
from mithridate.defences.mart import Mart
from mithridate.defences.mma import Mma
from mithridate.defences.trades import Trades
from mithridate.maths.divergence import Divergence
from mithridate.testing import toy_learner, toy_stream
from mithridate.training.calibrate import calibrate, share_above
from mithridate.training.history import History
from mithridate.training.learner import Learner

STREAM = toy_stream(0)
LOOK_BACK = DSC(old="back", back=2, mu=0.05, tau=0.0, eps=0.2, steps=10)


def moved_learner(updates: int = 3) -> Learner:
    """A learner that has made some updates, so that its past differs from it."""
    learner = toy_learner(STREAM)
    for step in range(updates):
        learner.update(STREAM.victim_batch(step, 0))
    assert learner.history is not None
    learner.history.record(learner.step, learner.model)
    return learner


def seen_by(learner: Learner, defence: Correcting) -> View:
    learner.defence = defence
    return replace(learner.view(), memory={})


def scores(learner: Learner, defence: DSC, x: torch.Tensor) -> torch.Tensor:
    old = defence.old_model(seen_by(learner, defence))
    assert old is not None
    batch = Batch(x, torch.zeros(len(x), dtype=torch.int64))
    return memorization_discrepancy(learner.white_box, old, batch, kind=defence.divergence)


def test_discrepancy_is_zero_against_oneself_and_leaves_the_model_alone() -> None:
    learner = moved_learner()
    learner.model.train()
    batch = STREAM.victim_batch(3, 0)
    before = learner.snapshot()
    itself = Weights.of(learner.model).copied()
    assert float(memorization_discrepancy(learner.white_box, itself, batch).abs().max()) < 1e-6
    with pytest.raises(ConfigError, match="back = 0"):
        replace(LOOK_BACK, back=0)
    assert float(scores(learner, LOOK_BACK, batch.x).max()) > 1e-3
    after = learner.snapshot()
    assert all(torch.equal(before.buffers[n], after.buffers[n]) for n in before.buffers)
    assert all(m.training for m in learner.model.modules())


def test_only_samples_above_the_threshold_are_corrected_and_each_stops_at_it() -> None:
    learner = moved_learner()
    batch = STREAM.victim_batch(3, 0)
    first = scores(learner, LOOK_BACK, batch.x)
    limit = float(first.sort().values[-6:].mean())
    defence = replace(LOOK_BACK, mu=limit)
    screened = defence.screen(batch, seen_by(learner, defence))
    sent = screened.batch
    moved = (sent.x != batch.x).flatten(1).any(1)
    assert torch.equal(moved, first > limit)
    assert screened.flagged is not None
    assert torch.equal(screened.flagged, moved)
    assert 0 < int(moved.sum()) < len(moved)
    last = scores(learner, defence, sent.x)
    distance = (sent.x - batch.x).flatten(1).abs().amax(1)
    stopped = moved & (distance < defence.steps * defence.step_size - 1e-6)
    assert bool((last[stopped] <= limit).all())
    assert float(distance.max()) <= defence.eps + 1e-6


def test_a_sample_gets_the_same_correction_alone_as_in_company() -> None:
    learner = moved_learner()
    batch = STREAM.victim_batch(3, 0)
    together = LOOK_BACK.screen(batch, seen_by(learner, LOOK_BACK)).batch.x
    for i in range(0, len(batch.x), 5):
        alone = LOOK_BACK.screen(batch.take(slice(i, i + 1)), seen_by(learner, LOOK_BACK)).batch.x
        assert float((alone - together[i : i + 1]).abs().max()) <= LOOK_BACK.step_size + 1e-6
        assert float((alone != together[i : i + 1]).float().mean()) < 0.05


def test_batch_stop_is_all_or_nothing() -> None:
    learner = moved_learner()
    batch = STREAM.victim_batch(3, 0)
    mean = float(scores(learner, LOOK_BACK, batch.x).mean())
    for factor, acts in ((0.9, True), (1.1, False)):
        defence = replace(LOOK_BACK, stop="batch", mu=mean * factor)
        sent = defence.screen(batch, seen_by(learner, defence)).batch
        assert bool((sent.x != batch.x).flatten(1).any(1).all()) is acts


def test_correction_goes_down_the_loss_and_at_corrects_all() -> None:
    learner = moved_learner()
    clean = STREAM.victim_batch(3, 0)
    poisoned = PGD(eps=0.2).poison(
        clean,
        View(0, {}, {Need.MODEL: learner.white_box}, PGD.needs),
        rng=torch.Generator().manual_seed(0),
    )
    screened = AT(eps=0.2).screen(poisoned, seen_by(learner, AT()))
    sent = screened.batch
    learner.model.eval()
    with torch.no_grad():
        before, after = (F.cross_entropy(learner.model(b.x), b.y) for b in (poisoned, sent))
    assert float(after) < 0.2 * float(before)
    assert bool((sent.x != poisoned.x).flatten(1).any(1).all())
    assert screened.flagged is not None
    assert bool(screened.flagged.all())


EVERY: list[Correcting] = [
    replace(LOOK_BACK, mu=0.0),
    *(made(eps=0.2, steps=4) for made in (AT, Fat)),
    *(made(eps=0.2, steps=4, adv_steps=4) for made in (Mart, Trades)),
    Mma(eps=0.2, steps=4),
]


@pytest.mark.parametrize("loss", ["ce", "ce_kl"])
@pytest.mark.parametrize("defence", EVERY, ids=lambda d: type(d).__name__)
def test_a_correction_in_bfloat16_is_nearly_that_in_single_precision(defence: Correcting, loss: CorrectionLoss) -> None:
    """The loss comes down as far; and every pass is made in it: of float32 weights a product is rounded to 8 bits."""
    learner = moved_learner()
    view = View(0, {}, {Need.MODEL: learner.white_box}, PGD.needs)
    batch = PGD(eps=0.2).poison(STREAM.victim_batch(3, 0), view, rng=torch.Generator().manual_seed(0))
    down, passes = {}, list[torch.dtype]()
    last = next(m for m in reversed(list(learner.model.modules())) if isinstance(m, torch.nn.Linear))
    last.register_forward_hook(lambda *args: passes.append(args[2].dtype))
    precision: Precision
    for precision in ("float32", "bfloat16"):
        passes.clear()
        own = replace(defence, precision=precision, correction_loss=loss)
        sent = own.screen(batch, replace(seen_by(learner, own), memory={})).batch
        assert set(passes) == {torch.bfloat16 if precision == "bfloat16" else torch.float32}
        with torch.no_grad():
            down[precision] = F.cross_entropy(learner.white_box.logits(batch.x), batch.y) - F.cross_entropy(
                learner.white_box.logits(sent.x), batch.y
            )
    assert float(down["float32"]) > 0.1
    assert float(down["bfloat16"]) == pytest.approx(float(down["float32"]), rel=0.1)


def test_threshold_rises_with_the_stream_and_the_share_is_counted() -> None:
    defence = DSC(mu=0.5, tau=0.02)
    assert (defence.threshold(0), defence.threshold(10)) == pytest.approx((0.5, 0.7))
    learner = moved_learner()
    learner.memory.clear()
    learner.defence = replace(LOOK_BACK, mu=0.0)
    flagged = learner.update(STREAM.victim_batch(3, 0)).flagged
    assert flagged is not None
    assert len(flagged) == 20
    assert 10 < int(flagged.sum()) <= 20
    assert toy_learner(STREAM).update(STREAM.victim_batch(3, 0)).flagged is None


@pytest.mark.parametrize(("policy", "learned"), [("pass", 20), ("closed", 0)])
def test_a_young_stream_follows_the_named_policy(policy: Literal["pass", "closed"], learned: int) -> None:
    defence = replace(LOOK_BACK, on_missing=policy)
    assert toy_learner(STREAM, defence=defence).update(STREAM.victim_batch(0, 0)).learned == learned


def test_a_checkpoint_that_was_not_kept_is_an_error() -> None:
    learner = toy_learner(STREAM, defence=DSC(epoch=3))
    with pytest.raises(ConfigError, match="burn-in epoch 3"):
        learner.update(STREAM.victim_batch(0, 0))


def test_a_diverged_model_is_an_error() -> None:
    learner = moved_learner()
    learner.defence = LOOK_BACK
    with torch.no_grad():
        next(learner.model.parameters()).fill_(math.nan)
    with pytest.raises(DataError, match="not finite"):
        learner.update(STREAM.victim_batch(3, 0))


@pytest.mark.parametrize("kind", ["kl", "js"])
def test_calibration_puts_the_stated_share_of_clean_samples_above_the_line(kind: Divergence) -> None:
    base = replace(LOOK_BACK, back=1, divergence=kind)
    learner = toy_learner(STREAM)
    learner.history = History(keep=4)
    clean = [STREAM.burn_in.batch(slice(20 * i, 20 * i + 20)) for i in range(10)]
    kept = learner.snapshot()
    defence, found = calibrate(learner, clean, 0.2, defence=base)
    after = learner.snapshot()
    assert all(torch.equal(kept.parameters[n], after.parameters[n]) for n in kept.parameters)
    assert found.rate == pytest.approx(0.2, abs=0.06)
    assert found.interval[0] < found.rate < found.interval[1]
    assert found.samples == 180
    assert found.fields == {"mu": defence.mu, "tau": defence.tau}
    assert defence == replace(base, mu=defence.mu, tau=defence.tau)
    assert share_above(learner, clean, defence) == (found.rate, found.interval, found.samples)


def test_calibration_needs_enough_and_a_sensible_rate() -> None:
    learner = toy_learner(STREAM)
    one = [STREAM.victim_batch(0, 0)]
    with pytest.raises(DataError, match="at least two batches"):
        calibrate(learner, one, 0.05)
    with pytest.raises(ConfigError, match="rate = 1"):
        calibrate(learner, one, 1.0)
