"""The average of updates that are clipped to a length."""

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from mithridate.core.aggregator import Aggregator, Context, Property, Spread
from mithridate.core.registry import register, settings
from mithridate.maths.norms import Norm, clip_rows
from mithridate.maths.rows import blend


@register("aggregator", "norm_bounding")
@settings
class NormBounding(Aggregator):
    """Each row clipped to a length, then the average, weighted if the clients have weights.

    Declared not robust: after clipping it is a mean, so hostile rows inside the bound count in full, and one row can
    take the result out of the box of short honest ones. What holds is that the result is no longer than the bound.

    What breaks it: clients that stay under the bound and agree, round after round: the threat of section C.3 in Pang et
    al., whose accumulative phase needs only short updates.

    Args:
        clip_norm: The longest that a row may be, > 0, in the units of the rows; `inf`: the plain mean. No value fits
            all models: take about the length of honest rows.
        norm: In which norm it is measured: `l2` or `linf` (its largest entry).

    Source:
        Sun et al., 2019, arXiv:1911.07963, section 4 (norm thresholding of updates); Pang et al., NeurIPS 2021,
        Appendix C.3 (clipping before aggregation).
    """

    average: ClassVar[bool] = True
    weighted: ClassVar[bool] = True
    unmet: ClassVar[Mapping[Property, str]] = {
        "translation": "rows are clipped around zero, which does not move with them",
        "scale": "clip_norm is a length in the units of the rows",
        "consensus": "a row longer than clip_norm is clipped even if all agree",
    }

    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 1.0
    norm: Norm = "l2"

    def most_hostile(self, n: int) -> int:
        """None."""
        return 0

    def worst_deviation(self, honest: Spread, n: int, context: Context) -> float:
        """As far as a result inside the bound can be from the honest rows; for any number of hostile ones."""
        longest = self.clip_norm * (math.sqrt(len(honest.widths)) if self.norm == "linf" else 1)
        return longest + honest.length

    def combine(self, rows: Tensor, context: Context) -> Tensor:
        """The average of the clipped."""
        return blend(context.shares(), clip_rows(rows, self.clip_norm, self.norm)).to(rows.dtype)
