"""Updates trusted as far as they point where the server's own does."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mithridate.core.aggregator import Aggregator, Context, Property, Spread
from mithridate.core.registry import register, settings
from mithridate.maths.rows import columns, lengths


@register("aggregator", "fltrust")
@settings
class FLTrust(Aggregator):
    """The average of all rows, each made as long as the server's own update and weighted by its cosine with it.

    A row whose cosine is not positive does not count. So the result never points away from the server's update, and is
    never longer, whatever the clients send, and however many are hostile. Weights are ignored: trust is the weight.

    If no row is trusted (or the server's update is zero) the paper divides zero by zero; here the result is then zero:
    the model stays where it is. A row of zeros has no direction and is not trusted.

    What breaks it: trusted samples that are few, or not like the clients'; hostile rows near the server's direction,
    each of which counts in full (the attack of section VI of the paper optimises just that).

    Source:
        Cao et al., NDSS 2021, arXiv:2012.13995, Algorithm 2 and equations 1 to 4.
    """

    needs_trusted: ClassVar[bool] = True
    unmet: ClassVar[Mapping[Property, str]] = {
        "translation": "directions are taken from zero, which does not move with the rows",
        "consensus": "the result has the length of the server's update, and none if no row points its way",
    }

    def most_hostile(self, n: int) -> int:
        """All: what bounds the result is the server's own update."""
        return n

    def worst_deviation(self, honest: Spread, n: int, context: Context) -> float:
        """As far as a result no longer than the server's update can be from the honest rows."""
        trusted = context.trusted
        return honest.length + (0.0 if trusted is None else float(lengths(trusted.unsqueeze(0))))

    def combine(self, rows: Tensor, context: Context) -> Tensor:
        """The trusted average."""
        if context.trusted is None:
            raise AssertionError("FLTrust was not checked for its trusted update")
        return trusted_average(rows, context.trusted.to(rows.device)).to(rows.dtype)


def trusted_average(rows: Tensor, own: Tensor) -> Tensor:
    """Cosine-weighted average of rows of the length of `own`: (n, P), (P,) -> (P,) float64."""
    length = lengths(own.unsqueeze(0))
    direction = own.double() / torch.where(length > 0, length, 1.0)
    each = lengths(rows)
    unit = torch.where(each > 0, each, 1.0).unsqueeze(1)
    cosines = torch.zeros_like(each)
    for where, part in columns(rows):
        cosines += part / unit @ direction[where]
    trust = cosines.clamp_min(0)
    total = trust.sum()
    shares = trust / torch.where(total > 0, total, 1.0) * length
    return torch.cat([shares @ (part / unit) for _, part in columns(rows)])
