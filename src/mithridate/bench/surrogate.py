"""`[surrogate]` of a recipe: the model of an attacker who has no access to the victim's."""

from typing import Annotated, Any, Literal

from pydantic import Field

from mithridate.core import registry
from mithridate.core.past import Epoch
from mithridate.core.registry import config_of, settings


@settings
class Surrogate:
    """The model of an attacker who has no access to the victim's (`model_access = "surrogate"` of an attack).

    Args:
        kind: `checkpoint`: an older state of the victim's own model; `trained`: another model, trained on the same
            samples.
        epoch: Burn-in epoch, for `checkpoint`, before the last; it must be among `[burn_in] checkpoints`. `half`: that
            at half of the burn-in; unset: the earliest kept.
        seed_offset: For `trained`: added to the run's seed, >= 1.
        model: For `trained`: a table like `[model]`; unset: the victim's architecture.

    Source:
        Zhu et al., ICML 2023, C.8, Table 11 (older checkpoints).
    """

    kind: Literal["checkpoint", "trained"] = "checkpoint"
    epoch: Epoch | None = None
    seed_offset: Annotated[int, Field(ge=1)] = 1000
    model: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.model is not None:
            object.__setattr__(self, "model", config_of(registry.build("model", self.model, where="[surrogate] model")))
