"""Memorization Discrepancy: how far a model's answer to a sample has moved since an earlier self."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mithridate.core.batch import Inputs
from mithridate.core.model import WhiteBox
from mithridate.core.past import Epoch, Past, Weights
from mithridate.core.registry import settings
from mithridate.core.view import View
from mithridate.maths.divergence import Divergence, divergence


def memorization_discrepancy(box: WhiteBox, old: Weights, x: Inputs, *, kind: Divergence = "kl") -> Tensor:
    """Distance between the answers of an old and of the current model to each sample, both in eval mode.

    Args:
        box: The current model; not changed.
        old: An earlier state of the same model.
        x: Samples (n, ...).
        kind: Which distance.

    Returns:
        (n,); poisoned samples, which were optimised on the current model, tend to score higher than clean ones.

    Raises:
        CheckpointError: `old` is of another architecture or class count.

    Source:
        Zhu et al., ICML 2023, Definition 3.3, Eq. (5).
    """
    with torch.no_grad():
        return divergence(old.logits(box.module, x), box.logits(x), kind)


@settings
class LookingBack:
    """What components that look back share: which old model the current one is compared with, by which distance.

    Args:
        divergence: `kl`: KL(old || now); `kl_reverse`; `js`; `tv`; `l2` of the logits.
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
