"""What both sides of the federation share: the data, the model, and how it is trained and tested."""

from functools import lru_cache

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from mithridate.core.batch import Batch
from mithridate.core.seeding import generator
from mithridate.data import Part, Stream, StreamSettings, open_stream
from mithridate.models import build_model
from mithridate.training.burn_in import BurnIn, burn_in

MODEL = {"name": "small_cnn", "width": 8, "norm": "group", "groups": 4}
LR = 0.05
BATCH = 25


@lru_cache(maxsize=1)
def digits() -> Stream:
    """The 1,797 digits that come with scikit-learn, in parts that share no image; nothing is downloaded."""
    sizes = StreamSettings(name="digits", burn_in=250, victim=1000, validation=100, trusted=97, test=350)
    return open_stream(sizes)


def fresh_model(seed: int = 0) -> nn.Module:
    """An untrained model."""
    return build_model(MODEL, digits().info, seed=seed)


def burned_in_model(epochs: int, seed: int) -> nn.Module:
    """The model that the server starts from, trained on its own 250 images."""
    model = fresh_model(seed)
    burn_in(model, digits(), BurnIn(epochs=epochs, batch_size=BATCH, lr=LR), seed=seed)
    return model


def local_part(partition: int, partitions: int) -> Part:
    """The images of one client."""
    part = digits().victim
    mine = np.array_split(np.arange(len(part)), partitions)[partition]
    return Part(f"client {partition}", part.x[mine], part.y[mine])


def train(model: nn.Module, part: Part, *, epochs: int, key: tuple[int, ...]) -> float:
    """Honest local training; returns the mean loss of the last epoch. The key decides the order of the images."""
    optimiser = torch.optim.SGD(model.parameters(), lr=LR)
    model.train()
    losses: list[float] = []
    for epoch in range(epochs):
        losses = []
        for x, y in part.batches(BATCH, rng=generator("local order", *key, epoch)):
            optimiser.zero_grad()
            loss = F.cross_entropy(model(x), y)
            torch.autograd.backward(loss)
            optimiser.step()
            losses.append(float(loss.detach()))
    return float(np.mean(losses))


@torch.no_grad()
def evaluate(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """Mean loss and accuracy."""
    model.eval()
    logits = model(batch.x)
    return float(F.cross_entropy(logits, batch.y)), float((logits.argmax(1) == batch.y).double().mean())
