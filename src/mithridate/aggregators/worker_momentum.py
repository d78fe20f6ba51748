"""Worker momentum: each client's update averaged over its own past ones, so that attacks cannot hide in the noise."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mithridate.core.aggregator import Context
from mithridate.core.errors import CheckpointError

Beta = Annotated[float, Field(ge=0, lt=1)]

CLIENTS, ROWS = "momentum.clients", "momentum.rows"


def with_momentum(rows: Tensor, context: Context, beta: float) -> Tensor:
    """Each row as (1 - beta) times itself plus beta times what this gave for its client last time.

    In the papers the clients do this. Here the server does it for them, and no client can lie about its past: it keeps
    one row for each client that it ever saw. A client's first row is taken as it is, so that a first round is not
    shorter than the others, and a client that is absent keeps its momentum.

    Args:
        rows: (n, P).
        context: Its `memory` is written to.
        beta: In [0, 1); 0 gives the rows back and keeps nothing.

    Raises:
        CheckpointError: The notes are of rows of another length.

    Source:
        Karimireddy et al., ICML 2021, arXiv:2012.10333, section 5 and Algorithm 2.
    """
    if beta == 0:
        return rows
    ids = context.clients.to(rows.device)
    known = context.memory.get(CLIENTS, ids.new_empty(0)).to(rows.device)
    past = context.memory.get(ROWS, rows.new_empty(0, rows.shape[1])).to(rows)
    if past.shape[1] != rows.shape[1]:
        raise CheckpointError(
            f"the kept worker momentum has {past.shape[1]} parameters and this round's rows have {rows.shape[1]}: it "
            "is another model's; start with empty notes."
        )
    same = ids.unsqueeze(1) == known
    now, before = same.nonzero(as_tuple=True)
    moved = rows.clone()
    moved[now] = (1 - beta) * rows[now] + beta * past[before]
    absent = ~same.any(0)
    context.memory[CLIENTS] = torch.cat([known[absent], ids])
    context.memory[ROWS] = torch.cat([past[absent], moved])
    return moved
