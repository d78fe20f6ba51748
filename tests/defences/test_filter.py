"""The filter: its false-positive rate, what dropping and down-weighting do to a step, resume, and its errors."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from mithridate.core.batch import Batch
from mithridate.core.defence import FLAGGED
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.model import Snapshot
from mithridate.core.registry import build, config_of
from mithridate.core.view import Need
from mithridate.defences.chain import chain
from mithridate.defences.clip import Clip
from mithridate.defences.filter import FITTED, THRESHOLD, Filter
from mithridate.testing import toy_learner, toy_stream
from mithridate.training.learner import Learner

STREAM = toy_stream(0)


def same(a: Snapshot, b: Snapshot) -> bool:
    return all(
        torch.equal(t, two[name])
        for one, two in ((a.parameters, b.parameters), (a.buffers, b.buffers))
        for name, t in one.items()
    )


def with_anomalies(step: int = 0, count: int = 5) -> Batch:
    """A batch whose first images are inverted."""
    x, y = STREAM.victim_batch(step, 0)
    return Batch(torch.cat([1 - x[:count], x[count:]]), y)


def flagged_by(learner: Learner, batch: Batch) -> Tensor:
    """What the learner's filter says of a batch; the model does not learn from it."""
    learner.memory.pop(FLAGGED, None)
    learner.defence.screen(batch, learner.view())
    return learner.memory[FLAGGED]


@pytest.mark.parametrize("name", ["gda", "gmm", "kd", "lid", "loss"])
@pytest.mark.parametrize("fpr", [0.05, 0.2])
def test_the_stated_share_of_clean_samples_is_flagged(name: str, fpr: float) -> None:
    """On samples that neither the model, the fit nor the threshold has seen; the mean over streams of 200 of each."""
    rates = []
    for seed in range(4):
        stream = toy_stream(seed)
        learner = toy_learner(stream, seed=seed, defence=Filter(detector={"name": name}, fpr=fpr))
        x, y = stream.test.all()
        learner.trusted = Batch(x[:150], y[:150])
        fresh = Batch(
            torch.cat([x[150:], *(stream.victim_batch(i, 0).x for i in range(5))]),
            torch.cat([y[150:], *(stream.victim_batch(i, 0).y for i in range(5))]),
        )
        rates.append(float(flagged_by(learner, fresh).double().mean()))
    assert sum(rates) / 4 == pytest.approx(fpr, abs=0.03 + 0.15 * fpr)


def test_the_threshold_is_an_order_statistic_of_the_trusted_scores() -> None:
    """k = floor(0.2 * 41) = 8 of 40: seven trusted samples lie below it."""
    learner = toy_learner(STREAM, defence=Filter(fpr=0.2))
    assert learner.trusted is not None
    assert int(flagged_by(learner, learner.trusted).sum()) == 7


def test_anomalies_are_dropped_and_the_step_is_that_of_the_rest() -> None:
    learner, plain = toy_learner(STREAM, defence=Filter(fpr=0.1)), toy_learner(STREAM)
    for step in range(3):
        batch = with_anomalies(step)
        done = learner.update(batch)
        assert done.flagged is not None
        assert bool(done.flagged[:5].all())
        assert int(done.flagged.sum()) < 12
        assert done.learned == 20 - int(done.flagged.sum())
        kept = ~done.flagged
        plain.update(Batch(batch.x[kept], batch.y[kept]))
        assert same(learner.snapshot(), plain.snapshot())


def test_a_batch_of_nothing_but_anomalies_teaches_nothing() -> None:
    learner = toy_learner(STREAM, defence=Filter(fpr=0.1))
    before = learner.snapshot()
    done = learner.update(with_anomalies(count=20))
    assert (done.learned, done.verdict.admit) == (0, False)
    assert same(learner.snapshot(), before)


@pytest.mark.parametrize("anomalies", [5, 20])
def test_a_lower_weight_is_a_lower_weight_in_the_mean(anomalies: int) -> None:
    learner = toy_learner(STREAM, defence=Filter(fpr=0.1, flagged_weight=0.25))
    batch = with_anomalies(count=anomalies)
    twin = copy.deepcopy(learner.model).train()
    done = learner.update(batch)
    assert done.flagged is not None
    assert anomalies <= int(done.flagged.sum()) < anomalies + 7
    assert done.learned == 20
    weights = torch.where(done.flagged, 0.25, 1.0)
    loss = (weights * F.cross_entropy(twin(batch.x), batch.y, reduction="none")).sum() / 20
    torch.autograd.backward(loss)
    assert done.batch_loss == pytest.approx(float(loss.detach()), rel=1e-5)
    for mine, theirs in zip(learner.model.parameters(), twin.parameters(), strict=True):
        assert theirs.grad is not None
        assert torch.allclose(mine, theirs - 0.05 * theirs.grad, atol=1e-5)


def test_the_loss_is_the_plain_one_where_nothing_is_flagged() -> None:
    learner = toy_learner(STREAM, defence=Filter(fpr=0.1, flagged_weight=0.5))
    x, y = STREAM.victim_batch(0, 0)
    fine = ~flagged_by(learner, Batch(x, y))
    assert 10 < int(fine.sum()) < 20
    clean, plain = Batch(x[fine], y[fine]), toy_learner(STREAM)
    done = learner.update(clean)
    plain.update(clean)
    assert done.flagged is not None
    assert not bool(done.flagged.any())
    assert same(learner.snapshot(), plain.snapshot())


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_a_resumed_run_is_the_run_that_was_not_killed(weight: float) -> None:
    """What was fitted and measured is in the notes: the second half needs neither the training nor the trusted set."""
    whole = toy_learner(STREAM, defence=Filter(flagged_weight=weight))
    first = toy_learner(STREAM, defence=Filter(flagged_weight=weight))
    for step in range(4):
        whole.update(with_anomalies(step))
    for step in range(2):
        first.update(with_anomalies(step))
    assert {key.startswith(FITTED) or key in {THRESHOLD, FLAGGED} for key in first.memory} == {True}
    notes = safetensors.torch.load(safetensors.torch.save({k: t.contiguous() for k, t in first.memory.items()}))
    second = toy_learner(STREAM, defence=Filter(flagged_weight=weight))
    second.restore(first.snapshot())
    second.memory.update(notes)
    second.training, second.trusted = None, None
    for step in range(2, 4):
        second.update(with_anomalies(step))
    assert same(whole.snapshot(), second.snapshot())


def test_two_runs_are_the_same_run() -> None:
    learners = [toy_learner(STREAM, defence=Filter(detector={"name": "lid", "stored": 60})) for _ in range(2)]
    for learner in learners:
        learner.update(with_anomalies())
    assert same(*(learner.snapshot() for learner in learners))


def test_a_score_that_is_no_number_is_flagged() -> None:
    def odd(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels) + (torch.nan if len(labels) == 1 and int(labels[0]) == 3 else 0.0)

    learner = toy_learner(STREAM, defence=Filter(detector={"name": "loss"}, fpr=0.1))
    learner.criterion = odd
    assert learner.trusted is not None
    x, y = learner.trusted
    learner.trusted = Batch(x[y != 3], y[y != 3])
    batch = STREAM.victim_batch(0, 0)
    assert bool(flagged_by(learner, batch)[batch.y == 3].all())
    assert not bool(flagged_by(learner, batch).all())
    learner.trusted = Batch(x, y)
    learner.memory.clear()
    with pytest.raises(DataError, match="have no finite score"):
        learner.update(batch)
    assert THRESHOLD not in learner.memory


def test_what_the_detector_is_fitted_to_can_be_capped_and_is_drawn_from_all() -> None:
    """A training set in the order of its classes would give its first classes alone."""
    defence = Filter(detector={"name": "kd"}, fit_samples=60)
    learner = toy_learner(STREAM, defence=defence)
    x, y = STREAM.burn_in.all()
    order = y.argsort()
    learner.training = [Batch(*pair) for pair in zip(torch.split(x[order], 50), torch.split(y[order], 50), strict=True)]
    learner.update(STREAM.victim_batch(0, 0))
    classes = learner.memory[FITTED + "classes"]
    assert 45 < len(classes) <= 60
    assert int(torch.bincount(classes, minlength=4).min()) > 3


def test_it_declares_what_its_detector_needs() -> None:
    assert Filter().needs == {Need.MODEL, Need.TRUSTED, Need.TRAINING}
    assert Filter(detector={"name": "loss"}).needs == {Need.MODEL, Need.TRUSTED}
    assert Filter(detector={"name": "discrepancy"}).needs == {Need.MODEL, Need.TRUSTED, Need.HISTORY}
    table = config_of(Filter(detector={"name": "lid"}))
    assert table["detector"] == {"name": "lid", "stored": 10_000}
    made = build("defence", table)
    assert made == Filter(detector={"name": "lid"})
    assert hash(made) == hash(Filter(detector={"name": "lid"}))
    assert made != Filter(detector={"name": "lid", "neighbours": 5})


def test_the_discrepancy_can_be_its_detector() -> None:
    learner = toy_learner(STREAM, defence=Filter(detector={"name": "discrepancy"}, fpr=0.2))
    flagged = learner.update(STREAM.victim_batch(0, 0)).flagged
    assert flagged is not None
    assert 0 < int(flagged.sum()) < 12


def test_in_a_chain_it_drops_before_others_and_weighs_alone() -> None:
    batch = with_anomalies()
    alone = toy_learner(STREAM, defence=Filter(fpr=0.1))
    inside = toy_learner(STREAM, defence=chain(Filter(fpr=0.1), Clip(clip_norm=1e6)))
    one, two = alone.update(batch), inside.update(batch)
    assert one.flagged is not None
    assert two.flagged is not None
    assert torch.equal(one.flagged, two.flagged)
    assert same(alone.snapshot(), inside.snapshot())

    weigh, drop = Filter(fpr=0.3, flagged_weight=0.5), Filter(fpr=0.1, detector={"name": "loss"})
    assert toy_learner(STREAM, defence=chain(drop, weigh)).update(batch).learned < 20
    with pytest.raises(ConfigError, match="change the loss"):
        chain(weigh, weigh)
    with pytest.raises(ConfigError, match="put the parts that drop samples before"):
        toy_learner(STREAM, defence=chain(weigh, drop)).update(batch)


def test_too_few_trusted_samples_for_the_rate() -> None:
    learner = toy_learner(STREAM, defence=Filter(fpr=0.02))
    with pytest.raises(DataError, match=r"40 trusted samples .* 0\.02; give at least 49, or a rate of 0\.0244 or more"):
        learner.update(STREAM.victim_batch(0, 0))
    x, y = STREAM.test.all()
    learner.trusted = Batch(x[:49], y[:49])
    assert learner.update(STREAM.victim_batch(0, 0)).flagged is not None


def test_scores_that_say_nothing_are_an_error() -> None:
    learner = toy_learner(STREAM, defence=Filter(detector={"name": "loss"}))
    last = list(learner.model.parameters())[-2:]
    with torch.no_grad():
        for parameter in last:
            parameter.zero_()
    with pytest.raises(DataError, match="all 40 trusted samples have the same score"):
        learner.update(STREAM.victim_batch(0, 0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"detector": {"name": "gad"}}, "did you mean 'gda'"),
        ({"detector": {"name": "lid", "neighbors": 3}}, "did you mean 'neighbours'"),
        ({"detector": {"name": "discrepancy", "old": "back"}}, 'set old = "checkpoint"'),
        ({"fpr": 1.0}, "fpr"),
        ({"flagged_weight": 1.0}, "flagged_weight"),
    ],
)
def test_settings_that_cannot_work(values: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("defence", {"name": "filter", **values})
