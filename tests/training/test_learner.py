"""One update: what it computes, what the defence changes about it, and that a learner goes back to where it was."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from mithridate.core.batch import Batch
from mithridate.core.defence import ADMITTED, Defence, Screened, Verdict
from mithridate.core.errors import CheckpointError, DataError, ThreatModelError
from mithridate.core.modes import BatchNormMode
from mithridate.core.past import Snapshot, Weights
from mithridate.core.updates import Updates
from mithridate.core.view import Need, View
from mithridate.models import build_model
from mithridate.testing.toy import CLASSES, TOY
from mithridate.training.learner import Learner

LR, MOMENTUM, DECAY = 0.05, 0.9, 0.01

Maker = Callable[[Iterator[nn.Parameter]], Optimizer]
OPTIMISERS: dict[str, Maker] = {
    "sgd": lambda p: SGD(p, lr=LR),
    "momentum": lambda p: SGD(p, lr=LR, momentum=MOMENTUM, weight_decay=DECAY),
    "nesterov": lambda p: SGD(p, lr=LR, momentum=MOMENTUM, nesterov=True),
    "adamw": lambda p: AdamW(p, lr=0.01, amsgrad=True),
}


def small_model(seed: int = 0, **settings: Any) -> nn.Module:
    return build_model({"name": "small_cnn", "width": 4, "groups": 2, **settings}, TOY, seed=seed)


def batch_of(n: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *TOY.shape, generator=rng, dtype=dtype)
    return Batch(x, torch.randint(CLASSES, (n,), generator=rng))


BATCHES = [batch_of(seed=i) for i in range(6)]


def learner_of(optimiser: str = "momentum", *, seed: int = 0, **options: Any) -> Learner:
    model = small_model(seed)
    return Learner(model, OPTIMISERS[optimiser](model.parameters()), **options)


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """Every leaf of nested dicts and lists by its path."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{at}/{key}").items()}
    if isinstance(value, list):
        return flat(dict(enumerate(value)), at)
    return {at: value}


def everything(snapshot: Snapshot) -> dict[str, Any]:
    return flat(
        {
            "parameters": dict(snapshot.parameters),
            "buffers": dict(snapshot.buffers),
            "optimiser": dict(snapshot.optimiser),
            "step": snapshot.step,
        }
    )


def differing(a: Snapshot, b: Snapshot) -> list[str]:
    """Names of what differs in a bit."""
    one, two = everything(a), everything(b)
    return sorted(one.keys() ^ two.keys()) + [
        k
        for k in one.keys() & two.keys()
        if not (torch.equal(one[k], two[k]) if isinstance(one[k], Tensor) else one[k] == two[k])
    ]


def learn(learner: Learner, batches: Sequence[Batch]) -> Snapshot:
    for batch in batches:
        learner.update(batch)
    return learner.snapshot()


# What one update computes.


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_updates_are_hand_written_sgd_steps_bit_for_bit(mode: BatchNormMode) -> None:
    learner = learner_of("momentum", update_mode=mode)
    model = small_model().train(mode == "train")
    names = [name for name, _ in model.named_parameters()]
    velocity: list[Tensor] = []
    for i, batch in enumerate(BATCHES[:3], start=1):
        parameters = list(model.parameters())
        loss = F.cross_entropy(model(batch.x), batch.y)
        gradients = torch.autograd.grad(loss, parameters)
        done = learner.update(batch)
        with torch.no_grad():
            pulls = [g.add(p, alpha=DECAY) for g, p in zip(gradients, parameters, strict=True)]
            velocity = [v * MOMENTUM + p for v, p in zip(velocity, pulls, strict=True)] if velocity else pulls
            old = torch.cat([p.flatten() for p in parameters])
            for p, v in zip(parameters, velocity, strict=True):
                p.sub_(v, alpha=LR)
            moved = torch.cat([p.flatten() for p in parameters]) - old
        after = learner.snapshot()
        assert [n for n, p in zip(names, parameters, strict=True) if not torch.equal(after.parameters[n], p)] == []
        assert [n for n, b in model.named_buffers() if not torch.equal(after.buffers[n], b)] == []
        assert done.batch_loss == float(loss.detach())
        assert done.gradient_norm == pytest.approx(float(torch.cat([g.flatten() for g in gradients]).norm()), rel=1e-6)
        assert done.bounded_norm == done.gradient_norm
        assert done.update_norm == pytest.approx(float(moved.norm()), rel=1e-5)
        assert (done.learned, done.verdict, learner.step) == (len(batch.x), ADMITTED, i)


def test_batchnorm_records_in_train_mode_and_not_in_eval_mode() -> None:
    before = learner_of().snapshot().buffers
    for mode, moves in (("train", True), ("eval", False)):
        after = learn(learner_of(update_mode=mode), BATCHES[:1]).buffers
        assert any(not torch.equal(after[n], before[n]) for n in before) is moves


def test_any_module_optimiser_and_criterion_will_do() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)).double()
    learner = Learner(model, SGD(model.parameters(), lr=0.5), criterion=F.multi_margin_loss)
    batch = batch_of(dtype=torch.float64)
    first = learner.update(batch).batch_loss
    for _ in range(30):
        last = learner.update(batch).batch_loss
    assert last < 0.5 * first
    assert learner.evaluate([batch]).loss == pytest.approx(float(F.multi_margin_loss(model(batch.x), batch.y).detach()))


def test_frozen_and_unused_parameters_stay_where_they_are() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.used, self.unused = nn.Linear(64, 8), nn.Linear(8, CLASSES), nn.Linear(8, 8)
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(self.frozen(x.flatten(1)))
            return out

    model = Odd()
    learner = Learner(model, SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY))
    before = learner.snapshot().parameters
    after = learn(learner, BATCHES[:2]).parameters
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"used"}


def test_a_nan_loss_is_reported_not_raised() -> None:
    learner = learner_of()
    with torch.no_grad():
        next(iter(learner.model.parameters())).fill_(math.nan)
    done = learner.update(BATCHES[0])
    assert math.isnan(done.batch_loss)
    assert math.isnan(done.gradient_norm)
    assert math.isnan(learner.evaluate(BATCHES[:1]).loss)


# There and back.


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("made", [0, 2])
def test_a_restored_learner_goes_on_as_if_nothing_had_happened(optimiser: str, made: int) -> None:
    learner = learner_of(optimiser)
    kept = learn(learner, BATCHES[:made])
    copy_of_kept = copy.deepcopy(kept)
    onward = learn(learner, BATCHES[made : made + 3])
    assert differing(kept, copy_of_kept) == []  # later steps do not reach into a snapshot
    assert {"parameters", "buffers", "step"} <= {name.split("/")[1] for name in differing(kept, onward)}

    for again in (learner, learner_of(optimiser, seed=1)):
        again.restore(kept)
        assert differing(again.snapshot(), kept) == []
        assert differing(learn(again, BATCHES[made : made + 3]), onward) == []
    assert differing(kept, copy_of_kept) == []  # nor do steps after a restore


def test_momentum_is_part_of_what_comes_back() -> None:
    learner = learner_of("momentum")
    fresh = learner.snapshot()
    learn(learner, BATCHES[:2])
    learner.restore(fresh)
    assert learner.snapshot().optimiser["state"] == {}


@pytest.mark.parametrize(
    "other",
    [{"width": 8}, {"norm": "group"}, {"norm": "none"}],
    ids=["wider", "same parameters, other buffers", "other parameters"],
)
def test_a_foreign_snapshot_is_refused_and_changes_nothing(other: dict[str, Any]) -> None:
    learner = learner_of("momentum")
    before = learn(learner, BATCHES[:1])
    model = small_model(1, **other)
    foreign = Learner(model, OPTIMISERS["momentum"](model.parameters())).snapshot()
    with pytest.raises(CheckpointError, match="build the model with"):
        learner.restore(foreign)
    assert differing(learner.snapshot(), before) == []


def test_the_state_of_another_optimiser_is_refused_and_changes_nothing() -> None:
    learner = learner_of("momentum")
    before = learn(learner, BATCHES[:1])
    model = small_model(1)
    two_groups = SGD([{"params": model.fc1.parameters()}, {"params": model.fc2.parameters()}], lr=LR)  # type: ignore[union-attr]  # the model has both
    with pytest.raises(CheckpointError, match="another optimiser"):
        learner.restore(Learner(model, two_groups).snapshot())
    assert differing(learner.snapshot(), before) == []


def test_only_the_buffers_can_be_taken_over() -> None:
    learner = learner_of()
    before = learner.snapshot()
    after = learn(learner, BATCHES[:1])
    learner.restore(before)
    learner.put_buffers(after.buffers)
    assert {name.split("/")[1] for name in differing(learner.snapshot(), before)} == {"buffers"}
    assert {name.split("/")[1] for name in differing(learner.snapshot(), after)} == {"parameters", "optimiser", "step"}


# The defence.


class Rejecting(Defence):
    """Writes a note and refuses every step."""

    def admit(self, before: Weights, view: View) -> Verdict:
        view.memory["seen"] = view.memory.get("seen", torch.zeros(())) + 1
        return Verdict(admit=False, reason="never")


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("made", [0, 2])
def test_a_refused_step_leaves_no_trace_but_the_defences_notes(optimiser: str, made: int) -> None:
    learner = learner_of(optimiser)
    before = learn(learner, BATCHES[:made])
    learner.defence = Rejecting()
    done = learner.update(BATCHES[3])
    assert differing(learner.snapshot(), before) == []
    assert done.verdict == Verdict(admit=False, reason="never")
    assert done.update_norm == 0
    assert done.gradient_norm > 0
    learner.update(BATCHES[4])
    assert learner.memory["seen"] == 2
    learner.defence = Defence()
    onward, undisturbed = learner_of(optimiser), learner_of(optimiser)
    learn(undisturbed, BATCHES[:made])
    onward.restore(learner.snapshot())
    assert differing(learn(onward, BATCHES[5:]), learn(undisturbed, BATCHES[5:])) == []


class Bounding(Defence):
    """Multiplies the gradient."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def bound(self, updates: Updates, view: View) -> Updates:
        return updates.with_rows(updates.rows * self.factor)


def test_a_bound_of_zero_stops_plain_sgd() -> None:
    learner = learner_of("sgd", defence=Bounding(0.0))
    before = learner.snapshot().parameters
    done = learner.update(BATCHES[0])
    after = learner.snapshot().parameters
    assert [n for n in before if not torch.equal(before[n], after[n])] == []
    assert (done.bounded_norm, done.update_norm) == (0, 0)
    assert done.gradient_norm > 0


def test_a_doubled_gradient_is_a_doubled_learning_rate() -> None:
    doubled = learn(learner_of("sgd", defence=Bounding(2.0)), BATCHES[:3])
    model = small_model()
    faster = learn(Learner(model, SGD(model.parameters(), lr=2 * LR)), BATCHES[:3])
    assert {name.split("/")[1] for name in differing(doubled, faster)} == {"optimiser"}  # its learning rate


class Keeping(Defence):
    """Lets the first samples through."""

    def __init__(self, n: int) -> None:
        self.n = n

    def screen(self, batch: Batch, view: View) -> Screened:
        return Screened(batch.take(slice(self.n)), torch.arange(batch.size) >= self.n)


def test_a_batch_that_is_screened_away_teaches_nothing() -> None:
    learner = learner_of(defence=Keeping(0))
    before = learner.snapshot()
    done = learner.update(BATCHES[0])
    assert differing(learner.snapshot(), before) == []
    assert (done.learned, done.verdict.admit) == (0, False)
    assert "no sample" in done.verdict.reason


def test_the_gradient_is_that_of_the_samples_left() -> None:
    screened = learner_of(defence=Keeping(5))
    done = screened.update(BATCHES[0])
    by_hand = learner_of()
    assert done.learned == 5
    assert done.batch_loss == by_hand.update(Batch(BATCHES[0].x[:5], BATCHES[0].y[:5])).batch_loss
    assert differing(screened.snapshot(), by_hand.snapshot()) == []


def test_a_defence_sees_a_trusted_set_only_if_it_declares_it_and_there_is_one() -> None:
    class Looking(Defence):
        def screen(self, batch: Batch, view: View) -> Screened:
            return Screened(view.trusted)

    class Declaring(Looking):
        needs = frozenset({Need.TRUSTED})

    learned = learner_of(defence=Declaring(), trusted=BATCHES[1]).update(BATCHES[0])
    assert learned.batch_loss == learner_of().update(BATCHES[1]).batch_loss
    with pytest.raises(ThreatModelError, match="Looking looked at the trusted set"):
        learner_of(defence=Looking(), trusted=BATCHES[1]).update(BATCHES[0])
    with pytest.raises(ThreatModelError, match="supply one"):
        learner_of(defence=Declaring()).update(BATCHES[0])


# What must not reach a model.


def with_pixel(value: float) -> Batch:
    batch = batch_of()
    batch.x[3, 0, 2, 2] = value
    return batch


def with_label(value: int) -> Batch:
    batch = batch_of()
    batch.y[5] = value
    return batch


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Batch(batch_of().x, batch_of().y[:-1]), "12 in 'inputs' and 11 targets"),
        (Batch(batch_of().x, batch_of().y.float()), r"targets torch\.float32 \(12,\)"),
        (Batch(batch_of().x, batch_of().y[:, None]), r"targets torch\.int64 \(12, 1\)"),
        (Batch(batch_of().x[:, 0], batch_of().y), r"cannot take inputs of float32 \(n, 8, 8\)"),
        ((batch_of().x, batch_of().y), "is a tuple"),
    ],
    ids=["lengths", "floats", "a column", "no channel", "a pair"],
)
def test_a_bad_batch_is_refused_and_changes_nothing(bad: Batch, message: str) -> None:
    learner = learner_of()
    before = learn(learner, BATCHES[:1])
    with pytest.raises(DataError, match=message):
        learner.update(bad)
    assert differing(learner.snapshot(), before) == []


def test_what_a_valid_value_is_is_the_streams_business() -> None:
    """Inputs of any kind are learned from: z-scores lie outside [0, 1]."""
    learner, bright = learner_of(), with_pixel(1.5)
    expected = F.cross_entropy(small_model().train()(bright.x), bright.y)
    assert learner.update(bright).batch_loss == float(expected.detach())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_samples_that_are_not_finite_are_quarantined_and_counted(value: float) -> None:
    learner, twin = learner_of(), learner_of()
    bad = with_pixel(value)
    finite = torch.isfinite(bad.x).flatten(1).all(1)
    assert int((~finite).sum()) == 1
    done, expected = learner.update(bad), twin.update(Batch(bad.x[finite], bad.y[finite]))
    assert (done.quarantined, done.learned) == (1, len(bad.x) - 1)
    assert done.flagged is not None
    assert torch.equal(done.flagged, ~finite)
    assert done.batch_loss == expected.batch_loss
    assert differing(learner.snapshot(), twin.snapshot()) == []


def test_a_batch_of_nothing_but_nan_teaches_nothing() -> None:
    learner = learner_of()
    before = learn(learner, BATCHES[:1])
    done = learner.update(Batch(torch.full_like(batch_of().x, math.nan), batch_of().y))
    assert (done.quarantined, done.learned, done.verdict.admit) == (len(batch_of().x), 0, False)
    assert "quarantined" in done.verdict.reason
    assert differing(learner.snapshot(), before) == []


def test_logits_of_the_wrong_shape_are_refused() -> None:
    model = nn.Conv2d(1, CLASSES, 3)
    with pytest.raises(DataError, match=r"outputs torch\.float32 \(12, 4, 6, 6\) .* targets torch\.int64 \(12,\)"):
        Learner(model, SGD(model.parameters(), lr=LR)).update(BATCHES[0])


# Evaluation.


def test_evaluation_weighs_samples_not_batches() -> None:
    learner = learner_of()
    learn(learner, BATCHES[:2])
    whole = batch_of(30, seed=9)
    pieces = [Batch(x, y) for x, y in zip(torch.split(whole.x, 7), torch.split(whole.y, 7), strict=True)]
    model = copy.deepcopy(learner.model).eval()
    logits = model(whole.x).detach()
    score = learner.evaluate(pieces)
    assert score.accuracy == float((logits.argmax(1) == whole.y).double().mean())
    assert score.loss == pytest.approx(float(F.cross_entropy(logits, whole.y)), rel=1e-6)


def test_evaluation_leaves_flags_and_statistics_alone() -> None:
    learner = learner_of()
    flags = []
    for i, module in enumerate(learner.model.modules()):
        module.training = i % 2 == 0
        flags.append(module.training)
    before = learner.snapshot()
    learner.evaluate(BATCHES)
    assert [m.training for m in learner.model.modules()] == flags
    assert True in flags
    assert any(a != b for a, b in pairwise(flags))
    assert differing(learner.snapshot(), before) == []


def test_evaluation_can_look_at_other_weights() -> None:
    learner = learner_of()
    start = learner.evaluate(BATCHES)
    old = Weights.of(learner.model).copied()
    learn(learner, BATCHES)
    assert learner.evaluate(BATCHES) != start
    assert learner.evaluate(BATCHES, old) == start


def test_accuracy_has_no_meaning_in_regression() -> None:
    model = nn.Linear(3, 1)
    learner = Learner(model, SGD(model.parameters(), lr=LR), criterion=F.mse_loss)
    x, y = torch.randn(8, 3), torch.randn(8, 1)
    score = learner.evaluate([Batch(x[:5], y[:5]), Batch(x[5:], y[5:])])
    assert math.isnan(score.accuracy)
    assert score.loss == pytest.approx(float(F.mse_loss(model(x), y).detach()), rel=1e-6)


# Parameters from elsewhere.


@pytest.mark.parametrize("what", ["parameters", "buffers"])
def test_what_does_not_fit_is_refused_and_changes_nothing(what: str) -> None:
    learner = learner_of()
    before = learner.snapshot()
    tensors: dict[str, Tensor] = {name: t + 1 for name, t in getattr(before, what).items()}
    name = next(iter(tensors))
    with pytest.raises(CheckpointError, match=f"the {what} are of another model: missing"):
        getattr(learner, f"put_{what}")({n: t for n, t in tensors.items() if n != name})
    with pytest.raises(CheckpointError, match=f"{what[:-1]} '{name}' has shape"):
        getattr(learner, f"put_{what}")({**tensors, name: torch.zeros(3, 1, 4, 1, 5)})
    assert differing(learner.snapshot(), before) == []
    getattr(learner, f"put_{what}")(tensors)
    assert {n.split("/")[1] for n in differing(learner.snapshot(), before)} == {what}
