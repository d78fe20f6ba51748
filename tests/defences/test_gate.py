"""The gate: a harmful step leaves no bit behind, a good one stays, and slow drift is what `reference` decides about."""

import math
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from mithridate.core.batch import Batch
from mithridate.core.defence import Verdict
from mithridate.core.errors import ConfigError, DataError
from mithridate.core.past import Weights
from mithridate.core.registry import build
from mithridate.core.view import View
from mithridate.data.stream import Stream
from mithridate.defences.gate import KEPT, Gate
from mithridate.testing import toy_learner, toy_stream
from mithridate.training.learner import Learner
from tests.defences.states import same, wrong


@pytest.mark.parametrize("optimiser", [SGD, AdamW])
def test_a_harmful_step_leaves_no_bit_behind_and_good_ones_stay(stream: Stream, optimiser: Any) -> None:
    learner = toy_learner(stream, defence=Gate(max_loss_rise=0.3, max_accuracy_drop=0.3))
    options: dict[str, Any] = {"momentum": 0.9} if optimiser is SGD else {}
    learner.optimiser = optimiser(learner.model.parameters(), lr=1e-4, weight_decay=0.01, **options)
    assert learner.update(stream.victim_batch(0, 0)).verdict.admit
    before = learner.snapshot()
    assert before.optimiser["state"]
    learner.optimiser.param_groups[0]["lr"] = 0.5
    raised = learner.snapshot()
    done = learner.update(wrong(stream.victim_batch(1, 0)))
    assert not done.verdict.admit
    assert "trusted loss" in done.verdict.reason
    assert "limit +0.3" in done.verdict.reason
    assert done.update_norm == 0
    assert same(learner.snapshot(), raised)
    learner.restore(before)
    assert learner.update(stream.victim_batch(2, 0)).verdict.admit
    assert not same(learner.snapshot(), before)


def test_either_limit_alone_refuses_and_says_why(stream: Stream) -> None:
    for gate, words in (
        (Gate(max_accuracy_drop=math.inf), "trusted loss"),
        (Gate(max_loss_rise=math.inf), "worst class's accuracy"),
    ):
        learner = toy_learner(stream, defence=gate, lr=0.5)
        done = learner.update(wrong(stream.victim_batch(0, 0)))
        assert not done.verdict.admit
        assert words in done.verdict.reason
        assert ";" not in done.verdict.reason


def test_false_vetoes_on_a_clean_stream_are_few() -> None:
    """Of five clean batches, on each of ten streams; forty trusted samples are few, and their worst class has less."""
    vetoes = []
    for seed in range(10):
        stream = toy_stream(seed)
        gated = toy_learner(stream, seed=seed, defence=Gate())
        vetoes.append(sum(not gated.update(stream.victim_batch(i, seed)).verdict.admit for i in range(5)))
    assert median(vetoes) <= 2


def test_what_was_measured_is_what_evaluate_measures(stream: Stream) -> None:
    """Loss and worst class of the committed state, against the learner's own evaluation and a loop over classes."""
    learner = toy_learner(stream, defence=Gate(max_loss_rise=10.0, max_accuracy_drop=1.0))
    learner.update(stream.victim_batch(0, 0))
    trusted = stream.trusted.all()
    loss, worst = learner.memory[KEPT].tolist()[:2]
    assert loss == pytest.approx(learner.evaluate([trusted]).loss, rel=1e-6)
    accuracies = [
        learner.evaluate([Batch(trusted.x[trusted.y == label], trusted.y[trusted.y == label])]).accuracy
        for label in range(4)
    ]
    assert worst == pytest.approx(min(accuracies))


class Counting(nn.Module):
    """Counts the images that pass in eval mode."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 0 if self.training else len(x)
        out: Tensor = self.model(x)
        return out


def test_each_state_is_measured_once(stream: Stream) -> None:
    """The committed state is known from the step that made it, also after a roll-back; the first one is extra."""
    base = toy_learner(stream)
    model = Counting(base.model)
    learner = Learner(
        model, SGD(model.parameters(), lr=0.1, momentum=0.9), defence=Gate(), trusted=stream.trusted.all()
    )
    n = len(stream.trusted)
    verdicts = []
    for i, batch in enumerate([stream.victim_batch(i % 5, 0) for i in range(6)], start=1):
        verdicts.append(learner.update(wrong(batch) if i in {2, 3, 5} else batch).verdict.admit)
        assert model.seen == n * (i + 1)
    assert True in verdicts
    assert False in verdicts


def test_notes_belong_to_the_state_that_they_were_taken_of(stream: Stream) -> None:
    """Who puts a learner back puts its notes back too, or lets the gate measure anew."""
    learner = toy_learner(stream, defence=Gate(max_loss_rise=10.0, max_accuracy_drop=1.0))
    trusted = stream.trusted.all()
    learner.update(stream.victim_batch(0, 0))
    then, notes = learner.snapshot(), dict(learner.memory)
    learner.update(wrong(stream.victim_batch(1, 0)))
    assert not torch.equal(learner.memory[KEPT], notes[KEPT])
    learner.restore(then)
    learner.memory = dict(notes)
    learner.defence = Gate(max_loss_rise=10.0, max_accuracy_drop=1.0, reference="start")
    learner.update(stream.victim_batch(2, 0))
    assert torch.equal(learner.memory["start"], notes[KEPT])
    with torch.no_grad():
        next(learner.model.parameters()).mul_(1.5)
    learner.memory.clear()
    expected = learner.evaluate([trusted]).loss
    learner.update(stream.victim_batch(3, 0))
    assert float(learner.memory["start"][0]) == pytest.approx(expected, rel=1e-6)


class Undoing(Gate):
    """A gate whose admitted steps somebody else takes back."""

    def admit(self, before: Weights, view: View) -> Verdict:
        super().admit(before, view)
        return Verdict(admit=False, reason="a later part")


def test_best_and_start_are_never_fed_with_a_step_that_was_taken_back(stream: Stream) -> None:
    for reference in ("best", "start"):
        learner = toy_learner(stream, defence=Undoing(reference=reference))
        first = learner.evaluate([stream.trusted.all()]).loss
        for i in range(4):
            learner.update(stream.victim_batch(i, 0))
        assert float(learner.memory[reference][0]) == pytest.approx(first, rel=1e-6)


def test_slow_drift_passes_the_previous_state_and_not_the_best_or_the_first(stream: Stream) -> None:
    """Every step of an attacker who knows the tolerance stays inside it; only a fixed reference bounds their sum."""
    rise = {}
    for reference in ("previous", "best", "start"):
        gate = Gate(max_loss_rise=0.1, max_accuracy_drop=math.inf, reference=reference)
        learner = toy_learner(stream, defence=gate)
        learner.optimiser = SGD(learner.model.parameters(), lr=0.002)
        trusted = stream.trusted.all()
        first = learner.evaluate([trusted]).loss
        for i in range(60):
            learner.update(wrong(stream.victim_batch(i % 5, 0)))
        rise[reference] = learner.evaluate([trusted]).loss - first
    assert rise["previous"] > 0.5
    assert -0.2 < rise["best"] <= 0.1
    assert -0.2 < rise["start"] <= 0.1


def test_the_paired_test_refuses_what_shows_and_with_a_fixed_reference_bounds_a_slow_slide(stream: Stream) -> None:
    """No single step of the slide loses as many samples as the test would notice."""
    slid = {}
    for reference in ("previous", "best"):
        paired = build("defence", {"name": "gate", "preset": "paired", "reference": reference})
        learner = toy_learner(stream, defence=paired, lr=0.5)
        assert learner.update(stream.victim_batch(0, 0)).verdict.admit
        refused = learner.update(wrong(stream.victim_batch(1, 0))).verdict
        assert not refused.admit
        assert "trusted samples: " in refused.reason
        assert " lost, " in refused.reason
        learner = toy_learner(stream, defence=paired)
        learner.optimiser = SGD(learner.model.parameters(), lr=0.002)
        start = learner.evaluate([stream.trusted.all()]).accuracy
        for i in range(60):
            learner.update(wrong(stream.victim_batch(i % 5, 0)))
        slid[reference] = start - learner.evaluate([stream.trusted.all()]).accuracy
    assert slid["previous"] > 0.5
    assert slid["best"] <= 0.2


def test_a_refusal_may_empty_the_optimiser_so_that_poison_does_not_refuse_clean_steps(stream: Stream) -> None:
    """The momentum of one poisoned step is far longer than a clean gradient: taken back with each step, it stays."""
    admitted = {}
    for forget in (False, True):
        gate = Gate(max_loss_rise=0.3, max_accuracy_drop=math.inf, forget_momentum=forget)
        learner = toy_learner(stream, defence=gate)
        learner.update(stream.victim_batch(0, 0))
        for state in learner.optimiser.state.values():
            state["momentum_buffer"] = 300 * state["momentum_buffer"].sign()
        before = learner.snapshot()
        verdicts = [learner.update(stream.victim_batch(i, 0)).verdict for i in range(1, 5)]
        assert not verdicts[0].admit
        admitted[forget] = [verdict.admit for verdict in verdicts]
        if not forget:
            assert same(learner.snapshot(), before)
    assert admitted == {False: [False] * 4, True: [False, True, True, True]}


def test_targets_that_are_never_hit_are_refused_where_hits_are_tested(stream: Stream) -> None:
    learner = toy_learner(stream, defence=Gate(level=0.01))
    trusted = stream.trusted.all()
    learner.trusted = Batch(trusted.x, torch.full((len(trusted.y), 4), 0.3))
    before = learner.snapshot()
    with pytest.raises(ConfigError, match="never hit"):
        learner.update(stream.victim_batch(0, 0))
    assert same(learner.snapshot(), before)


def test_trusted_samples_of_one_class_are_refused_before_any_step(stream: Stream) -> None:
    trusted = stream.trusted.all()
    learner = toy_learner(stream, defence=Gate())
    learner.trusted = Batch(trusted.x[trusted.y == 1], trusted.y[trusted.y == 1])
    before = learner.snapshot()
    with pytest.raises(DataError, match=r"one class.*at least two classes"):
        learner.update(stream.victim_batch(0, 0))
    assert same(learner.snapshot(), before)
    learner.defence = Gate(max_loss_rise=math.inf, max_accuracy_drop=math.inf)
    learner.update(stream.victim_batch(0, 0))  # off: nobody looks


def test_foreign_labels_are_refused_before_any_step(stream: Stream) -> None:
    learner = toy_learner(stream, defence=Gate())
    learner.trusted = Batch(stream.trusted.all().x, stream.trusted.all().y + 1)
    before = learner.snapshot()
    with pytest.raises(DataError, match=r"span \[1, 4\].*4 outputs"):
        learner.update(stream.victim_batch(0, 0))
    assert same(learner.snapshot(), before)


def test_classes_without_trusted_samples_do_not_count(stream: Stream) -> None:
    trusted = stream.trusted.all()
    keep = trusted.y < 2
    learner = toy_learner(stream, defence=Gate(max_loss_rise=10.0, max_accuracy_drop=1.0))
    learner.trusted = Batch(trusted.x[keep], trusted.y[keep])
    learner.update(stream.victim_batch(0, 0))
    worst = float(learner.memory[KEPT][1])
    per_class = [
        learner.evaluate([Batch(trusted.x[trusted.y == c], trusted.y[trusted.y == c])]).accuracy for c in (0, 1)
    ]
    assert worst == pytest.approx(min(per_class))


@pytest.mark.parametrize("size", [2, 5, 8, 39, 40, 1000])
def test_a_trusted_size_takes_equal_parts_of_every_class(stream: Stream, size: int) -> None:
    learner = toy_learner(stream, defence=Gate(trusted_size=size))
    kept = Gate(trusted_size=size)._trusted(learner.view())
    whole = stream.trusted.all()
    assert len(kept.y) == min(size, len(whole.y))
    available, taken = torch.bincount(whole.y, minlength=4), torch.bincount(kept.y, minlength=4)
    short = taken < available
    if size < len(whole.y):
        assert int(taken.max()) - int(taken[short].min()) <= 1
    again = Gate(trusted_size=size)._trusted(learner.view())
    assert torch.equal(kept.x, again.x)
    images = {image.numpy().tobytes(): int(label) for image, label in zip(whole.x, whole.y, strict=True)}
    assert all(images[image.numpy().tobytes()] == int(label) for image, label in zip(kept.x, kept.y, strict=True))
    assert len({image.numpy().tobytes() for image in kept.x}) == len(kept.y)


def test_a_model_that_diverges_is_refused(stream: Stream) -> None:
    learner = toy_learner(stream, defence=Gate(max_loss_rise=math.inf, max_accuracy_drop=1.0), lr=1e30)
    before = learner.snapshot()
    verdicts = [learner.update(stream.victim_batch(i, 0)).verdict for i in range(2)]
    assert not any(verdict.admit for verdict in verdicts)
    assert same(learner.snapshot(), before)


@pytest.mark.parametrize(("reference", "level"), [("previous", 0.0), ("best", 0.0), ("start", 0.0), ("best", 0.2)])
def test_a_resumed_learner_goes_on_with_the_same_bits(stream: Stream, reference: Any, level: float) -> None:
    gate = Gate(max_loss_rise=0.02, reference=reference, level=level, test="chances")
    batches = [stream.victim_batch(i, 0) for i in range(5)]
    batches[1] = wrong(batches[1])
    batches[4] = wrong(batches[4])
    whole = toy_learner(stream, defence=gate)
    for batch in batches[:3]:
        whole.update(batch)
    resumed = toy_learner(stream, defence=gate)
    resumed.restore(whole.snapshot())
    resumed.memory = {key: tensor.clone() for key, tensor in whole.memory.items()}
    verdicts = [[learner.update(batch).verdict for batch in batches[3:]] for learner in (whole, resumed)]
    assert verdicts[0] == verdicts[1]
    assert same(whole.snapshot(), resumed.snapshot())
    assert whole.memory.keys() == resumed.memory.keys()
    assert all(torch.equal(whole.memory[key], resumed.memory[key]) for key in whole.memory)


def test_room_for_noise_lets_a_noisy_stream_pass_and_not_a_batch_of_wrong_labels() -> None:
    """A limit of zero refuses half of the steps of any stream; with room for what is usual, the wrong batch alone."""
    refused: dict[float, list[int]] = {0.0: [], 5.0: []}
    caught = []
    for seed in range(5):
        for noise, counts in refused.items():
            stream = toy_stream(seed)
            gate = Gate(max_loss_rise=0.0, max_accuracy_drop=math.inf, noise=noise)
            learner = toy_learner(stream, defence=gate, lr=0.02)
            clean = [learner.update(stream.victim_batch(i % 4, i // 4)).verdict.admit for i in range(12)]
            counts.append(clean.count(False))
            if noise:
                learner.optimiser.param_groups[0]["lr"] = 0.5
                caught.append(not learner.update(wrong(stream.victim_batch(0, 9))).verdict.admit)
    assert median(refused[5.0]) <= median(refused[0.0])
    assert sum(refused[5.0]) < sum(refused[0.0])
    assert sum(caught) >= 4


def test_a_trusted_pass_in_bfloat16_says_nearly_the_same(stream: Stream) -> None:
    losses = []
    for precision in ("float32", "bfloat16"):
        learner = toy_learner(stream, defence=build("defence", {"name": "gate", "precision": precision}))
        learner.update(stream.victim_batch(0, 0))
        losses.append(float(learner.memory[KEPT][0]))
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) < 0.05 * losses[0]
