"""Gradient clipping: bound the length of the step that one batch can cause."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mithridate.core.defence import Defence
from mithridate.core.registry import register, settings
from mithridate.core.updates import Updates
from mithridate.core.view import View
from mithridate.maths.norms import Norm, shrink


@register(
    "defence",
    "clip",
    presets={"released": {"clip_norm": 0.01, "norm": "linf", "how": "scale"}},
)
@settings
class Clip(Defence):
    """Gradient clipping (GC): a gradient longer than the bound is shortened before the optimiser sees it.

    What breaks it: many small steps the same way, as the accumulative phase makes them, and a momentum that adds them
    up; BatchNorm statistics, which move in the forward pass. A bound that is tight enough to matter slows clean
    learning, too.

    Args:
        clip_norm: The bound, > 0, in the units of the gradient; `inf` never clips. No value fits all models: take about
            the length of gradients of clean batches of your own (column `gradient_norm` of a trace), or less.
        norm: In which norm the whole gradient is measured: `l2` or `linf` (its largest entry).
        how: `scale` shortens the whole gradient; `project` takes the nearest gradient inside the bound, which for
            `linf` clamps every entry alone.

    Source:
        Pascanu et al., ICML 2013, Algorithm 1; Pang et al., NeurIPS 2021, section 4.2; "GC" in Zhu et al., ICML 2023.
        Preset `released`: what the latter's code does, the whole gradient scaled to a largest entry of 0.01.
    """

    neutral: ClassVar[Mapping[str, Any]] = {"clip_norm": math.inf}
    active: ClassVar[Mapping[str, Any]] = {"clip_norm": 0.1}

    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    norm: Norm = "l2"
    how: Literal["scale", "project"] = "scale"

    def bound(self, updates: Updates, view: View) -> Updates:
        """Shorten each client's row."""
        if math.isinf(self.clip_norm):
            return updates
        if self.how == "project" and self.norm == "linf":
            return updates.with_rows(updates.rows.clamp(-self.clip_norm, self.clip_norm))
        return updates.scaled(shrink(updates.lengths(self.norm), self.clip_norm))
