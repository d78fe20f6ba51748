"""The federated poisoner without memory: a reversed trigger update, scaled."""

from typing import ClassVar, Literal

from torch import Generator, Tensor

from mithridate.core.modes import BatchNormMode
from mithridate.core.registry import register, settings
from mithridate.core.update_attack import Honest
from mithridate.core.updates import Updates
from mithridate.core.view import Need, View
from mithridate.maths.calculus import gradient
from mithridate.update_attacks.hostile import Factor, HostileShare, Length, Share, scaled, shared_out

CHUNK = 100
"""Samples of S_val whose gradient is computed at once, where they do not see each other."""


@register("update_attack", "direct", presets={"released": {"target": "validation", "craft_mode": "train"}})
@settings
class Direct(HostileShare):
    """In the trigger round alone, make the round's mean a multiple of minus the honest update, or go up L(S_val).

    Args:
        target: What the round's mean becomes a multiple of. `update`: minus the honest mean (the text's "directly
            poisoning" by a reversed trigger); `validation`: minus grad L(S_val), a step up the validation loss (the
            released code, rows "Poisoned trigger" of Tables 3 to 5).
        trigger_scale: The multiple, >= 0 ("loss scaling" in the rows "Poisoned trigger" of Tables 3 to 5); 1 keeps the
            norm of the honest update.
        trigger_norm: l2 length that the update is given instead, > 0, so that triggers can be compared at equal length;
            unset: its own times trigger_scale.
        craft_mode: BatchNorm in grad L(S_val): running statistics (`eval`), or those of the batch (`train`).

    Source:
        Pang et al., NeurIPS 2021, Tables 3 to 5, rows "Poisoned trigger".
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    poison_ratio: Share = 1.0
    trigger_scale: Factor = 1.0
    trigger_norm: Length | None = None
    target: Literal["update", "validation"] = "update"
    craft_mode: BatchNormMode = "train"

    def __post_init__(self) -> None:
        if self.target == "validation":  # the class is frozen: this is set once, here, and follows from the field
            object.__setattr__(self, "needs", frozenset({Need.MODEL, Need.VALIDATION}))

    def ready(self, view: View) -> bool:
        """At once: there is no phase."""
        return True

    def craft(self, honest: Honest, view: View, rng: Generator) -> Tensor:
        """Rows that make the round's mean the wanted multiple."""
        if self.target == "update":
            update = honest.mean
        else:
            with view.model.objective(self.craft_mode) as objective:
                chunk = None if self.craft_mode == "train" else CHUNK
                update = Updates.of(gradient(objective, view.model.parameters, *view.validation, chunk=chunk)).rows[0]
        return shared_out(scaled(-update, self.trigger_scale, self.trigger_norm), honest)
