"""Small learners and what can be granted beside them: where components are tried."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.domain import Domain
from mithridate.core.past import Weights
from mithridate.core.seeding import generator, seeded_default
from mithridate.core.targets import Criterion
from mithridate.core.view import Memory, Need, View
from mithridate.data.stream import Stream
from mithridate.simulation.trace import TraceRow
from mithridate.testing.toy import toy_learner, toy_stream
from mithridate.training.history import History
from mithridate.training.learner import Learner

SAMPLES, VALIDATION = 8, 20
"""In a batch where a component is tried, and in the attacker's S_val: few, since there are many settings to try."""

FEATURES, CLASSES, ROWS = 6, 3, 24


@dataclass(frozen=True)
class World:
    """A learner, and what comes its way.

    Args:
        learner: After its burn-in, with mixed train flags.
        batches: Three of a stream, the last one the trigger.
        validation: The attacker's own.
        domain: What a valid input is.
        surrogate: Another learner on the same data.
        seed: Of the stream.
    """

    learner: Learner
    batches: tuple[AnyBatch, ...]
    validation: AnyBatch
    domain: Domain
    surrogate: Learner
    seed: int = 0

    @property
    def past(self) -> History:
        """What the learner remembers of itself."""
        assert self.learner.history is not None
        return self.learner.history

    def available(self) -> dict[Need, Any]:
        """All that a component may declare."""
        learner = self.learner
        return {
            Need.MODEL: learner.white_box,
            Need.VALIDATION: self.validation,
            Need.TRIGGER: self.batches[-1],
            Need.ACCURACY: (0.9, 0.9),
            Need.TRUSTED: learner.trusted,
            Need.HISTORY: learner.history,
            Need.TRAINING: learner.training,
            Need.SURROGATE: self.surrogate.white_box,
        }

    def beside(self) -> dict[str, Any]:
        """What a component can look at besides the model, by name."""
        return {need.name.lower(): value for need, value in self.available().items() if need is not Need.MODEL}

    def view(self, component: Any, memory: Memory) -> View:  # noqa: ANN401  (whatever declares needs)
        """What a component sees: what it declares, and no more."""
        granted = {need: value for need, value in self.available().items() if need in component.needs}
        name = type(component).__name__
        return View(
            step=self.learner.step,
            memory=memory,
            available=granted,
            granted=component.needs,
            owner=name,
            domain=self.domain,
        )


@lru_cache(maxsize=16)
def stream_of(seed: int) -> Stream:
    """The toy stream of a seed, made once."""
    return toy_stream(seed)


def image_world(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> World:
    """The toy stream of a seed and its convolutional net."""
    return _unsettled(_image_world(dtype, seed))


def tabular_world() -> World:
    """Rows of z-scored features, each with bounds of its own, and a small net that learned them."""
    return _unsettled(_tabular_world())


@lru_cache(maxsize=8)
def _image_world(dtype: torch.dtype, seed: int) -> World:
    stream = stream_of(seed)

    def few(batch: AnyBatch, samples: int) -> AnyBatch:
        return Batch(batch.x[:samples].to(dtype), batch.y[:samples])

    batches = tuple(few(stream.victim_batch(step, 0), SAMPLES) for step in range(3))
    learner, surrogate = (toy_learner(stream, seed=number, dtype=dtype) for number in (seed, seed + 1))
    assert learner.trusted is not None
    learner.trusted, learner.domain = few(learner.trusted, len(stream.trusted)), stream.domain
    return World(learner, batches, few(stream.validation.all(), VALIDATION), stream.domain, surrogate, seed)


def other_worlds() -> list[World]:
    """Inputs and targets that are neither images nor classes: token ids with a mask, and numbers to predict."""
    return [_unsettled(_token_world()), _unsettled(_regression_world())]


@lru_cache(maxsize=1)
def _tabular_world() -> World:
    low = -torch.linspace(1.5, 2.5, FEATURES)
    domain = Domain(low, 0.5 - low)
    towards = 2 * torch.eye(FEATURES)[:CLASSES]

    def drawn(samples: int, rng: torch.Generator) -> AnyBatch:
        y = torch.arange(samples) % CLASSES
        return Batch(domain.clamp(towards[y] + torch.randn(samples, FEATURES, generator=rng)), y)

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, CLASSES))

    return _learned(model, drawn, domain, F.cross_entropy)


class _TokenNet(nn.Module):
    """The mean embedding of the tokens that count."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(5 * CLASSES, FEATURES), nn.Linear(FEATURES, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen = (self.embedding(input_ids) * attention_mask.unsqueeze(-1)).sum(1)
        logits: Tensor = self.last(seen / attention_mask.sum(1, keepdim=True))
        return logits


@lru_cache(maxsize=1)
def _token_world() -> World:
    def drawn(samples: int, rng: torch.Generator) -> AnyBatch:
        y = torch.arange(samples) % CLASSES
        words = torch.randint(5, (samples, 6), generator=rng)  # of which each class has its own
        ids = CLASSES * words + y.unsqueeze(1)
        mask = (torch.rand(samples, 6, generator=rng) < 0.8).float()
        mask[:, 0] = 1
        return Batch({"input_ids": ids, "attention_mask": mask}, y)

    return _learned(_TokenNet, drawn, Domain(), F.cross_entropy)


@lru_cache(maxsize=1)
def _regression_world() -> World:
    def drawn(samples: int, rng: torch.Generator) -> AnyBatch:
        x = torch.randn(samples, FEATURES, generator=rng)
        return Batch(x, x[:, :2] + 0.1 * torch.randn(samples, 2, generator=rng))

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 12), nn.ReLU(), nn.Linear(12, 2))

    return _learned(model, drawn, Domain(), F.mse_loss)


def _learned(
    build: Callable[[], nn.Module],
    drawn: Callable[[int, torch.Generator], AnyBatch],
    domain: Domain,
    criterion: Criterion,
) -> World:
    """A world of some small model, after a short burn-in.

    Args:
        build: A fresh module.
        drawn: So many samples.
        domain: What a valid input is.
        criterion: What is learned by.
    """
    rng = generator("world")
    training = [drawn(ROWS, rng) for _ in range(4)]

    def learner(seed: int) -> Learner:
        with seeded_default(seed):
            model = build()
        untrained = Weights.of(model).copied()
        burned_in = Learner(
            model,
            SGD(model.parameters(), lr=0.1),
            criterion=criterion,
            trusted=drawn(ROWS, rng),
            training=training,
            domain=domain,
        )
        for _ in range(10):
            for batch in training:
                burned_in.update(batch)
        burned_in.step, burned_in.history = 0, History(keep=8, checkpoints={0: untrained}, length=1)
        return burned_in

    batches = tuple(drawn(SAMPLES, rng) for _ in range(3))
    return World(learner(0), batches, drawn(VALIDATION, rng), domain, learner(1))


def _unsettled(world: World) -> World:
    """A copy with every other module in eval mode, and a gradient, so that tidying up is seen, too."""
    own = copy.deepcopy(world)
    for number, module in enumerate(own.learner.model.modules()):
        module.training = number % 2 == 0
    parameter = next(own.learner.model.parameters())
    parameter.grad = torch.ones_like(parameter)
    return own


def state_of(learner: Learner) -> dict[str, Tensor]:
    """Copies of parameters and buffers."""
    weights = Weights.of(learner.model).copied()
    return {**weights.parameters, **weights.buffers}


def untimed(trace: Sequence[TraceRow]) -> Sequence[Mapping[str, Any]]:
    """The rows of a trace without what the clock decides."""
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in trace]
