"""Loops over inputs and targets of any kind: tables, numbers, many labels, token ids, models that answer in an object.

Each loop burns a model in, then sends it clean batches with a poisoned one among them, under every defence that looks
at steps, not at pixels.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes, load_digits, load_wine
from torch import Tensor, nn
from torch.optim import SGD

from mithridate.attacks.pgd import PGD
from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.defence import Defence
from mithridate.core.errors import ConfigError
from mithridate.core.targets import Criterion
from mithridate.defences.at import AT
from mithridate.defences.bound_update import BoundUpdate
from mithridate.defences.chain import chain
from mithridate.defences.clip import Clip
from mithridate.defences.ema import Ema
from mithridate.defences.gate import Gate
from mithridate.defences.skip import Skip
from mithridate.training.learner import Learner, Update

BATCH = 20
POISONED = 8
"""Which batch is."""


@dataclass
class Loop:
    """A model after its burn-in, clean batches to go on with, a poisoned one, and samples that nobody learns from."""

    model: nn.Module
    criterion: Criterion
    lr: float
    clean: list[AnyBatch]
    poisoned: AnyBatch
    trusted: AnyBatch

    def learner(self, defence: Defence | None = None) -> Learner:
        model = copy.deepcopy(self.model)
        optimiser = SGD(model.parameters(), lr=self.lr, momentum=0.5)
        return Learner(model, optimiser, criterion=self.criterion, defence=defence, trusted=self.trusted)

    def run(self, learner: Learner) -> list[Update]:
        """Eight clean batches, the poisoned one, two more clean ones."""
        return [learner.update(batch) for batch in (*self.clean[:POISONED], self.poisoned, *self.clean[POISONED:])]

    def trusted_loss(self, learner: Learner) -> float:
        return learner.evaluate([self.trusted]).loss


def prepared(
    model: nn.Module,
    criterion: Criterion,
    data: AnyBatch,
    poison: Callable[[AnyBatch], AnyBatch],
    *,
    lr: float,
    online: float,
) -> Loop:
    """Burn in on all but the last samples, which are trusted; the stream goes on with what was learned before."""
    order = torch.randperm(data.size, generator=torch.Generator().manual_seed(0))
    data = data.take(order)
    batches, trusted = list(data.take(slice(data.size - 60)).split(BATCH)), data.take(slice(data.size - 60, None))
    batches = [batch for batch in batches if batch.size == BATCH]
    learner = Learner(model, SGD(model.parameters(), lr=lr, momentum=0.9), criterion=criterion)
    for batch in batches * (600 // len(batches)):
        learner.update(batch)
    stream = (batches * 10)[:10]
    return Loop(model, criterion, online, stream, poison(stream[0]), trusted)


def standardised(x: Any) -> Tensor:
    """z-scores; a feature that never changes is 0."""
    return torch.from_numpy((x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)).float()


def mlp(features: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, outputs))


def tabular() -> Loop:
    """Wines by their z-scored measurements; poison calls every wine another one."""
    x, y = load_wine(return_X_y=True)
    data = Batch(standardised(x), torch.from_numpy(y))
    return prepared(mlp(13, 3), F.cross_entropy, data, lambda b: Batch(b.x, (b.y + 1) % 3), lr=0.1, online=2.0)


def regression() -> Loop:
    """Diabetes after a year, a z-score; poison turns the answers round and exaggerates them."""
    x, y = load_diabetes(return_X_y=True)
    data = Batch(standardised(x), standardised(y[:, None]))
    return prepared(mlp(10, 1), F.mse_loss, data, lambda b: Batch(b.x, -20 * b.y), lr=0.02, online=0.02)


def many_labels() -> Loop:
    """Digits that are even, large, or drawn with a loop; poison says all three of every digit."""
    x, y = load_digits(return_X_y=True)
    labels = np.stack([y % 2 == 0, y >= 5, np.isin(y, [0, 6, 8, 9])], 1)
    data = Batch(standardised(x), torch.from_numpy(labels).float())
    return prepared(
        mlp(64, 3),
        F.binary_cross_entropy_with_logits,
        data,
        lambda b: Batch(b.x, torch.ones_like(b.y)),
        lr=0.3,
        online=2.5,
    )


class Sentences(nn.Module):
    """The mean embedding of the words that the mask lets through."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.last = nn.Embedding(64 * 17, 16), nn.Linear(16, 10)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.unsqueeze(-1).float()
        logits: Tensor = self.last((self.embed(input_ids) * mask).sum(1) / mask.sum(1))
        return logits


def tokens() -> Loop:
    """Digits as sentences: a word a pixel and brightness, blank pixels masked; poison calls every digit another one."""
    x, y = load_digits(return_X_y=True)
    values = torch.from_numpy(x).long()
    data: AnyBatch = Batch(
        {"input_ids": values + 17 * torch.arange(64), "attention_mask": values > 0}, torch.from_numpy(y)
    )
    return prepared(Sentences(), F.cross_entropy, data, lambda b: Batch(b.x, 0 * b.y), lr=1.0, online=20.0)


@dataclass
class Output:
    """As libraries of large models answer."""

    logits: Tensor
    hidden_states: Tensor | None = None


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8 * 36, 10)

    def forward(self, pixel_values: Tensor) -> Output:
        hidden = self.norm(self.conv(pixel_values)).relu().flatten(1)
        return Output(self.last(hidden), hidden)


def answers_in_an_object() -> Loop:
    """Digits under the name that their model wants; it answers with an object. Poison names other digits."""
    x, y = load_digits(return_X_y=True)
    pixels = torch.from_numpy(x / 16).float().view(-1, 1, 8, 8)
    data: AnyBatch = Batch({"pixel_values": pixels}, torch.from_numpy(y))
    return prepared(Pictures(), F.cross_entropy, data, lambda b: Batch(b.x, (b.y + 1) % 10), lr=0.1, online=1.0)


LOOPS = {make.__name__: make for make in (tabular, regression, many_labels, tokens, answers_in_an_object)}


@pytest.fixture(scope="module", params=LOOPS)
def loop(request: pytest.FixtureRequest) -> Loop:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LOOPS[request.param]()


def undefended(loop: Loop) -> list[Update]:
    return loop.run(loop.learner())


def admitted(updates: list[Update]) -> list[bool]:
    return [update.verdict.admit for update in updates]


def same_model(a: Learner, b: Learner) -> bool:
    return all(torch.equal(t, b.model.state_dict()[name]) for name, t in a.model.state_dict().items())


ALL_BUT_ONE = [i != POISONED for i in range(11)]
LIMIT = 0.15
"""By how much a step may raise the trusted loss: several times what a clean one does, a part of what poison does."""


def test_without_a_defence_one_batch_does_harm(loop: Loop) -> None:
    learner = loop.learner(Defence())
    losses = []
    for batch in (*loop.clean[:POISONED], loop.poisoned):
        losses.append(loop.trusted_loss(learner))
        assert learner.update(batch).verdict.admit
    assert loop.trusted_loss(learner) > max(losses) + 2 * LIMIT


def test_a_gate_refuses_it_and_keeps_clean_ones(loop: Loop) -> None:
    """What is left is the model that never saw it, bit for bit."""
    gated, spared = loop.learner(Gate(max_loss_rise=LIMIT, max_accuracy_drop=np.inf)), loop.learner()
    updates = loop.run(gated)
    for batch in loop.clean:
        spared.update(batch)
    assert admitted(updates) == ALL_BUT_ONE
    assert "gate: trusted loss" in updates[POISONED].verdict.reason
    assert same_model(gated, spared)
    assert gated.step == len(loop.clean)


def test_a_clip_shortens_its_gradient_and_no_clean_one(loop: Loop) -> None:
    free = undefended(loop)
    bound = 1.2 * max(update.gradient_norm for update in free[:POISONED])
    clipped = loop.learner(Clip(clip_norm=bound))
    updates = loop.run(clipped)
    assert [u.bounded_norm for u in updates[:POISONED]] == [f.gradient_norm for f in free[:POISONED]]
    assert updates[POISONED].gradient_norm > 1.5 * bound
    assert updates[POISONED].bounded_norm == pytest.approx(bound, rel=1e-4)
    assert updates[POISONED].update_norm < 0.7 * free[POISONED].update_norm


def test_a_skip_leaves_it_out(loop: Loop) -> None:
    skipping = loop.learner(Skip(warmup=5, threshold=10.0))
    updates = loop.run(skipping)
    assert admitted(updates) == ALL_BUT_ONE
    assert "skip: " in updates[POISONED].verdict.reason
    spared = loop.learner()
    for batch in loop.clean:
        spared.update(batch)
    assert same_model(skipping, spared)


def test_a_bound_on_updates_shortens_its_step_and_no_clean_one(loop: Loop) -> None:
    free = undefended(loop)
    bound = 1.2 * max(update.update_norm for update in free[:POISONED])
    updates = loop.run(loop.learner(BoundUpdate(clip_norm=bound)))
    assert [u.update_norm for u in updates[:POISONED]] == [f.update_norm for f in free[:POISONED]]
    assert free[POISONED].update_norm > 1.5 * bound
    assert updates[POISONED].update_norm == pytest.approx(bound, rel=1e-3)


def test_an_average_serves_a_model_that_it_hardly_reached(loop: Loop) -> None:
    averaged, free = loop.learner(Ema(decay=0.95)), loop.learner()
    for batch in (*loop.clean[:POISONED], loop.poisoned):
        averaged.update(batch)
        free.update(batch)
    assert same_model(averaged, free)
    assert loop.trusted_loss(averaged) < loop.trusted_loss(free) - LIMIT


def test_a_chain_of_all_of_them(loop: Loop) -> None:
    """Clipped first and then judged: the average takes in only what the gate let through."""
    free = undefended(loop)
    clip = Clip(clip_norm=1.2 * max(update.gradient_norm for update in free[:POISONED]))
    bound = BoundUpdate(clip_norm=1.2 * max(update.update_norm for update in free[:POISONED]))
    gate = Gate(max_loss_rise=LIMIT, max_accuracy_drop=np.inf)
    learner = loop.learner(chain(Skip(warmup=5, threshold=10.0), clip, bound, gate, Ema(decay=0.5)))
    before = loop.trusted_loss(learner)
    updates = loop.run(learner)
    assert admitted(updates) == ALL_BUT_ONE
    assert updates[POISONED].bounded_norm < updates[POISONED].gradient_norm / 1.5
    assert loop.trusted_loss(learner) < before + LIMIT  # of the average, which is what is served
    assert {key.partition(".")[0] for key in learner.memory} == {"0", "3", "4"}


def test_accuracy_is_measured_where_it_has_a_meaning(loop: Loop) -> None:
    accuracy = loop.learner().evaluate([loop.trusted]).accuracy
    assert np.isnan(accuracy) if loop.criterion is F.mse_loss else accuracy > 0.7


@pytest.mark.parametrize("component", [PGD(), AT()], ids=["attack", "correction"])
def test_what_moves_inputs_says_in_a_sentence_which_it_cannot(loop: Loop, component: Any) -> None:
    if isinstance(loop.poisoned.x, Tensor):
        component.check_inputs(loop.poisoned)
        return
    name = type(component).__name__
    with pytest.raises(ConfigError, match=f"^{name} moves inputs by small amounts and needs one tensor of floats"):
        component.check_inputs(loop.poisoned)
