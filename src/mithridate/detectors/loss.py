"""The loss of a sample's received label as a detector: now, or how far it has risen since an old model."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mithridate.core.batch import AnyBatch
from mithridate.core.past import Epoch
from mithridate.core.registry import register, settings
from mithridate.core.targets import Criterion, loss_of
from mithridate.core.view import Need, View
from mithridate.core.watch import Detector


@register("detector", "loss")
@settings
class Loss(Detector):
    """Minus the loss of each sample with the label that it came with; with `epoch`, minus its rise since that epoch.

    The loss is the learner's own criterion, of single samples and in eval mode. It finds wrong labels and samples that
    were pushed up the loss; poison need not be either.

    Args:
        epoch: Compare with the model at the end of this burn-in epoch, before the last (`half`: that at half of the
            burn-in): minus (loss now - loss then), the loss discrepancy. Unset: the loss of the current model alone.

    Raises:
        ConfigError: (from `score`) that checkpoint was not kept.
        DataError: (from `score`) a label that the model has no output for.

    Source:
        Zhu et al., ICML 2023, appendix A (loss discrepancy) and Fig. 8, where it is set against the Memorization
        Discrepancy.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL})
    fits: ClassVar[bool] = False

    epoch: Epoch | None = None

    def __post_init__(self) -> None:
        if self.epoch is not None:  # the class is frozen: this is set once, here, and follows from `epoch`
            object.__setattr__(self, "needs", frozenset({Need.MODEL, Need.HISTORY}))

    @property
    def old_epochs(self) -> frozenset[Epoch | None]:
        """The burn-in epoch that it compares with, if it does."""
        return frozenset() if self.epoch is None else frozenset({self.epoch})

    def check_inputs(self, batch: AnyBatch) -> None:
        """Any that the criterion takes."""

    @torch.no_grad()
    def score(self, batch: AnyBatch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        """(n,), in the unit of the criterion."""
        module, criterion = view.model.module, view.model.criterion
        logits = view.model.logits(batch.x)
        loss_of(criterion, logits, batch.y, where=f"batch given to {view.owner}")
        now = _losses(criterion, logits, batch.y)
        if self.epoch is None:
            return -now
        old = view.history.checkpoint(self.epoch, who=view.owner)
        return _losses(criterion, old.logits(module, batch.x), batch.y) - now


def _losses(criterion: Criterion, logits: Tensor, labels: Tensor) -> Tensor:
    """The criterion of each sample alone (n,): it gives the mean of a batch."""
    return torch.stack([criterion(z[None], y[None]) for z, y in zip(logits, labels, strict=True)])
