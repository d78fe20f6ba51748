"""Chains: order, notes kept apart, one part that is the part itself, and what a recipe may say."""

import copy
import math
import pickle
import tomllib
from typing import Any, ClassVar

import pytest
import tomli_w
import torch
from torch import Tensor, nn

from mithridate.attacks.noise import Noise
from mithridate.core.batch import Batch
from mithridate.core.defence import Defence, Screened, Verdict
from mithridate.core.errors import ConfigError, DataError, ThreatModelError
from mithridate.core.past import Weights
from mithridate.core.registry import build, config_of
from mithridate.core.targets import Criterion
from mithridate.core.updates import Updates
from mithridate.core.view import Need, View
from mithridate.data.stream import Stream
from mithridate.defences.bound_update import BoundUpdate
from mithridate.defences.chain import Chain, chain
from mithridate.defences.clip import Clip
from mithridate.defences.ema import Ema
from mithridate.defences.gate import KEPT, Gate
from mithridate.defences.median_bn import MedianBn
from mithridate.defences.none import Standard
from mithridate.defences.skip import Skip
from mithridate.simulation.online import OnlineRun, run_online
from mithridate.testing import toy_learner
from mithridate.training.learner import Learner
from tests.recipes import timeless_rows

PARTS: dict[str, Defence] = {
    "none": Standard(),
    "clip": Clip(clip_norm=0.1),
    "gate": Gate(max_loss_rise=0.01),
    "ema": Ema(decay=0.8),
    "skip": Skip(warmup=1, threshold=0.0),
    "bound_update": BoundUpdate(clip_norm=0.01),
    "median_bn": MedianBn(),
}


def rows(stream: Stream, defence: Defence | None) -> list[dict[str, Any]]:
    learner = toy_learner(stream, defence=defence)
    outcome = run_online(learner, stream, Noise(eps=0.3), OnlineRun(steps=4, images=0))
    return timeless_rows(outcome.trace)


def learn(learner: Learner, stream: Stream, steps: range) -> list[Verdict]:
    return [learner.update(stream.victim_batch(i % 5, 0)).verdict for i in steps]


def made_of(*parts: Defence) -> Chain:
    """A chain of parts that are not registered: for tests alone."""
    made = Chain(parts=({"name": "none"},) * len(parts))
    object.__setattr__(made, "defences", parts)
    object.__setattr__(made, "needs", frozenset({Need.MODEL}).union(*(p.needs for p in parts)))
    return made


# One part is that part.


@pytest.mark.parametrize("name", PARTS)
def test_a_chain_of_one_is_that_part_bit_for_bit(stream: Stream, name: str) -> None:
    alone = rows(stream, PARTS[name])
    assert rows(stream, chain(PARTS[name])) == alone
    assert rows(stream, chain(Standard(), chain(PARTS[name]), Standard())) == alone
    assert (rows(stream, None) == alone) is (name == "none")


def test_a_chain_of_nothing_is_no_defence(stream: Stream) -> None:
    assert rows(stream, chain()) == rows(stream, None)


# Order.


def test_order_matters_and_each_moment_goes_through_the_parts_in_turn() -> None:
    gradient = Updates(torch.tensor([[3.0, -4.0]]), {"a": torch.Size([2])})
    long, flat = Clip(clip_norm=10.0, how="project", norm="linf"), Clip(clip_norm=2.0, norm="linf", how="project")
    scale = Clip(clip_norm=1.0)
    one = chain(long, flat, scale).bound(gradient, View()).rows
    other = chain(scale, flat, long).bound(gradient, View()).rows
    assert torch.allclose(one, torch.tensor([[0.5, -0.5]]) * 2**0.5)
    assert torch.allclose(other, torch.tensor([[0.6, -0.8]]))


def test_a_gate_measures_the_step_that_the_parts_before_it_left(stream: Stream) -> None:
    """Shortened first, a harmful step is harmless and kept; measured first, it is refused."""
    batch = stream.victim_batch(0, 0)
    batch = Batch(batch.x, (batch.y + 1) % 4)
    gate, bound = Gate(max_loss_rise=0.05, max_accuracy_drop=math.inf), BoundUpdate(clip_norm=1e-3)
    shortened = toy_learner(stream, defence=chain(bound, gate), lr=0.5)
    done = shortened.update(batch)
    assert done.verdict.admit
    assert done.update_norm == pytest.approx(1e-3, rel=1e-3)
    assert done.verdict.parameters is not None
    assert not toy_learner(stream, defence=chain(gate, bound), lr=0.5).update(batch).verdict.admit
    assert not toy_learner(stream, defence=gate, lr=0.5).update(batch).verdict.admit
    alone = toy_learner(stream, defence=bound, lr=0.5)
    alone.update(batch)
    assert all(torch.equal(a, b) for a, b in zip(shortened.model.parameters(), alone.model.parameters(), strict=True))


def test_two_parts_that_shorten_are_asked_one_on_the_others_step(stream: Stream) -> None:
    learner = toy_learner(stream, defence=chain(BoundUpdate(clip_norm=0.5), BoundUpdate(clip_norm=0.01)), lr=5.0)
    assert learner.update(stream.victim_batch(0, 0)).update_norm == pytest.approx(0.01, rel=1e-3)


class Judging(Defence):
    """Writes down how long the step is that it is asked about, and refuses those up to a length."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL})

    def __init__(self, refuses: float = 0.0, log: list[str] | None = None, name: str = "") -> None:
        self.lengths: list[float] = []
        self.committed_at: list[Tensor] = []
        self.refuses, self.log, self.name = refuses, log if log is not None else [], name

    def admit(self, before: Weights, view: View) -> Verdict:
        now = view.model.module.named_parameters()
        step = torch.cat([(p - before.parameters[name]).detach().flatten() for name, p in now])
        self.lengths.append(float(step.norm()))
        self.log.append(self.name)
        return Verdict(admit=self.lengths[-1] > self.refuses, reason=self.name)

    def committed(self, view: View) -> None:
        self.committed_at.append(torch.cat([p.detach().flatten() for p in view.model.module.parameters()]))


def test_a_part_before_one_that_shortens_is_asked_again_about_the_shorter_step(stream: Stream) -> None:
    first, last = Judging(), Judging()
    learner = toy_learner(stream, defence=made_of(first, BoundUpdate(clip_norm=0.01), last), lr=5.0)
    done = learner.update(stream.victim_batch(0, 0))
    assert first.lengths[0] > 1
    assert first.lengths[1:] == last.lengths == [pytest.approx(0.01, rel=1e-3)]
    reached = torch.cat([p.detach().flatten() for p in learner.model.parameters()])
    assert torch.equal(first.committed_at[0], reached)
    assert done.update_norm == pytest.approx(0.01, rel=1e-3)


def test_whoever_judged_a_longer_step_is_asked_again_however_many_shorten_it(stream: Stream) -> None:
    log: list[str] = []
    parts = [Judging(log=log, name=name) for name in "abc"]
    bounds = [BoundUpdate(clip_norm=0.5), BoundUpdate(clip_norm=0.01)]
    learner = toy_learner(stream, defence=made_of(parts[0], bounds[0], parts[1], bounds[1], parts[2]), lr=5.0)
    done = learner.update(stream.victim_batch(0, 0))
    assert [part.lengths[-1] for part in parts] == [pytest.approx(0.01, rel=1e-3)] * 3
    assert "".join(log) == "abcab"
    assert done.verdict.reason == "a; b; c"  # each once


def test_a_refusal_of_the_shorter_step_counts(stream: Stream) -> None:
    """A part that liked the long step and not the short one."""
    learner = toy_learner(stream, defence=made_of(Judging(refuses=0.1), BoundUpdate(clip_norm=0.01)), lr=5.0)
    before = learner.snapshot()
    assert not learner.update(stream.victim_batch(0, 0)).verdict.admit
    assert all(torch.equal(t, before.parameters[name]) for name, t in learner.model.named_parameters())


def test_parts_that_shorten_whatever_they_see_are_asked_to_once(stream: Stream) -> None:
    class Halving(Defence):
        needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL})

        def admit(self, before: Weights, view: View) -> Verdict:
            now = dict(view.model.module.named_parameters())
            return Verdict(admit=True, parameters={n: torch.lerp(before.parameters[n], now[n], 0.5) for n in now})

    judge = Judging()
    learner = toy_learner(stream, defence=made_of(Halving(), judge, Halving()))
    done = learner.update(stream.victim_batch(0, 0))
    whole = toy_learner(stream).update(stream.victim_batch(0, 0)).update_norm
    assert done.update_norm == pytest.approx(whole / 4, rel=1e-3)
    assert judge.lengths == [pytest.approx(whole / 2, rel=1e-3), pytest.approx(whole / 4, rel=1e-3)]


def test_a_gate_before_a_bound_keeps_note_of_the_state_that_was_reached(stream: Stream) -> None:
    gate = Gate(max_loss_rise=1e9, max_accuracy_drop=1.0)
    learner = toy_learner(stream, defence=chain(gate, BoundUpdate(clip_norm=0.05)), lr=0.1)
    trusted = stream.trusted.all()
    for i in range(3):
        assert learner.update(stream.victim_batch(i, 0)).update_norm == pytest.approx(0.05, rel=1e-3)
        assert float(learner.memory[f"0.{KEPT}"][0]) == pytest.approx(learner.evaluate([trusted]).loss, rel=1e-6)


class Asked(Defence):
    """Notes that it was asked, and says what it was told to."""

    def __init__(self, admit: bool, name: str) -> None:
        self.verdict = Verdict(admit=admit, reason=name)
        self.times = 0

    def admit(self, before: Weights, view: View) -> Verdict:
        self.times += 1
        return self.verdict


def test_the_first_refusal_wins_and_everything_is_rolled_back(stream: Stream) -> None:
    parts = [BoundUpdate(clip_norm=1e-3), Asked(True, "a"), Asked(False, "b"), Asked(False, "c")]
    learner = toy_learner(stream, defence=made_of(*parts))
    before = {name: t.clone() for name, t in learner.model.state_dict().items()}
    done = learner.update(stream.victim_batch(0, 0))
    assert done.verdict == Verdict(admit=False, reason="b")
    assert [part.times for part in parts if isinstance(part, Asked)] == [1, 1, 0]
    assert all(torch.equal(t, before[name]) for name, t in learner.model.state_dict().items())
    assert learner.optimiser.state_dict()["state"] == {}


def test_reasons_of_parts_that_admit_are_joined(stream: Stream) -> None:
    learner = toy_learner(stream, defence=made_of(Asked(True, "a"), Asked(True, ""), Asked(True, "b")))
    assert learner.update(stream.victim_batch(0, 0)).verdict == Verdict(admit=True, reason="a; b")


class Turns(Defence):
    """Admits and refuses as it was told to."""

    def __init__(self, *admitted: bool) -> None:
        self.left = iter(admitted)

    def admit(self, before: Weights, view: View) -> Verdict:
        return Verdict(admit=next(self.left), reason="")


def test_neither_average_nor_window_meets_a_step_that_a_later_part_refused(stream: Stream) -> None:
    """`ema` and `skip` stand before it; their notes after a refusal are those of a learner that never saw the step."""
    good, bad = stream.victim_batch(0, 0), stream.victim_batch(1, 0)
    notes = []
    for turns in ((True, True), (False, False, True, False, True)):
        learner = toy_learner(stream, defence=made_of(Skip(warmup=50), Ema(decay=0.5), Turns(*turns)))
        for admitted in turns:
            assert learner.update(good if admitted else bad).verdict.admit is admitted
        notes.append({k: t for k, t in learner.memory.items() if k.startswith(("0.", "1.")) and "pending" not in k})
    assert notes[0].keys() == notes[1].keys()
    assert all(torch.equal(tensor, notes[1][key]) for key, tensor in notes[0].items())


# Notes and views.


def test_two_parts_of_a_kind_keep_their_notes_apart(stream: Stream) -> None:
    both = toy_learner(stream, defence=chain(Ema(decay=0.5), Ema(decay=0.9)))
    learn(both, stream, range(3))
    for index, decay in enumerate((0.5, 0.9)):
        alone = toy_learner(stream, defence=Ema(decay=decay))
        learn(alone, stream, range(3))
        own = {key.removeprefix(f"{index}."): t for key, t in both.memory.items() if key.startswith(f"{index}.")}
        assert own.keys() == alone.memory.keys()
        assert all(torch.equal(own[key], alone.memory[key]) for key in own)
    weights = both.defence.serve(both.view())
    assert weights is not None
    assert weights.label == "average with decay 0.9"  # the last one that serves


def test_with_more_than_ten_parts_notes_still_have_one_owner(stream: Stream) -> None:
    learner = toy_learner(stream, defence=chain(*[Standard()] * 1, Skip(), *[Standard()] * 9, Skip(window=7)))
    learn(learner, stream, range(3))
    assert {key.partition(".")[0] for key in learner.memory} == {"1", "11"}
    assert len(learner.memory["1.window"]) == len(learner.memory["11.window"]) == 3


def test_what_a_part_forgets_is_forgotten() -> None:
    class Forgetting(Defence):
        def screen(self, batch: Batch, view: View) -> Screened:
            view.memory.pop("a") if "a" in view.memory else view.memory.update(a=torch.ones(()))
            return Screened(batch)

    memory: dict[str, Tensor] = {"other": torch.zeros(())}
    made, batch = made_of(Forgetting()), Batch(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64))
    made.screen(batch, View(0, memory))
    assert set(memory) == {"other", "0.a"}
    made.screen(batch, View(0, memory))
    assert set(memory) == {"other"}


def test_each_part_sees_only_what_it_declares(stream: Stream) -> None:
    class Peeking(Defence):
        def screen(self, batch: Batch, view: View) -> Screened:
            return Screened(view.trusted)

    made = made_of(Gate(), Peeking())
    assert Need.TRUSTED in made.needs
    with pytest.raises(ThreatModelError, match="Peeking looked at the trusted set"):
        toy_learner(stream, defence=made).update(stream.victim_batch(0, 0))


def test_needs_are_those_of_all_parts() -> None:
    assert chain().needs == frozenset()
    assert chain(Clip(), Skip()).needs == frozenset()
    assert chain(Clip(), BoundUpdate()).needs == {Need.MODEL}
    assert chain(Ema(), chain(Gate())).needs == {Need.MODEL, Need.TRUSTED}
    assert Chain.needs == frozenset()  # of the class: nothing, since it depends on the parts


def test_lookback_is_the_largest() -> None:
    class Looking(Defence):
        @property
        def lookback(self) -> int:
            return 7

    assert chain(Clip(), Ema()).lookback == 0
    assert made_of(Standard(), Looking(), Standard()).lookback == 7


def test_a_batch_that_one_part_empties_reaches_no_other(stream: Stream) -> None:
    class Dropping(Defence):
        def screen(self, batch: Batch, view: View) -> Screened:
            return Screened(batch.take(slice(0)), torch.ones(batch.size, dtype=torch.bool))

    class Averaging(Defence):
        def screen(self, batch: Batch, view: View) -> Screened:
            assert len(batch.x)
            return Screened(batch)

    done = toy_learner(stream, defence=made_of(Averaging(), Dropping(), Averaging())).update(stream.victim_batch(0, 0))
    assert done.learned == 0


class Raising(Defence):
    """Corrects the first samples (their inputs become ones), or drops them."""

    def __init__(self, n: int, drops: bool) -> None:
        self.n, self.drops = n, drops

    def screen(self, batch: Batch, view: View) -> Screened:
        first = torch.arange(batch.size) < self.n
        return Screened(batch.take(~first) if self.drops else Batch(batch.x + first.view(-1, 1), batch.y), first)


def test_flags_of_all_parts_are_over_the_batch_as_received() -> None:
    """Corrected, then some dropped, then corrected again: each sample is flagged where it stood at first."""
    batch = Batch(torch.zeros(6, 1), torch.arange(6))
    screened = made_of(Raising(3, drops=False), Raising(2, drops=True), Raising(1, drops=False)).screen(batch, View())
    assert screened.flagged is not None
    assert screened.flagged.tolist() == [True, True, True, False, False, False]
    assert screened.batch.y.tolist() == [2, 3, 4, 5]
    assert screened.batch.x.flatten().tolist() == [2.0, 0.0, 0.0, 0.0]


def test_a_correction_before_a_filter_that_drops_others_is_learned_from(stream: Stream) -> None:
    class Brighter(Raising):
        def screen(self, batch: Batch, view: View) -> Screened:
            return Screened(Batch((batch.x + 0.1).clamp(0, 1), batch.y), torch.ones(batch.size, dtype=torch.bool))

    done = toy_learner(stream, defence=made_of(Brighter(0, False), Raising(4, drops=True))).update(
        stream.victim_batch(0, 0)
    )
    assert done.learned == 16
    assert done.flagged is not None
    assert bool(done.flagged.all())


def test_a_part_that_drops_some_and_flags_more_cannot_be_followed(stream: Stream) -> None:
    class Both(Raising):
        def screen(self, batch: Batch, view: View) -> Screened:
            return Screened(batch.take(slice(3, None)), torch.arange(batch.size) < 5)

    alone = toy_learner(stream, defence=Both(0, False)).update(stream.victim_batch(0, 0))
    assert alone.learned == 17
    with pytest.raises(AssertionError, match="Both flags more samples than it drops"):
        toy_learner(stream, defence=made_of(Both(0, False), Standard())).update(stream.victim_batch(0, 0))


# The loss.


def test_one_part_may_change_the_loss_and_others_may_note_it(stream: Stream) -> None:
    with pytest.raises(ConfigError, match=r"part 0 \(median_bn\) and part 2 \(median_bn\)"):
        chain(MedianBn(), Clip(), MedianBn())
    with pytest.raises(ConfigError, match=r"part 0 \(median_bn\) and part 1 \(median_bn\)"):
        chain(MedianBn(), chain(MedianBn()))
    for parts in ((MedianBn(), Skip(warmup=50)), (Skip(warmup=50), chain(MedianBn()))):
        noting = toy_learner(stream, defence=chain(*parts))
        losses = [noting.update(stream.victim_batch(i, 0)).batch_loss for i in range(3)]
        alone = toy_learner(stream, defence=MedianBn())
        assert losses == [alone.update(stream.victim_batch(i, 0)).batch_loss for i in range(3)]
        assert all(torch.equal(a, b) for a, b in zip(noting.model.parameters(), alone.model.parameters(), strict=True))
        assert next(t for key, t in noting.memory.items() if key.endswith("window"))[:, 0].tolist() == losses


def test_a_part_that_only_notes_the_loss_does_not_run_the_model_again(stream: Stream) -> None:
    class Counting(Defence):
        calls = 0

        def loss(self, model: nn.Module, batch: Batch, criterion: Criterion, view: View) -> Tensor:
            Counting.calls += 1
            return 2 * criterion(model(batch.x), batch.y)

    learner = toy_learner(stream, defence=made_of(Skip(), Counting(), Skip()))
    passes = []
    learner.model.register_forward_hook(lambda *_: passes.append(1))
    learner.update(stream.victim_batch(0, 0))
    assert (Counting.calls, len(passes)) == (1, 1)
    assert float(learner.memory["0.window"][0, 0]) == float(learner.memory["2.window"][0, 0]) > 0


# Chains of chains.


def test_a_chain_among_the_parts_is_its_own_parts(stream: Stream) -> None:
    parts = (Clip(clip_norm=0.5), Skip(warmup=2), Gate(max_loss_rise=0.02), Ema(decay=0.5), BoundUpdate(clip_norm=0.1))
    flat = chain(*parts)
    nested = chain(parts[0], chain(parts[1], chain(*parts[2:4])), chain(), chain(parts[4]))
    assert nested == flat
    assert [part["name"] for part in nested.parts] == ["clip", "skip", "gate", "ema", "bound_update"]
    by_place = {"name": "mithridate.defences.chain:Chain", "parts": flat.parts}
    assert Chain(parts=(by_place,)) == flat
    assert (nested.needs, nested.lookback, hash(nested)) == (flat.needs, flat.lookback, hash(flat))
    assert rows(stream, nested) == rows(stream, flat)
    one, other = (toy_learner(stream, defence=defence) for defence in (flat, nested))
    assert learn(one, stream, range(6)) == learn(other, stream, range(6))
    assert one.memory.keys() == other.memory.keys()
    assert all(torch.equal(t, other.memory[key]) for key, t in one.memory.items())


# Tables.


def test_tables_of_a_recipe_build_it_and_come_back() -> None:
    text = 'name = "chain"\nparts = [{name = "clip", clip_norm = inf}, {name = "gate", reference = "best"}]'
    made = build("defence", tomllib.loads(text))
    assert made == chain(Clip(clip_norm=math.inf), Gate(reference="best"))
    assert hash(made) == hash(chain(Clip(clip_norm=math.inf), Gate(reference="best")))
    assert made != chain(Gate(reference="best"), Clip(clip_norm=math.inf))
    assert made.parts[1]["max_loss_rise"] == Gate().max_loss_rise  # completed with the defaults
    nested = chain(made, Ema())
    for one in (made, nested, chain()):
        again = build("defence", tomllib.loads(tomli_w.dumps(config_of(one))))
        assert again == one
        assert config_of(again) == config_of(one)
        for copied in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):  # noqa: S301  (our own bytes)
            assert copied == one
            assert copied.needs == one.needs


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"name": "clip", "clip_nrom": 1.0}, "part 1 clip: unknown key 'clip_nrom': did you mean 'clip_norm'"),
        ({"name": "clipp"}, "unknown defence 'clipp': did you mean 'clip'"),
        ({"clip_norm": 1.0}, "part 1 has no `name`"),
        ({"name": "clip", "clip_norm": -1.0}, "part 1 clip: clip_norm = -1.0"),
        ("clip", "parts.1 = 'clip'"),
        ({"name": "chain", "prats": []}, "part 1 chain: unknown key 'prats': did you mean 'parts'"),
        ({"name": "chain", "parts": ["clip"]}, "part 1 chain: parts.0 = 'clip'"),
        ({"name": "chain", "parts": [{"name": "clip", "clip_norm": -1.0}]}, "part 0 clip: clip_norm = -1.0"),
    ],
)
def test_a_wrong_part_is_named(part: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build("defence", {"name": "chain", "parts": [{"name": "gate"}, part]})
    assert message in str(caught.value)


def test_a_part_that_no_recipe_could_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="Asked is not a registered component"):
        chain(Asked(True, "a"))


def test_the_errors_of_parts_come_through_and_leave_no_step(stream: Stream) -> None:
    trusted = stream.trusted.all()
    learner = toy_learner(stream, defence=chain(Clip(), Gate()))
    learner.trusted = Batch(trusted.x[trusted.y == 0], trusted.y[trusted.y == 0])
    with pytest.raises(DataError, match="one class"):
        learner.update(stream.victim_batch(0, 0))
    assert learner.step == 0


@pytest.mark.parametrize("cut", [1, 3])
def test_a_resumed_learner_goes_on_with_the_same_bits(stream: Stream, cut: int) -> None:
    defence = chain(Skip(warmup=1, threshold=2.0), Clip(clip_norm=2.0), Ema(), Gate(max_loss_rise=0.02))
    whole = toy_learner(stream, defence=defence)
    early = learn(whole, stream, range(cut))
    resumed = toy_learner(stream, defence=build("defence", config_of(defence)))
    resumed.restore(whole.snapshot())
    resumed.memory = {key: tensor.clone() for key, tensor in whole.memory.items()}
    late = learn(whole, stream, range(cut, 8))
    assert late == learn(resumed, stream, range(cut, 8))
    assert len({verdict.admit for verdict in early + late}) == 2
    assert whole.memory.keys() == resumed.memory.keys()
    assert all(torch.equal(whole.memory[key], tensor) for key, tensor in resumed.memory.items())
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    assert whole.evaluate([stream.test.all()]) == resumed.evaluate([stream.test.all()])
