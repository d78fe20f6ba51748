"""The defended step: its moments in order, what each is shown, that an error undoes all of it, and what it refuses."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.defence import ADMITTED, Defence, Screened, Verdict
from mithridate.core.domain import Domain
from mithridate.core.errors import CheckpointError, ConfigError, DataError
from mithridate.core.past import Snapshot, Weights
from mithridate.core.targets import IGNORED, Criterion
from mithridate.core.updates import Updates
from mithridate.core.view import Need, View
from mithridate.training.history import History
from mithridate.training.learner import Learner
from mithridate.training.step import DefendedStep

LR = 0.1
MOMENTS = ("begin", "screen", "loss", "bound", "admit", "committed")


class Net(nn.Module):
    """Features, two numbers a sample or both to three logits, in whatever wrapping."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        hidden = self.norm(self.first(x)).relu()
        logits: Tensor = self.last(hidden if weight is None else hidden * weight.unsqueeze(1))
        return logits


class Wrapped(Net):
    def forward(self, x: Tensor, weight: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=super().forward(x, weight), hidden=None)


def model(cls: type[Net] = Net) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls()


def batch_of(n: int = 8, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(n, 5, generator=rng), torch.randint(3, (n,), generator=rng))


def learner_of(defence: Defence | None = None, cls: type[Net] = Net, **options: Any) -> Learner:
    net = model(cls)
    return Learner(net, SGD(net.parameters(), lr=LR, momentum=0.9), defence=defence, **options)


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k])
        if isinstance(a[k], Tensor)
        else same(a[k], b[k])
        if isinstance(a[k], Mapping)
        else a[k] == b[k]
        for k in a
    )


def equal(a: Snapshot, b: Snapshot) -> bool:
    """In every bit of parameters, buffers, optimiser state and step."""
    return a.step == b.step and all(
        same(getattr(a, what), getattr(b, what)) for what in ("parameters", "buffers", "optimiser")
    )


# The moments.


@dataclass
class Seen:
    """What a defence was shown at one moment."""

    moment: str
    step: int
    parameters: Tensor
    statistics: Tensor
    more: Any = None


@dataclass
class Recording(Defence):
    """Writes down every moment, and changes nothing."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL})
    seen: list[Seen] = field(default_factory=list)
    verdict: Verdict = ADMITTED

    def note(self, moment: str, view: View, more: Any = None) -> None:
        module = view.model.module
        parameters = torch.cat([p.detach().flatten() for p in module.parameters()])
        self.seen.append(Seen(moment, view.step, parameters, module.get_buffer("norm.running_mean").clone(), more))

    def begin(self, view: View) -> None:
        self.note("begin", view)

    def screen(self, batch: AnyBatch, view: View) -> Screened:
        self.note("screen", view, batch.size)
        return Screened(batch)

    def loss(self, model: nn.Module, batch: AnyBatch, criterion: Criterion, view: View) -> Tensor:
        self.note("loss", view, model.training)
        return super().loss(model, batch, criterion, view)

    def bound(self, updates: Updates, view: View) -> Updates:
        self.note("bound", view, updates)
        return updates

    def admit(self, before: Weights, view: View) -> Verdict:
        old = torch.cat([p.flatten() for p in before.parameters.values()])
        self.note("admit", view, (old, before.buffers["norm.running_mean"].clone()))
        return self.verdict

    def committed(self, view: View) -> None:
        self.note("committed", view)


def test_moments_come_in_order_each_on_the_model_as_it_is_then() -> None:
    recording = Recording()
    spied, alone = learner_of(recording), learner_of()
    for seed in range(2):
        done, undefended = spied.update(batch_of(seed=seed)), alone.update(batch_of(seed=seed))
        assert done.batch_loss == undefended.batch_loss
    assert equal(spied.snapshot(), alone.snapshot())
    assert [seen.moment for seen in recording.seen] == 2 * list(MOMENTS)
    for i in (0, 1):
        begin, screen, loss, bound, admit, committed = recording.seen[6 * i : 6 * i + 6]
        assert [s.step for s in (begin, screen, loss, bound, admit, committed)] == [i, i, i, i, i + 1, i + 1]
        for later in (screen, loss, bound):
            assert torch.equal(later.parameters, begin.parameters)
        assert torch.equal(screen.statistics, begin.statistics)
        assert not torch.equal(bound.statistics, begin.statistics)  # the forward pass has recorded
        assert not torch.equal(admit.parameters, begin.parameters)
        assert torch.equal(committed.parameters, admit.parameters)
        old, statistics = admit.more
        assert torch.equal(old, begin.parameters)
        assert torch.equal(statistics, begin.statistics)
        assert (screen.more, loss.more) == (8, True)


def test_an_update_names_its_tensors_and_its_loss() -> None:
    recording = Recording()
    learner = learner_of(recording)
    done = learner.update(batch_of())
    updates: Updates = next(seen.more for seen in recording.seen if seen.moment == "bound")
    assert list(updates.shapes) == [name for name, _ in learner.model.named_parameters()]
    assert updates.losses is not None
    assert updates.losses.tolist() == [done.batch_loss]
    assert float(updates.lengths()) == pytest.approx(done.gradient_norm, rel=1e-6)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_loss_is_made_in_update_mode_and_flags_come_back(mode: Any) -> None:
    recording = Recording()
    learner = learner_of(recording, update_mode=mode)
    learner.model.get_submodule("norm").eval()
    flags = [m.training for m in learner.model.modules()]
    learner.update(batch_of())
    assert [seen.more for seen in recording.seen if seen.moment == "loss"] == [mode == "train"]
    assert [m.training for m in learner.model.modules()] == flags


def test_a_refused_step_is_not_committed_and_counts_for_nothing() -> None:
    recording = Recording(verdict=Verdict(admit=False, reason="no"))
    learner = learner_of(recording)
    before = learner.snapshot()
    done = learner.update(batch_of())
    assert [seen.moment for seen in recording.seen] == list(MOMENTS[:-1])
    assert (done.verdict.reason, done.update_norm, learner.step) == ("no", 0.0, 0)
    assert equal(learner.snapshot(), before)


def test_a_shortened_step_is_what_is_committed() -> None:
    class Halving(Recording):
        def admit(self, before: Weights, view: View) -> Verdict:
            super().admit(before, view)
            now = dict(view.model.module.named_parameters())
            return Verdict(admit=True, parameters={n: torch.lerp(before.parameters[n], now[n], 0.5) for n in now})

    halving = Halving()
    learner, whole = learner_of(halving), learner_of()
    done, full = learner.update(batch_of()), whole.update(batch_of())
    assert done.update_norm == pytest.approx(full.update_norm / 2, rel=1e-4)
    committed, admit = halving.seen[-1], halving.seen[-2]
    assert torch.equal(committed.parameters, torch.cat([p.detach().flatten() for p in learner.model.parameters()]))
    assert not torch.equal(committed.parameters, admit.parameters)
    assert learner.step == 1


def test_a_screened_away_batch_ends_the_step() -> None:
    class Nothing(Recording):
        def screen(self, batch: AnyBatch, view: View) -> Screened:
            super().screen(batch, view)
            return Screened(batch.take(slice(0)), torch.ones(batch.size, dtype=torch.bool))

    nothing = Nothing()
    learner = learner_of(nothing)
    before = learner.snapshot()
    done = learner.update(batch_of())
    assert [seen.moment for seen in nothing.seen] == ["begin", "screen"]
    assert (done.learned, done.verdict.reason) == (0, "the defence left no sample of the batch")
    assert done.flagged is not None
    assert bool(done.flagged.all())
    assert equal(learner.snapshot(), before)


# Errors.


class Broken(Recording):
    """Raises at one moment, having written to its notes, in place and not."""

    def __init__(self, moment: str) -> None:
        super().__init__()
        self.moment = moment

    def note(self, moment: str, view: View, more: Any = None) -> None:
        view.memory["count"] += 1
        view.memory[moment] = torch.ones(())
        if moment == self.moment:
            raise RuntimeError(f"in {moment}")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("made", [0, 1])
def test_an_error_in_any_moment_undoes_model_optimiser_and_notes(moment: str, made: int) -> None:
    learner = learner_of()
    for i in range(made):
        learner.update(batch_of(seed=i))
    before, flags = learner.snapshot(), [m.training for m in learner.model.modules()]
    learner.defence = Broken(moment)
    learner.memory["count"] = torch.zeros(())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"in {moment}"):
            learner.update(batch_of(seed=5))
        assert equal(learner.snapshot(), before)
        assert [m.training for m in learner.model.modules()] == flags
        assert all(p.grad is None for p in learner.model.parameters())
        assert learner.memory.keys() == {"count"}
        assert float(learner.memory["count"]) == 0
    learner.defence = Defence()
    undisturbed = learner_of()
    for i in range(made):
        undisturbed.update(batch_of(seed=i))
    for one in (learner, undisturbed):
        one.update(batch_of(seed=6))
    assert equal(learner.snapshot(), undisturbed.snapshot())


def test_an_interrupt_undoes_the_step_too() -> None:
    class Interrupted(Defence):
        def admit(self, before: Weights, view: View) -> Verdict:
            raise KeyboardInterrupt

    learner = learner_of(Interrupted())
    before = learner.snapshot()
    with pytest.raises(KeyboardInterrupt):
        learner.update(batch_of())
    assert equal(learner.snapshot(), before)


def test_parameters_of_another_model_are_refused_and_the_step_undone() -> None:
    class Foreign(Defence):
        def admit(self, before: Weights, view: View) -> Verdict:
            return Verdict(admit=True, parameters={"other.weight": torch.zeros(2)})

    learner = learner_of(Foreign())
    before = learner.snapshot()
    with pytest.raises(CheckpointError, match="parameters are of another model"):
        learner.update(batch_of())
    assert equal(learner.snapshot(), before)


def test_a_defence_that_drops_without_flagging_is_a_defect() -> None:
    class Dropping(Defence):
        def screen(self, batch: AnyBatch, view: View) -> Screened:
            return Screened(batch.take(slice(3)))

    learner = learner_of(Dropping())
    before = learner.snapshot()
    with pytest.raises(AssertionError, match="Dropping left 3 of 8 samples, and did not flag those"):
        learner.update(batch_of())
    assert equal(learner.snapshot(), before)


# What a loss may be.


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (lambda z, y: F.cross_entropy(z, y, reduction="none"), r"gives a tensor of shape \(8,\).*reduction=\"mean\""),
        (lambda z, y: (F.cross_entropy(z, y),), "gives a tuple, and a loss is one number"),
        (lambda z, y: float(F.cross_entropy(z, y).detach()), "gives a float"),
    ],
    ids=["one a sample", "tuple", "float"],
)
def test_a_criterion_without_a_scalar_is_refused(criterion: Criterion, message: str) -> None:
    learner = learner_of(criterion=criterion)
    before = learner.snapshot()
    with pytest.raises(ConfigError, match=message):
        learner.update(batch_of())
    assert equal(learner.snapshot(), before)


def test_one_number_in_brackets_is_a_number() -> None:
    bracketed = learner_of(criterion=lambda z, y: F.cross_entropy(z, y).reshape(1, 1))
    plain = learner_of()
    assert bracketed.update(batch_of()).batch_loss == plain.update(batch_of()).batch_loss
    assert equal(bracketed.snapshot(), plain.snapshot())


@pytest.mark.parametrize(
    ("criterion", "y", "message"),
    [
        (F.cross_entropy, torch.zeros(8), r"targets torch\.float32 \(8,\)"),
        (F.binary_cross_entropy_with_logits, torch.zeros(8, 2), r"outputs torch\.float32 \(8, 3\)"),
    ],
)
def test_targets_that_the_criterion_cannot_take_are_named(criterion: Criterion, y: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        learner_of(criterion=criterion).update(Batch(batch_of().x, y))


# Weights of samples.


class Weighing(Defence):
    """Gives every sample a weight."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def screen(self, batch: AnyBatch, view: View) -> Screened:
        return Screened(batch, self.weights < 1, self.weights)


@pytest.mark.parametrize(
    "weights",
    [[1.0, 0.25, 1.0, 0.0, 1.0, 0.25, 2.0, 1.0], [0.5] * 8, [0.0] * 8, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]],
    ids=["some", "half", "nothing", "all different"],
)
@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_weights_are_a_weighted_mean(weights: list[float], kind: str) -> None:
    batch, w = batch_of(), torch.tensor(weights)
    criterion: Criterion = F.cross_entropy
    if kind == "numbers":
        batch, criterion = Batch(batch.x, torch.randn(8, 3, generator=torch.Generator().manual_seed(3))), F.mse_loss
    learner, twin = learner_of(Weighing(w), criterion=criterion), model()
    done = learner.update(batch)
    each = torch.stack([criterion(z[None], y[None]) for z, y in zip(twin.train()(batch.x), batch.y, strict=True)])
    loss = (w * each).sum() / 8
    torch.autograd.backward(loss)
    assert done.batch_loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert done.learned == 8
    for mine, theirs in zip(learner.model.parameters(), twin.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(mine, theirs - LR * theirs.grad, rtol=1e-4, atol=1e-6)
    assert torch.equal(learner.model.get_buffer("norm.running_mean"), twin.get_buffer("norm.running_mean"))


@pytest.mark.parametrize(
    "weights", [[1.0] * 3 + [0.5] * 5, [0.5] * 2 + [1.0] * 6], ids=["beside others", "of a whole group"]
)
def test_samples_that_no_loss_counts_have_no_part_in_a_weighted_mean(weights: list[float]) -> None:
    batch, w = batch_of(), torch.tensor(weights)
    batch.y[:2] = IGNORED
    done = learner_of(Weighing(w)).update(batch)
    each = F.cross_entropy(model().train()(batch.x), batch.y, reduction="none")
    assert done.batch_loss == pytest.approx(float((w * each).sum().detach()) / 6, rel=1e-5)
    assert done.verdict.admit


def test_weights_of_one_are_the_plain_mean_bit_for_bit() -> None:
    weighing, plain = learner_of(Weighing(torch.ones(8))), learner_of()
    assert weighing.update(batch_of()).batch_loss == plain.update(batch_of()).batch_loss
    assert equal(weighing.snapshot(), plain.snapshot())


def test_a_loss_on_other_samples_than_those_that_have_weights_is_refused() -> None:
    class Doubling(Weighing):
        def loss(self, model: nn.Module, batch: AnyBatch, criterion: Criterion, view: View) -> Tensor:
            return criterion(model(torch.cat([batch.x, batch.x])), torch.cat([batch.y, batch.y]))

    learner = learner_of(Doubling(torch.ones(8)))
    before = learner.snapshot()
    with pytest.raises(ConfigError, match=r"weights to 8 samples, and its loss looks at 16; a part that weighs"):
        learner.update(batch_of())
    assert equal(learner.snapshot(), before)


# Quarantine.


def corrupted(batch: AnyBatch, *rows: int) -> AnyBatch:
    spoiled = batch.clone()
    tensor = spoiled.x if isinstance(spoiled.x, Tensor) else spoiled.x["weight"]
    for row in rows:
        tensor[row].fill_(math.nan)
    return spoiled


def mapping_of(batch: Batch) -> AnyBatch:
    rng = torch.Generator().manual_seed(4)
    return Batch({"x": batch.x, "weight": torch.rand(batch.size, generator=rng)}, batch.y)


@pytest.mark.parametrize("kind", ["tensor", "mapping"])
def test_samples_that_are_not_finite_reach_nobody(kind: str) -> None:
    class Flagging(Recording):
        """Flags the first sample that it is shown."""

        def screen(self, batch: AnyBatch, view: View) -> Screened:
            super().screen(batch, view)
            assert bool(batch.finite().all())
            return Screened(batch, torch.arange(batch.size) == 0)

    whole: AnyBatch = batch_of() if kind == "tensor" else mapping_of(batch_of())
    learner, twin = learner_of(Flagging()), learner_of()
    done = learner.update(corrupted(whole, 0, 5))
    expected = twin.update(whole.take(torch.tensor([1, 2, 3, 4, 6, 7])))
    assert done.batch_loss == expected.batch_loss
    assert equal(learner.snapshot(), twin.snapshot())
    assert (done.quarantined, done.learned) == (2, 6)
    assert done.flagged is not None
    assert done.flagged.tolist() == [True, True, False, False, False, True, False, False]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_targets_that_are_not_finite_are_quarantined_too(value: float) -> None:
    x, y = batch_of().x, torch.linspace(-1, 1, 24).view(8, 3)
    spoiled = y.clone()
    spoiled[2, 1] = value
    learner, twin = learner_of(criterion=F.mse_loss), learner_of(criterion=F.mse_loss)
    kept = torch.arange(8) != 2
    done, expected = learner.update(Batch(x, spoiled)), twin.update(Batch(x[kept], y[kept]))
    assert (done.quarantined, done.learned, done.batch_loss) == (1, 7, expected.batch_loss)
    assert equal(learner.snapshot(), twin.snapshot())


def test_nothing_finite_is_nothing_learned_and_nobody_is_asked() -> None:
    recording = Recording()
    learner = learner_of(recording)
    before = learner.snapshot()
    done = learner.update(corrupted(batch_of(), *range(8)))
    assert [seen.moment for seen in recording.seen] == ["begin"]
    assert (done.quarantined, done.learned, done.verdict.admit) == (8, 0, False)
    assert "quarantined" in done.verdict.reason
    assert done.flagged is not None
    assert bool(done.flagged.all())
    assert equal(learner.snapshot(), before)


# Inputs of any kind.


@pytest.mark.parametrize("cls", [Net, Wrapped], ids=["tensor", "object with logits"])
@pytest.mark.parametrize("kind", ["tensor", "mapping", "sequence"])
def test_inputs_and_answers_of_any_kind_give_the_same_step(kind: str, cls: type[Net]) -> None:
    plain = batch_of()
    ones = torch.ones(8)
    x: Any = {"tensor": plain.x, "mapping": {"weight": ones, "x": plain.x}, "sequence": (plain.x, ones)}[kind]
    learner, reference = learner_of(cls=cls), learner_of()
    batch: AnyBatch = Batch(x, plain.y)
    assert learner.update(batch).batch_loss == reference.update(plain).batch_loss
    assert equal(learner.snapshot(), reference.snapshot())
    # What can be traced is evaluated with BatchNorm folded, which rounds otherwise.
    assert learner.evaluate([batch]) == pytest.approx(reference.evaluate([plain]), rel=1e-5)


def test_a_mapping_whose_tensors_differ_in_length_is_refused_before_the_step() -> None:
    recording = Recording()
    learner = learner_of(recording)
    bad: AnyBatch = Batch({"x": torch.zeros(8, 5), "weight": torch.ones(7)}, torch.zeros(8, dtype=torch.int64))
    before = learner.snapshot()
    with pytest.raises(DataError, match="8 in 'x', 7 in 'weight' and 8 targets"):
        learner.update(bad)
    assert equal(learner.snapshot(), before)
    assert "screen" not in {seen.moment for seen in recording.seen}


# What a defence is shown.


def test_a_view_holds_what_the_learner_was_given() -> None:
    trusted, training = batch_of(seed=1), [batch_of(seed=2)]

    class Asking(Defence):
        needs: ClassVar[frozenset[Need]] = frozenset(Need)

    learner = learner_of(Asking(), trusted=trusted, training=training, domain=Domain(-4.0, 4.0))
    view = learner.view()
    assert view.trusted is trusted
    assert view.training is training
    assert view.domain == Domain(-4.0, 4.0)
    assert view.model.module is learner.model
    assert Need.HISTORY not in view.available
    assert learner_of().view().domain == Domain()  # unknown: nothing is clamped


def test_history_is_recorded_before_the_step_whatever_becomes_of_it() -> None:
    history = History(keep=5)
    learner = learner_of(Recording(verdict=Verdict(admit=False)), history=history)
    start = copy.deepcopy(dict(learner.model.named_parameters()))
    learner.update(batch_of())
    learner.defence = Defence()
    learner.update(batch_of())
    learner.update(batch_of())
    labels = [found.label if (found := history.back(k)) else None for k in range(3)]
    assert labels == ["before update 1", "before update 0", None]
    oldest = history.back(1)
    assert oldest is not None
    assert all(torch.equal(t, start[name]) for name, t in oldest.parameters.items())


# A step that somebody else makes.


def test_without_an_optimiser_somebody_else_moves_the_model() -> None:
    """A server of arrays: it replaces the model, and the defence still says whether that stays."""

    class Limit(Recording):
        def admit(self, before: Weights, view: View) -> Verdict:
            super().admit(before, view)
            return Verdict(admit=float(view.model.module.get_parameter("last.bias").detach().max()) < 5)

    net, limit = model(), Limit()
    step = DefendedStep(net, None, criterion=F.cross_entropy, defence=limit)
    verdicts = []
    for value in (1.0, 9.0):
        with step.taking():
            parameters = {name: torch.full_like(p, value) for name, p in net.named_parameters()}
            step.put_parameters(parameters)
            step.put_buffers({name: torch.full_like(b, value) for name, b in net.named_buffers()})
            verdict, moved = step.advance()
            verdicts.append((verdict.admit, moved > 0, step.step))
    assert verdicts == [(True, True, 1), (False, False, 1)]
    assert {float(t.detach().double().mean()) for t in net.state_dict().values()} == {1.0}
    assert [seen.moment for seen in limit.seen] == ["begin", "admit", "committed", "begin", "admit"]


def test_a_gradient_that_others_made_is_bounded_and_stepped_on() -> None:
    class Halving(Defence):
        def bound(self, updates: Updates, view: View) -> Updates:
            return updates.scaled(torch.full((len(updates.rows),), 0.5))

    net = model()
    step = DefendedStep(net, SGD(net.parameters(), lr=LR), criterion=F.cross_entropy, defence=Halving())
    before = [p.detach().clone() for p in net.parameters()]
    update = Updates.of({name: torch.ones_like(p) for name, p in net.named_parameters()})
    next(net.parameters()).grad = torch.full((8, 5), 99.0)  # stale
    with step.taking():
        step.put_gradient(step.bound_updates(update))
        verdict, _ = step.advance()
    assert verdict == ADMITTED
    for p, b in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), b - LR / 2)
    assert float(update.rows.mean()) == 1  # a value, and stays


@pytest.mark.parametrize("replaced", ["optimiser", "model"])
def test_an_optimiser_or_model_that_was_replaced_is_the_one_that_is_rolled_back(replaced: str) -> None:
    learner = learner_of(Recording(verdict=Verdict(admit=False)))
    learner.update(batch_of())
    if replaced == "model":
        learner.model = model(Wrapped)
    learner.optimiser = SGD(learner.model.parameters(), lr=LR, momentum=0.5)
    before = learner.snapshot()
    learner.update(batch_of())
    assert equal(learner.snapshot(), before)
    assert before.optimiser["state"] == {}
