"""Chains: order, notes kept apart, one part that is the part itself, and what a recipe may say."""

import copy
import math
import pickle
import tomllib
from typing import Any

import pytest
import tomli_w
import torch
from torch import Tensor, nn

from mithridate.attacks.noise import Noise
from mithridate.core.batch import Batch
from mithridate.core.defence import Defence, Verdict
from mithridate.core.errors import ConfigError, DataError, ThreatModelError
from mithridate.core.model import Criterion, Snapshot
from mithridate.core.registry import build, config_of
from mithridate.core.updates import Updates
from mithridate.core.view import Need, View
from mithridate.data.stream import Stream
from mithridate.defences.bound_update import BoundUpdate
from mithridate.defences.chain import Chain, chain
from mithridate.defences.clip import Clip
from mithridate.defences.ema import Ema
from mithridate.defences.gate import Gate
from mithridate.defences.median_bn import MedianBn
from mithridate.defences.none import Standard
from mithridate.defences.skip import Skip
from mithridate.simulation.online import OnlineRun, run_online
from mithridate.testing import toy_learner, toy_stream
from mithridate.training.learner import Learner

TIMES = {"seconds", "craft_seconds", "update_seconds"}
PARTS: dict[str, Defence] = {
    "none": Standard(),
    "clip": Clip(clip_norm=0.1),
    "gate": Gate(max_loss_rise=0.01),
    "ema": Ema(decay=0.8),
    "skip": Skip(warmup=1, threshold=0.0),
    "bound_update": BoundUpdate(clip_norm=0.01),
    "median_bn": MedianBn(),
}


@pytest.fixture(scope="module")
def stream() -> Stream:
    return toy_stream(0)


def rows(stream: Stream, defence: Defence | None) -> list[dict[str, Any]]:
    learner = toy_learner(stream, defence=defence)
    outcome = run_online(learner, stream, Noise(eps=0.3), OnlineRun(steps=4, images=0))
    return [{k: v for k, v in row.items() if k not in TIMES} for row in outcome.trace]


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


class Asked(Defence):
    """Notes that it was asked, and says what it was told to."""

    def __init__(self, admit: bool, name: str) -> None:
        self.verdict = Verdict(admit=admit, reason=name)
        self.times = 0

    def admit(self, before: Snapshot, view: View) -> Verdict:
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


def test_neither_average_nor_window_meets_a_step_that_a_later_gate_refused(stream: Stream) -> None:
    """`ema` and `skip` stand before the gate; their notes after a refusal are those of a learner that never saw it."""
    defence = chain(Skip(warmup=50), Ema(decay=0.5), Gate(max_loss_rise=0.05, max_accuracy_drop=math.inf))
    good, bad = stream.victim_batch(0, 0), stream.victim_batch(1, 0)
    bad = Batch(bad.x, (bad.y + 1) % 4)
    notes, verdicts = [], []
    for batches in ([good, good], [bad, bad, good, bad, good]):
        learner = toy_learner(stream, defence=defence, lr=0.1)
        verdicts.append([learner.update(batch).verdict.admit for batch in batches])
        learner.defence.screen(good, learner.view())
        notes.append({k: t for k, t in learner.memory.items() if k.startswith(("0.", "1.")) and "pending" not in k})
    assert verdicts == [[True, True], [False, False, True, False, True]]
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
    assert len(learner.memory["1.window"]) == len(learner.memory["11.window"]) == 2


def test_what_a_part_forgets_is_forgotten() -> None:
    class Forgetting(Defence):
        def screen(self, batch: Batch, view: View) -> Batch:
            view.memory.pop("a") if "a" in view.memory else view.memory.update(a=torch.ones(()))
            return batch

    memory: dict[str, Tensor] = {"other": torch.zeros(())}
    made, batch = made_of(Forgetting()), Batch(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64))
    made.screen(batch, View(0, memory))
    assert set(memory) == {"other", "0.a"}
    made.screen(batch, View(0, memory))
    assert set(memory) == {"other"}


def test_each_part_sees_only_what_it_declares(stream: Stream) -> None:
    class Peeking(Defence):
        def screen(self, batch: Batch, view: View) -> Batch:
            return view.trusted

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
        def screen(self, batch: Batch, view: View) -> Batch:
            return Batch(batch.x[:0], batch.y[:0])

    class Averaging(Defence):
        def screen(self, batch: Batch, view: View) -> Batch:
            assert len(batch.x)
            return batch

    done = toy_learner(stream, defence=made_of(Averaging(), Dropping(), Averaging())).update(stream.victim_batch(0, 0))
    assert done.learned == 0


# The loss.


def test_one_part_may_change_the_loss_and_others_may_note_it(stream: Stream) -> None:
    with pytest.raises(ConfigError, match=r"part 0 \(median_bn\) and part 2 \(median_bn\)"):
        chain(MedianBn(), Clip(), MedianBn())
    with pytest.raises(ConfigError, match=r"part 0 \(median_bn\) and part 1 \(chain\)"):
        chain(MedianBn(), chain(MedianBn()))
    for parts in ((MedianBn(), Skip(warmup=50)), (Skip(warmup=50), chain(MedianBn()))):
        noting = toy_learner(stream, defence=chain(*parts))
        losses = [noting.update(stream.victim_batch(i, 0)).batch_loss for i in range(3)]
        alone = toy_learner(stream, defence=MedianBn())
        assert losses == [alone.update(stream.victim_batch(i, 0)).batch_loss for i in range(3)]
        assert all(torch.equal(a, b) for a, b in zip(noting.model.parameters(), alone.model.parameters(), strict=True))
        assert next(t for key, t in noting.memory.items() if key.endswith("window"))[:, 0].tolist() == losses[:2]


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
    assert float(learner.memory["0.pending"][0]) == float(learner.memory["2.pending"][0])


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
