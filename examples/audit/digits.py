"""What an audit is told of a model: a small network for handwritten digits that goes on learning from a stream."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import mithridate as mi


def trained(model: nn.Module, x: Tensor, y: Tensor, epochs: int = 15) -> None:
    """Your training before the stream; anything will do."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(50):
            optimiser.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()


def make(seed: int, defence: str | None = None) -> mi.audit.Target:
    """Called once a seed; torch's own generators are seeded with it."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16  # pixels in [0, 1]
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    before, live, trusted, test = order.split([700, 550, 97, 450])

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    trained(model, x[before], y[before])
    return mi.audit.Target(
        model,
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        F.cross_entropy,
        stream=[(x[rows], y[rows]) for rows in live.split(50)],
        trusted=(x[trusted], y[trusted]),
        test=(x[test], y[test]),
        defence=defence,
    )


def guarded(seed: int) -> mi.audit.Target:
    """The same with a gate: a step that a hundred trusted samples show to be harmful is taken back."""
    return make(seed, defence="gate")
