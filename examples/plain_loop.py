"""A guard in a plain training loop: a digit classifier that learns from what its users send, one of them hostile.

    python examples/plain_loop.py

The last five batches of the stream have every label moved on by one. The loop runs twice, without a guard and with one.
"""

import copy
import tempfile

import torch
from sklearn.datasets import load_digits

import mithridate as mi


def net() -> torch.nn.Module:
    """Any `torch.nn.Module` that gives logits."""
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    )


def optimiser_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Any optimiser of torch."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def learn(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, batch: int = 50
) -> None:
    """The loop; it knows nothing of a guard."""
    model.train()
    for i in range(0, len(x), batch):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[i : i + batch]), y[i : i + batch]).backward()
        optimizer.step()


def accuracy(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of the samples that the model gets right."""
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    """Train, then learn from the stream without a guard and with one."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[order, None]
    y = torch.tensor(digits.target)[order]
    trusted, stream, test = slice(600, 800), slice(800, 1300), slice(1300, None)
    first = net()
    optimizer = optimiser_of(first)
    for _ in range(10):
        learn(first, optimizer, x[:600], y[:600])
    labels = y[stream].clone()
    labels[-250:] = (labels[-250:] + 1) % 10

    unguarded = copy.deepcopy(first)
    learn(unguarded, optimiser_of(unguarded), x[stream], labels)

    model = copy.deepcopy(first)
    optimizer = optimiser_of(model)
    with tempfile.TemporaryDirectory() as folder:
        guard = mi.guard.attach(model, optimizer, trusted=(x[trusted], y[trusted]), folder=folder)
        learn(model, optimizer, x[stream], labels)
        guard.detach()
    with guard.serving():
        guarded = accuracy(model, x[test], y[test])

    print(f"before the stream: {accuracy(first, x[test], y[test]):.1%}")
    print(f"without a guard: {accuracy(unguarded, x[test], y[test]):.1%}")
    print(f"with a guard: {guarded:.1%} ({guard.refused} of {guard.attempts} steps taken back)")


if __name__ == "__main__":
    main()
