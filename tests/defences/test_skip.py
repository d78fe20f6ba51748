"""Skipping outliers: nothing moves, the window holds what it should, and what each choice gives an attacker."""

import math
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW

from mithridate.core.batch import Batch
from mithridate.core.defence import Verdict
from mithridate.core.errors import ConfigError
from mithridate.core.past import Weights
from mithridate.core.registry import build
from mithridate.core.updates import Updates
from mithridate.core.view import View
from mithridate.data.stream import Stream
from mithridate.defences.skip import LEAST_SPREAD, PENDING, WINDOW, Skip
from mithridate.testing import toy_learner, toy_stream
from mithridate.training.learner import Learner
from tests.defences.states import same, wrong


@pytest.mark.parametrize("optimiser", [SGD, AdamW])
@pytest.mark.parametrize("watch", ["loss", "gradient", "either"])
def test_an_outlying_batch_moves_no_bit(stream: Stream, optimiser: Any, watch: Any) -> None:
    learner = toy_learner(stream, defence=Skip(warmup=3, watch=watch))
    options: dict[str, Any] = {"momentum": 0.9} if optimiser is SGD else {}
    learner.optimiser = optimiser(learner.model.parameters(), lr=1e-3, weight_decay=0.1, **options)
    for i in range(4):
        assert learner.update(stream.victim_batch(i, 0)).verdict.admit
    before = learner.snapshot()
    assert before.optimiser["state"]
    done = learner.update(wrong(stream.victim_batch(4, 0)))
    assert not done.verdict.admit
    assert done.update_norm == 0
    assert same(learner.snapshot(), before)
    assert ("batch loss" in done.verdict.reason) is (watch != "gradient")
    assert ("gradient norm" in done.verdict.reason) is (watch != "loss")
    undisturbed = toy_learner(stream)
    undisturbed.optimiser = optimiser(undisturbed.model.parameters(), lr=1e-3, weight_decay=0.1, **options)
    for i in range(4):
        undisturbed.update(stream.victim_batch(i, 0))
    for each in (learner, undisturbed):
        assert each.update(stream.victim_batch(4, 0)).verdict.admit
    assert same(learner.snapshot(), undisturbed.snapshot())


def test_a_zero_gradient_would_have_moved_the_model(stream: Stream) -> None:
    """Why the veto is a roll-back: momentum and weight decay act on a gradient of zero too."""

    class Zeroing(Skip):
        def bound(self, updates: Updates, view: View) -> Updates:
            return updates.with_rows(torch.zeros_like(updates.rows))

    learner = toy_learner(stream)
    learner.update(stream.victim_batch(0, 0))
    learner.defence = Zeroing(threshold=math.inf)
    assert learner.update(stream.victim_batch(1, 0)).update_norm > 0.01


def feed(config: Skip, readings: list[tuple[float, float]]) -> list[bool]:
    """Admissions of a sequence of (loss, gradient norm), as a learner would ask for them."""
    memory: dict[str, Tensor] = {}
    step, out = 0, []
    for loss, norm in readings:
        row, losses = torch.tensor([[norm, 0.0]], dtype=torch.float64), torch.tensor([loss], dtype=torch.float64)
        before, after = View(step, memory), View(step + 1, memory)
        config.begin(before)
        config.bound(Updates(row, {"a": torch.Size([2])}, losses=losses), before)
        admitted = config.admit(Weights({}, {}), after).admit
        if admitted:
            config.committed(after)
        step += admitted
        out.append(admitted)
    return out


@pytest.mark.parametrize("robust", [True, False])
@pytest.mark.parametrize("remember", [True, False])
def test_verdicts_are_those_of_a_numpy_loop(robust: bool, remember: bool) -> None:
    rng = np.random.default_rng(0)
    losses = np.exp(rng.normal(0, 0.3, 200)) + 5 * (rng.random(200) < 0.1)
    norms = np.exp(rng.normal(1, 0.3, 200)) + 20 * (rng.random(200) < 0.1)
    config = Skip(window=20, threshold=3.0, warmup=6, robust=robust, remember_outliers=remember)
    expected: list[bool] = []
    window: list[Any] = []
    for reading in zip(losses, norms, strict=True):
        outlier = False
        if len(window) >= 6:
            for value, column in zip(reading, np.array(window[-20:]).T, strict=True):
                centre = np.median(column) if robust else column.mean()
                spread = 1.4826 * np.median(np.abs(column - centre)) if robust else column.std(ddof=1)
                outlier |= value - centre > 3 * max(spread, LEAST_SPREAD * centre)
        expected.append(not outlier)
        if remember or not outlier:
            window.append(reading)
    got = feed(config, [(float(a), float(b)) for a, b in zip(losses, norms, strict=True)])
    assert 5 < expected.count(False) < 60
    assert sum(a != b for a, b in zip(got, expected, strict=True)) == 0


def test_an_infinite_threshold_never_refuses_not_even_nan() -> None:
    readings = [(1.0, 1.0)] * 10 + [(1e30, 1e30), (math.nan, 1.0), (1.0, math.inf)]
    assert all(feed(Skip(threshold=math.inf, warmup=1), readings))
    assert feed(Skip(), readings)[-3:] == [False] * 3


def test_what_is_not_finite_is_refused_in_the_warm_up_and_never_remembered() -> None:
    config = Skip(warmup=3, remember_outliers=True)
    assert feed(config, [(math.nan, 1.0), (1.0, math.inf), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (9.0, 1.0)]) == [
        False,
        False,
        True,
        True,
        True,
        False,
    ]


def test_one_spike_in_the_window_blinds_the_mean_and_not_the_median() -> None:
    readings = [(1.0 + 0.01 * (i % 3), 1.0) for i in range(9)]
    spiked = [(50.0, 1.0), *readings, (40.0, 1.0)]  # the first came in the warm-up
    robust, plain = (feed(Skip(warmup=5, threshold=4.0, robust=robust), spiked) for robust in (True, False))
    assert not robust[-1]
    assert plain[-1]


def test_remembered_outliers_let_an_attacker_in_and_forgotten_ones_lock_a_changed_stream_out() -> None:
    """The trade that the docstring names, counted: with a window of 10, half a window of repeats opens the door."""
    readings = [(1.0 + 0.01 * (i % 3), 1.0) for i in range(10)] + [(5.0 + 0.01 * (i % 3), 1.0) for i in range(30)]
    opened = feed(Skip(window=10, robust=True, remember_outliers=True), readings)[10:]
    assert opened.index(True) in range(4, 8)
    assert all(opened[8:])
    assert not any(feed(Skip(window=10, robust=True), readings)[10:])
    assert not any(feed(Skip(window=10), readings)[10:])


def test_a_slow_ramp_walks_in() -> None:
    """The docstring's limitation: each reading a little above the last one is never an outlier."""
    noise = np.random.default_rng(0).normal(0, 0.05, 150)
    ramp = [(float(1 + 0.005 * i + noise[i]), 1.0) for i in range(150)]
    admitted = feed(Skip(window=20), ramp)
    assert sum(admitted) > 140
    assert not feed(Skip(window=20), [*ramp[:25], (ramp[-1][0], 1.0)])[-1]  # at once, it would have been refused


def test_a_step_that_another_defence_took_back_is_not_remembered(stream: Stream) -> None:
    class Undone(Skip):
        def admit(self, before: Weights, view: View) -> Verdict:
            super().admit(before, view)
            return Verdict(admit=False, reason="a later part")

    learner = toy_learner(stream, defence=Undone(warmup=1))
    for i in range(3):
        learner.update(stream.victim_batch(i, 0))
    assert WINDOW not in learner.memory
    learner.defence = Skip(warmup=50)
    for i in range(3):
        learner.update(stream.victim_batch(i, 0))
    assert len(learner.memory[WINDOW]) == 3
    assert PENDING not in learner.memory


def test_false_skips_on_a_clean_stream() -> None:
    """Of 40 clean batches, over five toy streams: few by mean and deviation, no fewer by medians."""
    refused: dict[bool, list[int]] = {True: [], False: []}
    for robust, counts in refused.items():
        for seed in range(5):
            stream = toy_stream(seed)
            learner = toy_learner(stream, seed=seed, defence=Skip(robust=robust), lr=1e-3)
            victim = stream.victim.all()
            admitted = 0
            for i in range(40):
                drawn = torch.randint(100, (20,), generator=torch.Generator().manual_seed(i))
                admitted += learner.update(Batch(victim.x[drawn], victim.y[drawn])).verdict.admit
            counts.append(40 - admitted)
    assert median(refused[False]) <= 4
    assert median(refused[False]) <= median(refused[True]) <= 16


def test_a_warm_up_that_never_ends_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"warmup = 9 .* window = 4"):
        build("defence", {"name": "skip", "window": 4, "warmup": 9})


@pytest.mark.parametrize("cut", [3, 5])
def test_a_resumed_learner_goes_on_with_the_same_bits(stream: Stream, cut: int) -> None:
    config = Skip(warmup=2, threshold=1.0, window=3)

    def learn(learner: Learner, steps: range) -> list[Verdict]:
        batches = [stream.victim_batch(i % 5, 0) for i in range(9)]
        batches[2], batches[6] = wrong(batches[2]), wrong(batches[6])
        return [learner.update(batches[i]).verdict for i in steps]

    whole = toy_learner(stream, defence=config)
    early = learn(whole, range(cut))
    resumed = toy_learner(stream, defence=config)
    resumed.restore(whole.snapshot())
    resumed.memory = {key: tensor.clone() for key, tensor in whole.memory.items()}
    late = learn(whole, range(cut, 9))
    assert late == learn(resumed, range(cut, 9))
    assert len({verdict.admit for verdict in early + late}) == 2
    assert same(whole.snapshot(), resumed.snapshot())
    assert all(torch.equal(whole.memory[key], tensor) for key, tensor in resumed.memory.items())
