"""Adversarial training as a poisoning defence: correct every sample."""

from collections.abc import Mapping
from typing import Any, ClassVar

from mithridate.core.batch import Batch
from mithridate.core.defence import Screened
from mithridate.core.registry import register, settings
from mithridate.core.view import View
from mithridate.defences.correction import Correcting


@register(
    "defence",
    "at",
    presets={"released": {"correction_loss": "ce_kl", "eps": 0.2, "norm": "linf", "step_size": 0.02, "steps": 10}},
)
@settings
class AT(Correcting):
    """Correct every received sample by reverse PGD, clean or not.

    The released code does not descend the cross-entropy alone: it adds a divergence from the model's answers to the
    received batch (preset `released`).

    What breaks it: it needs no attacker to do harm, since correcting clean samples teaches the model from pictures that
    are too easy, and accuracy on a clean stream falls.

    Source:
        Tao et al., NeurIPS 2021, arXiv:2102.04716; "AT" in Zhu et al., ICML 2023, Table 1; the released code's
        eps, step and steps are the defaults.
    """

    neutral: ClassVar[Mapping[str, Any]] = {"steps": 0}
    active: ClassVar[Mapping[str, Any]] = {}

    def screen(self, batch: Batch, view: View) -> Screened:
        """The batch, every sample corrected."""
        return self.all_corrected(batch, view)
