"""A table: thirty measurements of a tumour each, whose columns have different scales."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import nn

import mithridate as mi


class Standardised(nn.Module):
    """A part of the model, so that a budget is in the table's own units."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", x.mean(0))
        self.register_buffer("std", x.std(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Each column with mean 0 and standard deviation 1."""
        return (x - self.mean) / self.std


def make(seed: int, defence: str | None = None) -> mi.audit.Target:
    """An MLP that standardises its inputs itself, as trained on a part of the table."""
    data = load_breast_cancer()
    x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    before, live, trusted, test = order.split([200, 150, 60, 159])

    model = nn.Sequential(Standardised(x[before]), nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(60):
        for rows in before[torch.randperm(len(before))].split(20):
            optimiser.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()
    return mi.audit.Target(
        model,
        torch.optim.Adam(model.parameters(), lr=1e-2),
        F.cross_entropy,
        stream=[(x[rows], y[rows]) for rows in live.split(15)],
        trusted=(x[trusted], y[trusted]),
        test=(x[test], y[test]),
        defence=defence,
    )


def guarded(seed: int) -> mi.audit.Target:
    """The same with a gate."""
    return make(seed, defence="gate")
