"""The online poisoner without memory: one poisoned trigger batch."""

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Generator, Tensor

from mithridate.attacks.budget import Iterated
from mithridate.attacks.losses import by_targets, targets
from mithridate.core.batch import Batch
from mithridate.core.registry import register, settings
from mithridate.core.view import Need, View
from mithridate.maths.alignment import alignment
from mithridate.maths.calculus import Slope, gradient
from mithridate.maths.directions import Normalise, opposite, unit


@register(
    "attack", "vanilla", presets={"paper": {"steps": 100}, "released": {"eps": 0.2, "steps": 2, "normalise": "tensor"}}
)
@settings
class Vanilla(Iterated):
    """Poison the trigger batch alone: its gradient is turned against that of a validation batch.

    Args:
        normalise: Inner product of the gradients as they are (`none`), their cosine (`global`), or the sum of one
            cosine a parameter tensor (`tensor`).
        loss: Whose parameter gradient the poisoned samples are taken to offer: `ce`, the victim's own loss; `kl`, the
            divergence from the model's answer to the clean sample; `cw`, the margin of the best other class over the
            label. S_val keeps the victim's own.
        chunk: Samples computed at a time, >= 1 (bounds memory; not used with `craft_mode = "train"`).

    Source:
        Pang et al., NeurIPS 2021, section 3.1, Eqs. (5)-(6); Wang and Chaudhuri, arXiv:1808.08994. Losses: Zhu et al.,
        ICML 2023, Table 2; surrogates: the same, C.8.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.MODEL, Need.VALIDATION})

    normalise: Normalise = "none"
    chunk: Annotated[int, Field(ge=1)] = 100

    def ready(self, view: View) -> bool:
        """At once: there is no accumulative phase."""
        return True

    def craft(self, batch: Batch, view: View, mask: Tensor, rng: Generator) -> Tensor:
        """Descend <grad L(S_val), grad L(P(S_T))>, Eq. (6)."""
        box = by_targets(self.target(view), self.loss)
        parameters, y = box.parameters, targets(self.loss, box, batch, self.craft_mode)
        with box.objective(self.craft_mode, self.precision) as objective:
            chunk = None if self.craft_mode == "train" else self.chunk
            g_validation = gradient(objective, parameters, *view.validation, chunk=chunk)
            w = opposite(unit(g_validation, self.normalise))

            def slope_at(x: Tensor) -> Slope:
                return self.turned(objective, parameters, x, y, w, normalise=self.normalise, chunk=chunk)

            def value_at(x: Tensor) -> Tensor:
                return alignment(objective, parameters, x, y, w, normalise=self.normalise, chunk=chunk)

            return self.climb(batch.x, slope_at, mask, view, rng, value_at=value_at)
