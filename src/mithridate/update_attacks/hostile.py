"""What attacks on federated rounds share: how many clients are hostile, and how they share out what they want."""

import math
from abc import ABC
from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from mithridate.core.errors import DataError
from mithridate.core.registry import settings
from mithridate.core.update_attack import Honest, UpdateAttack
from mithridate.maths.norms import sample_norms

Share = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Length = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@settings
class HostileShare(UpdateAttack, ABC):
    """A share of each round's clients is hostile.

    Args:
        poison_ratio: Share of each round's clients that are hostile, in [0, 1], rounded up to a whole client.
    """

    poison_ratio: Share = 0.1

    @property
    def ratio(self) -> float:
        """The share of hostile clients."""
        return self.poison_ratio


def shared_out(wanted: Tensor, honest: Honest) -> Tensor:
    """Rows of the hostile clients that make the round's mean what is wanted, the honest rows being what they are.

    The recovered offset: whatever the honest clients add is taken away again, in equal parts. Where the server bounds
    every row by an l2 norm, or clamps its entries, and the wanted sum is out of reach, rows that point to what is
    missing are still the best that can be sent, since the bound keeps their direction (or each entry's sign).

    Args:
        wanted: (parameters,), the mean over all clients.
        honest: The round.

    Returns:
        (hostile clients, parameters), all rows views of one.

    Source:
        Pang et al., NeurIPS 2021, section 3.3, Eq. (14), and Appendix C.1 to C.3.
    """
    missing = wanted * honest.clients - honest.bounded_total
    return (missing / honest.hostile).expand(honest.hostile, -1)


def scaled(update: Tensor, factor: float, length: float | None) -> Tensor:
    """An update times a factor, or at a given l2 length; an update of zero has no direction, and stays zero."""
    if length is None:
        return factor * update
    now = float(sample_norms(update.unsqueeze(0), "l2"))
    return update * (length / now) if now > 0 else update


def zero_sum(rows: Tensor, spread: float, rng: Generator) -> Tensor:
    """Random rows that sum to zero, so that clients which want the same do not send the same.

    Args:
        rows: Gives number, length, type and device.
        spread: Length of a random row relative to the mean length of `rows`, >= 0.
        rng: The draw.

    Source:
        Pang et al., NeurIPS 2021, Algorithm 2, the vectors M_t^n.
    """
    if spread == 0 or len(rows) < 2:
        return torch.zeros_like(rows)
    drawn = torch.randn(rows.shape, generator=rng, dtype=rows.dtype).to(rows.device)
    drawn -= drawn.mean(0)
    length = float(torch.linalg.vector_norm(rows, dim=1).mean())
    return drawn * (spread * length / math.sqrt(rows.shape[1]))


def every_honest_row(honest: Honest) -> Tensor:
    """Each honest client's update, (honest clients, parameters), for attacks that look at every one.

    Raises:
        DataError: There is no honest client, or the round is too large to be held at once.
    """
    if honest.rows is None or len(honest.rows) == 0:
        raise DataError(
            "this attack looks at every honest client's update, and there is none to look at: lower poison_ratio, or "
            "use fewer clients or more memory (max_matrix)."
        )
    return honest.rows
