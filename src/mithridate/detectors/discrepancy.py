"""Memorization Discrepancy as a detector: how far the model's answer has moved since an earlier self."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mithridate.core.batch import AnyBatch
from mithridate.core.component import check_answers
from mithridate.core.discrepancy import LookingBack, distance, memorization_discrepancy
from mithridate.core.registry import register, settings
from mithridate.core.view import Need, View
from mithridate.core.watch import Detector


@register("detector", "discrepancy")
@settings
class Discrepancy(LookingBack, Detector):
    """Minus the Memorization Discrepancy: samples on which an old and the current model disagree are suspicious.

    With the epoch before the last as the old model it is the "static" information of Fig. 1 of the paper.

    Args:
        moved_answers: Store besides, for measurement only, how far poisoning moved the answer to each sample: under the
            current model (alpha of the paper's Fig. 3) and under the old one (alpha').
        on_missing: While the stream is younger than `back` updates: `pass` scores every sample 0, as if nothing had
            moved; `closed` scores every sample -inf. Leave those steps out of any figure: nothing was measured there.

    Raises:
        ConfigError: (from `score`) the wanted checkpoint was not kept.

    Source:
        Zhu et al., ICML 2023, Definition 3.3, Eq. (5); Fig. 1 for `static`; Eq. (3) and Fig. 3 for the answers that
        poisoning moved.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL, Need.HISTORY})
    fits: ClassVar[bool] = False

    moved_answers: bool = False
    on_missing: Literal["pass", "closed"] = "pass"

    def check_inputs(self, batch: AnyBatch) -> None:
        """Refuse targets that are numbers, but for `l2`: it compares two models' answers, and looks at no target.

        Raises:
            ConfigError: They are, and `divergence` takes answers for probabilities.
        """
        if self.divergence != "l2":
            check_answers(batch, who=type(self).__name__)

    def score(self, batch: AnyBatch, view: View, fitted: Mapping[str, Tensor]) -> Tensor:
        """(n,), <= 0 up to rounding; in nats for `kl`, `kl_reverse` and `js`."""
        old = self.old_model(view)
        if old is None:
            return torch.full((batch.size,), 0.0 if self.on_missing == "pass" else -torch.inf, device=batch.y.device)
        return -memorization_discrepancy(view.model, old, batch, kind=self.divergence)

    @torch.no_grad()
    def moved(self, clean: AnyBatch, received: AnyBatch, view: View) -> Mapping[str, Tensor]:
        """D(answer to the poisoned sample, answer to the clean one), (n,): `moved_now` and `moved_then`; no score.

        Source:
            Zhu et al., ICML 2023, Eq. (3): both sides of the inequality.
        """
        old = self.old_model(view) if self.moved_answers else None
        if old is None:
            return {}
        box = view.model
        now = (box.logits(received.x), box.logits(clean.x))
        then = (old.logits(box.module, received.x), old.logits(box.module, clean.x))
        return {
            name: distance(*answers, clean.y, criterion=box.criterion, kind=self.divergence)
            for name, answers in (("moved_now", now), ("moved_then", then))
        }
