"""Memorization Discrepancy: how far a model's answer to a sample has moved since an earlier self."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mithridate.core.batch import AnyBatch
from mithridate.core.model import WhiteBox
from mithridate.core.past import Epoch, Past, Weights
from mithridate.core.registry import settings
from mithridate.core.targets import Criterion, labels_apart
from mithridate.core.view import View
from mithridate.maths.divergence import Divergence, divergence


def distance(old: Tensor, now: Tensor, y: Tensor, *, criterion: Criterion, kind: Divergence = "kl") -> Tensor:
    """How far two answers to the same samples lie apart, by what the model's outputs mean.

    Args:
        old: Logits of the one model.
        now: Logits of the other.
        y: The samples' targets, which with the criterion say what logits are of: one class of several, or labels that
            may hold at once; of the latter, the mean over labels counts.
        criterion: What the model learns by.
        kind: Which distance.

    Returns:
        (n,).

    Raises:
        ConfigError: Outputs are no probabilities, as in regression, and `kind` is not `l2`.
    """
    if kind != "l2" and labels_apart(criterion, now, y):
        old, now = (torch.stack([logits, torch.zeros_like(logits)], -1) for logits in (old, now))
    return divergence(old, now, kind)


def memorization_discrepancy(box: WhiteBox, old: Weights, batch: AnyBatch, *, kind: Divergence = "kl") -> Tensor:
    """Distance between the answers of an old and of the current model to each sample, both in eval mode.

    Args:
        box: The current model; not changed.
        old: An earlier state of the same model.
        batch: Samples (n, ...); what their targets are is looked at, not which (`distance`).
        kind: Which distance.

    Returns:
        (n,); poisoned samples, which were optimised on the current model, tend to score higher than clean ones.

    Raises:
        CheckpointError: `old` is of another architecture or class count.
        ConfigError: Outputs are no probabilities, as in regression, and `kind` is not `l2`.

    Source:
        Zhu et al., ICML 2023, Definition 3.3, Eq. (5).
    """
    with torch.no_grad():
        then, now = old.logits(box.module, batch.x), box.logits(batch.x)
        return distance(then, now, batch.y, criterion=box.criterion, kind=kind)


@settings
class LookingBack:
    """What components that look back share: which old model the current one is compared with, by which distance.

    Args:
        divergence: `kl`: KL(old || now); `kl_reverse`; `js`; `tv`; `l2` of the logits, the only one for a model that
            says numbers. Labels that may hold at once are compared one by one, and their mean counts.
        old: Which old model: a burn-in `checkpoint`, or the model some updates `back`.
        epoch: Burn-in epoch of the checkpoint, before the last; `half`: that at half of the burn-in, rounded down;
            unset: the earliest that was kept.
        back: Updates to look back with `old = "back"`, k, >= 1.
    """

    divergence: Divergence = "kl"
    old: Literal["checkpoint", "back"] = "checkpoint"
    epoch: Epoch | None = None
    back: Annotated[int, Field(ge=1)] = 20

    @property
    def lookback(self) -> int:
        """How many updates back it looks; 0 if at a burn-in checkpoint."""
        return self.back if self.old == "back" else 0

    @property
    def old_epochs(self) -> frozenset[Epoch | None]:
        """The burn-in epoch that it looks back at, if it looks at one."""
        return frozenset() if self.old == "back" else frozenset({self.epoch})

    def old_model(self, view: View) -> Weights | None:
        """The model that is looked back at; None while the stream is too young.

        Raises:
            ConfigError: The wanted checkpoint was not kept, or is the current model.
        """
        past = self.past(view)
        return past.back(self.back) if self.old == "back" else past.checkpoint(self.epoch, who=view.owner)

    def past(self, view: View) -> Past:
        """Where old models are looked for; none of them is the current one."""
        return view.history
