"""Losses that crafting may differentiate in place of the victim's own criterion."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.domain import Domain
from mithridate.core.errors import ConfigError
from mithridate.core.model import WhiteBox
from mithridate.core.modes import BatchNormMode
from mithridate.core.targets import Criterion
from mithridate.maths.margin import margin
from mithridate.maths.norms import Ball, by_row

Loss = Literal["ce", "kl", "cw"]
"""`ce`: the victim's own criterion; `kl`: divergence from the model's answer to the clean sample; `cw`: the margin."""

NUDGE = 1e-3
"""Standard deviation of the noise that `kl` begins with, in pixel units, as in TRADES."""


@dataclass(frozen=True)
class ByTargets:
    """A criterion that reads from the targets which loss a sample is under; equal if the victim's own is the same.

    Class numbers (n,) are under the victim's own criterion, bit for bit; a column of them (n, 1) under the margin;
    probabilities (n, classes) under cross-entropy, whose gradients are those of KL(targets || answer), since the
    targets' entropy is a constant. So one objective serves clean and poisoned samples alike. It is for victims that
    learn from class numbers alone: of others, targets may themselves have the form of a column or of probabilities.

    Args:
        criterion: The victim's own.
    """

    criterion: Criterion

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        """The mean loss."""
        if y.ndim == 1:
            return self.criterion(logits, y)
        return F.cross_entropy(logits, y) if y.is_floating_point() else margin(logits, y.squeeze(1))


def by_targets(box: WhiteBox, loss: Loss) -> WhiteBox:
    """The same model under the criterion that crafting differentiates: for `ce` its own, whatever targets that takes.

    Args:
        box: The model.
        loss: What the poisoned samples are crafted for; `kl` and `cw` are told apart by their `targets`.
    """
    return box if loss == "ce" else replace(box, criterion=ByTargets(box.criterion))


def check_loss(loss: Loss, batch: AnyBatch, *, who: str) -> None:
    """Refuse targets that a loss of crafting has no meaning for: `kl` and `cw` are of a model that names one class.

    Args:
        loss: Which.
        batch: Any batch of the stream.
        who: The attack, for the message.

    Raises:
        ConfigError: The targets are no class numbers, one a sample.
    """
    y = batch.with_class_numbers().y
    if loss == "ce" or (y.ndim == 1 and y.dtype == torch.int64):
        return
    raise ConfigError(
        f'{who} with loss = "{loss}" needs class numbers (int64, one a sample), and these targets are {y.dtype} of '
        f'shape {tuple(y.shape)}; set loss = "ce", the criterion that the model itself learns by.'
    )


def targets(loss: Loss, box: WhiteBox, batch: Batch, mode: BatchNormMode) -> Tensor:
    """What `by_targets` takes for a loss.

    Args:
        loss: Which.
        box: The model whose answer `kl` keeps away from.
        batch: The clean samples.
        mode: BatchNorm while it answers.

    Raises:
        ConfigError: The batch has no class numbers, and the loss needs them (`check_loss`).
    """
    check_loss(loss, batch, who="crafting")
    if loss == "ce":
        return batch.y
    if loss == "cw":
        return batch.y.unsqueeze(1)
    with torch.no_grad():
        return box.logits(batch.x, mode).softmax(1)


def nudged(x: Tensor, ball: Ball, mask: Tensor, domain: Domain, rng: Generator) -> Tensor:
    """A start beside the clean samples: at them KL has its minimum, and so no gradient to begin with.

    Args:
        x: Clean samples (n, ...).
        ball: The budget of one sample, which holds the start too.
        mask: (n,) bool, the samples that may change.
        domain: What a valid sample is.
        rng: The only source of randomness.

    Source:
        Zhang et al., ICML 2019 (TRADES), arXiv:1901.08573, Algorithm 1: x' = x + 0.001 N(0, I).
    """
    noise = NUDGE * torch.randn(x.shape, generator=rng, dtype=x.dtype).to(x.device)
    moved = domain.clamp(x + ball.project(noise))
    return torch.where(by_row(mask, x), moved, x)
