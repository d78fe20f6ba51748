"""No defence: the model learns from what it is sent."""

from mithridate.core.defence import Defence
from mithridate.core.registry import register, settings


@register("defence", "none")
@settings
class Standard(Defence):
    """Standard training (ST): every batch is learned from as it comes.

    Source:
        The baseline of both papers; "ST" in Zhu et al., ICML 2023, Table 1.
    """
