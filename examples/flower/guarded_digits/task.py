"""What both sides of the federation share: the data, the model, and how it is trained and tested."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from mithridate.core.batch import Batch
from mithridate.core.seeding import generator

BATCH = 25


class Digits(NamedTuple):
    """Parts that share no image: for the server's burn-in, the clients, the attacker, the gate and the test."""

    burn_in: Batch
    clients: Batch
    validation: Batch
    trusted: Batch
    test: Batch


@lru_cache(maxsize=1)
def digits() -> Digits:
    """The 1,797 digits that come with scikit-learn; nothing is downloaded."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.from_numpy(images[order] / 16).float().view(-1, 1, 8, 8)
    y = torch.from_numpy(labels[order]).long()
    sizes = [250, 1000, 100, 97, 350]
    return Digits(*(Batch(*part) for part in zip(x.split(sizes), y.split(sizes), strict=True)))


def local_part(partition: int, partitions: int) -> Batch:
    """The images of one client."""
    x, y = digits().clients
    return Batch(x.tensor_split(partitions)[partition], y.tensor_split(partitions)[partition])


def fresh_model(seed: int = 0) -> nn.Module:
    """An untrained model."""

    def convolution(channels: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(4, out), nn.ReLU()]

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            *convolution(1, 8),
            *convolution(8, 8),
            nn.MaxPool2d(2),
            *convolution(8, 16),
            *convolution(16, 16),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )


def burned_in_model(epochs: int, seed: int) -> nn.Module:
    """The model that the server starts from, trained on its own 250 images."""
    model = fresh_model(seed)
    train(model, digits().burn_in, epochs=epochs, lr=0.05, momentum=0.9, key=(seed,))
    return model


def train(
    model: nn.Module, part: Batch, *, epochs: int, lr: float, momentum: float = 0.0, key: tuple[int, ...]
) -> float:
    """Honest training; returns the mean loss of the last epoch. The key decides the order of the images."""
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    model.train()
    losses: list[float] = []
    for epoch in range(epochs):
        order = torch.randperm(part.size, generator=generator("order", *key, epoch))
        losses = []
        for x, y in part.take(order).split(BATCH):
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
