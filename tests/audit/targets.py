"""Targets whose answer is known: weak, frozen, and of other kinds of inputs."""

import copy
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from mithridate.audit import Target
from mithridate.core.batch import Batch
from mithridate.core.seeding import generator, seeded_default
from mithridate.testing.toy import toy_learner, toy_stream

QUICK: dict[str, Any] = {"eps": 0.15, "batches": 3, "inner_steps": 2}
"""A budget for the toy stream."""


def toy_target(seed: int, *, lr: float, defence: Any = None, **others: Any) -> Target:
    """A small convolutional net on the toy stream; at 0.3 without a guard a batch of wrong labels ruins it."""
    stream = toy_stream(seed)
    learner = toy_learner(stream, seed=seed)
    optimiser = SGD(learner.model.parameters(), lr=lr, momentum=0.9)
    return Target(learner.model, optimiser, F.cross_entropy, stream, defence=defence, **others)


class TokenModel(nn.Module):
    """A bag of words; answers as transformers do, with an object that has `.logits`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        weights = attention_mask.unsqueeze(-1)
        return {"logits": self.head((self.embed(input_ids) * weights).sum(1) / weights.sum(1))}


@lru_cache(maxsize=4)
def _learned_tokens() -> nn.Module:
    with seeded_default(0):
        model = TokenModel()
    optimiser = SGD(model.parameters(), lr=1.0)
    rng = generator("audit tokens")
    for _ in range(150):
        batch = tokens(32, rng)
        optimiser.zero_grad()
        F.cross_entropy(model(**batch.x)["logits"], batch.y).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return model


def tokens(samples: int, rng: torch.Generator) -> Batch[Any]:
    """Ids of which each class has its own, one in four of them another's."""
    y = torch.randint(4, (samples,), generator=rng)
    ids = 4 * torch.randint(5, (samples, 6), generator=rng) + y.unsqueeze(1)
    other = torch.randint(20, ids.shape, generator=rng)
    ids = torch.where(torch.rand(ids.shape, generator=rng) < 0.25, other, ids)
    mask = torch.ones(samples, 6)
    return Batch({"input_ids": ids, "attention_mask": mask}, y)


def token_target(seed: int) -> Target:
    """Mappings of token ids, from a list of batches as a data loader gives them."""
    rng = generator("audit tokens", seed)
    model = copy.deepcopy(_learned_tokens())
    batches = [{**(batch := tokens(16, rng)).x, "labels": batch.y} for _ in range(5)]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.0)
    return Target(model, optimiser, F.cross_entropy, batches, test=tokens(200, rng), validation=tokens(60, rng))


SCALE = torch.tensor([1.0, 1000.0])


def rows(samples: int, rng: torch.Generator) -> Batch:
    """Two features, the second a thousand times as large, of two classes."""
    y = torch.arange(samples) % 2
    x = (2.0 * y.unsqueeze(1) - 1 + 0.5 * torch.randn(samples, 2, generator=rng)) * SCALE
    return Batch(x, y)


class Scaling(nn.Module):
    """Brings both features to one scale."""

    def forward(self, x: Tensor) -> Tensor:
        return x / SCALE


def _table_model(lr: float) -> tuple[nn.Module, SGD]:
    head = nn.Linear(2, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
        head.bias.zero_()
    model = nn.Sequential(Scaling(), head)
    return model, SGD(model.parameters(), lr=lr)


def table_target(seed: int, *, lr: float = 0.01, **others: Any) -> Target:
    """A linear model of a table."""
    rng = generator("audit table", seed)
    model, optimiser = _table_model(lr)
    parts = {"stream": [rows(20, rng) for _ in range(5)], "trusted": rows(40, rng), "test": rows(200, rng)}
    return Target(model, optimiser, F.cross_entropy, **{**parts, "validation": rows(40, rng), **others})


def weak(seed: int) -> Target:
    """A large step, and nothing that takes it back."""
    return table_target(seed, lr=10.0)


def frozen(seed: int) -> Target:
    """Steps of no length."""
    return table_target(seed, lr=0.0)


def divisible(seed: int) -> Target:
    """The table as arrays, which a federation can divide; guarded by a gate."""
    x, y = rows(500, generator("audit arrays", seed))
    model, optimiser = _table_model(1.0)
    sizes: dict[str, Any] = {
        "burn_in": 50,
        "victim": 200,
        "validation": 50,
        "trusted": 50,
        "test": 150,
        "batch_size": 20,
    }
    return Target.from_arrays(
        model, optimiser, F.cross_entropy, x.numpy(), y.numpy(), defence="gate", seed=seed, **sizes
    )
