"""A guard in Lightning: one callback; the module, the loader and the trainer stay as they are.

    pip install lightning
    python examples/lightning_loop.py

The last third of the stream has every label moved on by one.
"""

import copy
import logging
import tempfile
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from mithridate.guard.lightning import LightningGuard


class Digits(lightning.LightningModule):
    """A small net for 8x8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Sequence[torch.Tensor], _: int) -> torch.Tensor:
        """Cross-entropy of a batch."""
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit(module: Digits, x: torch.Tensor, y: torch.Tensor, *, epochs: int = 1, callbacks: Sequence[Any] = ()) -> Digits:
    """One call of Lightning's trainer, in the order of the samples."""
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=50))
    return module


def accuracy(module: Digits, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of the samples that the model gets right."""
    module.eval()
    with torch.no_grad():
        return float((module(x).argmax(1) == y).float().mean())


def main() -> None:
    """Train, then learn from the stream without a guard and with one."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[order]
    y = torch.tensor(digits.target)[order]
    trusted, stream, test = slice(600, 800), slice(800, 1400), slice(1400, None)
    first = fit(Digits(), x[:600], y[:600], epochs=15)
    labels = y[stream].clone()
    labels[-200:] = (labels[-200:] + 1) % 10

    unguarded = fit(copy.deepcopy(first), x[stream], labels)
    with tempfile.TemporaryDirectory() as folder:
        callback = LightningGuard(trusted=(x[trusted], y[trusted]), defence="gate", folder=folder)
        guarded = fit(copy.deepcopy(first), x[stream], labels, callbacks=[callback])

    print(f"before the stream: {accuracy(first, x[test], y[test]):.1%}")
    print(f"without a guard: {accuracy(unguarded, x[test], y[test]):.1%}")
    refused = callback.guard.refused if callback.guard else 0
    print(f"with a guard: {accuracy(guarded, x[test], y[test]):.1%} ({refused} steps taken back)")


if __name__ == "__main__":
    main()
