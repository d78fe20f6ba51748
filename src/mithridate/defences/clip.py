"""Gradient clipping: bound the length of the step that one batch can cause."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mithridate.core.defence import Defence
from mithridate.core.registry import register, settings
from mithridate.core.update import Gradient
from mithridate.core.view import View
from mithridate.maths.norms import Norm, clip_rows, shrink


@register("defence", "clip")
@settings
class Clip(Defence):
    """Gradient clipping (GC): a gradient longer than the bound is shortened before the optimiser sees it.

    Args:
        clip_norm: The bound, > 0, in the units of the gradient; `inf` never clips.
        norm: In which norm the whole gradient is measured: `l2` or `linf` (its largest entry).
        how: `scale` shortens the whole gradient; `project` takes the nearest gradient inside the bound, which for
            `linf` clamps every entry alone.

    Source:
        Pascanu et al., ICML 2013, Algorithm 1; Pang et al., NeurIPS 2021, section 4.2; "GC" in Zhu et al., ICML 2023.
    """

    neutral: ClassVar[Mapping[str, Any]] = {"clip_norm": math.inf}
    active: ClassVar[Mapping[str, Any]] = {"clip_norm": 0.1}

    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    norm: Norm = "l2"
    how: Literal["scale", "project"] = "scale"

    def bound(self, gradient: Gradient, view: View) -> Gradient:
        """Shorten each client's row."""
        return gradient.with_rows(clip_rows(gradient.rows, self.clip_norm, self.norm, how=self.how))

    def factors(self, lengths: Tensor) -> Tensor | None:
        """The bound over the length, where that is longer."""
        return shrink(lengths, self.clip_norm) if self.norm == "l2" else None
