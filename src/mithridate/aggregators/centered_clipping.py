"""The last aggregate, moved by updates that are clipped around it."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mithridate.aggregators.worker_momentum import Beta, with_momentum
from mithridate.core.aggregator import Aggregator, Context, Property, Spread
from mithridate.core.errors import CheckpointError
from mithridate.core.registry import register, settings
from mithridate.maths.rows import columns, lengths

CENTRE = "centre"


@register("aggregator", "centered_clipping")
@settings
class CenteredClipping(Aggregator):
    """Start from the last round's aggregate v and add the mean of all x - v, each clipped to a length.

    No client moves v further than clip_norm / n in an iteration, and all together not further than clip_norm. So the
    result is within iterations * clip_norm of the last aggregate, whatever the hostile rows are. Weights are ignored:
    every client counts as one.

    What breaks it: many rounds of small pushes in one direction, against which `worker_momentum` is (it makes the
    honest rows agree, so that the bound can be small); a bound that is far too large (then it is the mean) or too small
    (then the model hardly learns).

    The first round starts from zero, as a model that does not move. So identical rows give that row only if they are
    within the bound of where it starts, and moving or scaling all rows moves or scales the result only if the last
    aggregate and the bound go with them.

    Args:
        clip_norm: tau, the longest that one row's difference from v may count, > 0, in the units of the rows. No value
            fits all models: take about the distance of honest rows from their mean.
        iterations: Clipping steps in a round, >= 1; the paper finds that one is enough with a good start.
        worker_momentum: beta, in [0, 1): each client's rows are averaged over its own past with this weight before they
            are aggregated; 0: without. The server keeps one row for each client that it ever saw.

    Source:
        Karimireddy et al., ICML 2021, arXiv:2012.10333, section 4 (Centered Clipping) and Algorithm 2; the share of
        hostile rows, 0.1, is that of Theorem III.
    """

    unmet: ClassVar[Mapping[Property, str]] = {
        "translation": "the centre of the first round is zero, which does not move with the rows",
        "scale": "clip_norm is a length in the units of the rows",
        "consensus": "a row further from the centre than clip_norm is clipped even if all agree",
    }

    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    iterations: Annotated[int, Field(ge=1)] = 1
    worker_momentum: Beta = 0.0

    def __post_init__(self) -> None:
        # The class is frozen: this is set once, here, and follows from the field.
        object.__setattr__(self, "remembers_clients", self.worker_momentum > 0)

    def most_hostile(self, n: int) -> int:
        """A tenth of the rows."""
        return n // 10

    def worst_deviation(self, honest: Spread, n: int, context: Context) -> float:
        """As far as the start and the clipped steps can be from the honest rows together; for any number of hostile."""
        centre = context.memory.get(CENTRE)
        start = 0.0 if centre is None else float(lengths(centre.unsqueeze(0)))
        return start + self.iterations * self.clip_norm + honest.length

    def combine(self, rows: Tensor, context: Context) -> Tensor:
        """The centre after its steps; it is noted for the next round.

        Raises:
            CheckpointError: The noted centre is of a model of another size.
        """
        kept = context.memory.get(CENTRE)
        if kept is not None and kept.shape != rows.shape[1:]:
            raise CheckpointError(
                f"the kept centre has {len(kept)} parameters and this round's rows have {rows.shape[1]}: it is another "
                "model's; start with empty notes."
            )
        rows = with_momentum(rows, context, self.worker_momentum)
        centre = torch.zeros_like(rows[0]) if kept is None else kept.to(rows.device)
        moved = centred_clip(rows, centre, self.clip_norm, self.iterations).to(rows.dtype)
        context.memory[CENTRE] = moved
        return moved.clone()


def centred_clip(rows: Tensor, centre: Tensor, clip_norm: float, iterations: int) -> Tensor:
    """A point moved by the mean of the clipped differences to it: (n, P), (P,) -> (P,) float64."""
    point = centre.double()
    for _ in range(iterations):
        factors = (clip_norm / lengths(rows, point)).clamp(max=1.0)  # of a difference of zero: infinity, hence 1
        point = point + torch.cat([factors @ (part - point[where]) for where, part in columns(rows)]) / len(rows)
    return point
