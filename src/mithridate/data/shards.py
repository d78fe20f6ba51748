"""Clients of a federation: samples divided into shards, and which clients take part in a round."""

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mithridate.core.errors import DataError
from mithridate.core.registry import settings
from mithridate.core.seeding import derived_seed
from mithridate.data.stream import Part

TRIES = 100
"""How often a Dirichlet draw that leaves a client without samples is repeated."""


@settings
class Shards:
    """How samples are divided among clients.

    Args:
        clients: How many, >= 1.
        partition: `iid`: equal random shards; `dirichlet`: each class is divided by a Dirichlet draw; `one`: each
            client holds a single sample.
        alpha: Concentration of the Dirichlet draw, > 0: small ones give each client few classes.
        smallest: Samples that every client of a Dirichlet draw must hold, >= 1.

    Source:
        `one`: Pang et al., NeurIPS 2021, Appendix C.1; `dirichlet`: Hsu et al., 2019, arXiv:1909.06335.
    """

    clients: Annotated[int, Field(ge=1)] = 100
    partition: Literal["iid", "dirichlet", "one"] = "iid"
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5
    smallest: Annotated[int, Field(ge=1)] = 1


def divide(part: Part, how: Shards, *, seed: int) -> list[NDArray[np.int64]]:
    """Positions in `part` of each client's samples; no sample has two owners.

    Args:
        part: The samples.
        how: Settings.
        seed: Decides which samples each client gets.

    Raises:
        DataError: There are fewer samples than the clients need, no draw gave every client enough, or a draw by class
            finds no classes.
    """
    if how.partition == "dirichlet" and (part.y.ndim != 1 or part.y.dtype != np.int64):
        raise DataError(
            f"partition = \"dirichlet\" divides by class, and targets of the part '{part.name}' are {part.y.dtype} of "
            f'shape {part.y.shape}, no class numbers; use "iid" or "one".'
        )
    rng = np.random.default_rng(derived_seed("shards", how.partition, seed))
    needed = how.clients * (how.smallest if how.partition == "dirichlet" else 1)
    if needed > len(part):
        raise DataError(
            f"{how.clients} clients need at least {needed} samples, and the part '{part.name}' has {len(part)}: a "
            "shard would be empty. Use fewer clients, or a larger part."
        )
    order = rng.permutation(len(part))
    if how.partition == "one":
        return [order[i : i + 1] for i in range(how.clients)]
    if how.partition == "iid":
        return list(np.array_split(order, how.clients))
    for _ in range(TRIES):
        shards = _dirichlet(part.y[order], how, rng)
        if min(len(shard) for shard in shards) >= how.smallest:
            return [order[shard] for shard in shards]
    raise DataError(
        f"{TRIES} Dirichlet draws with alpha = {how.alpha:g} left one of {how.clients} clients with fewer than "
        f"{how.smallest} of {len(part)} samples; use fewer clients, a larger alpha, or a larger part."
    )


def _dirichlet(labels: NDArray[np.int64], how: Shards, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    owners: list[list[NDArray[np.int64]]] = [[] for _ in range(how.clients)]
    for label in np.unique(labels):
        positions = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(how.clients, how.alpha))
        cuts = (np.cumsum(shares)[:-1] * len(positions)).astype(np.int64)
        for owner, piece in zip(owners, np.split(positions, cuts), strict=True):
            owner.append(piece)
    return [np.concatenate(pieces) for pieces in owners]


def sampled(clients: int, per_round: int, *, round_: int, seed: int) -> NDArray[np.int64]:
    """The clients of one round, drawn without replacement; it depends on the arguments alone.

    Args:
        clients: How many there are.
        per_round: How many take part, >= 1.
        round_: Which round, from 0.
        seed: The run's seed.

    Raises:
        DataError: None, or more than there are, were asked for.
    """
    if not 1 <= per_round <= clients:
        raise DataError(f"{per_round} of {clients} clients asked for in a round; ask for 1 to {clients}.")
    rng = np.random.default_rng(derived_seed("clients of a round", seed, round_))
    return np.sort(rng.choice(clients, per_round, replace=False))
