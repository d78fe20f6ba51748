"""How many samples of a data set go to which part of a stream."""

import math
from collections.abc import Collection, Iterable, Mapping

from mithridate.core.errors import DataError

TRAINING = ("victim", "trusted", "burn_in")
HELD_OUT = ("validation", "test")

Size = int | float
"""A number of samples (int), or a share in (0, 1) of the split that they are cut from (float)."""


def pools(splits: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The parts that are cut from each split, in order; a lone split gives all of them.

    Args:
        splits: Names: `train` and `test`, or a lone one.
    """
    names = tuple(splits)
    if len(names) == 1:
        return {names[0]: TRAINING[:-1] + HELD_OUT + TRAINING[-1:]}
    return {"train": TRAINING, "test": HELD_OUT}


def sizes_by_default(rows: int, asked: Mapping[str, Size | None]) -> dict[str, int]:
    """How a split of a user's own data is divided where nobody says.

    If nobody says how large the burn-in part is, it gets the rest; if that is said, or it is cut from another split,
    the test part gets the rest.

    Args:
        rows: Samples in the split.
        asked: What the user wants of each part that is cut from the split; None: the user does not say.
    """
    sizes = {
        "victim": max(1, min(10_000, 3 * rows // 10)),
        "trusted": min(500, rows // 20),
        "validation": min(500, rows // 20),
        "test": max(1, rows // 5),
    }
    rest = "burn_in" if asked.get("burn_in", 0) is None else "test"
    return {part: size for part, size in sizes.items() if part in asked and part != rest}


def counts(
    asked: Mapping[str, Size | None],
    default: Mapping[str, int | None],
    rows: int,
    *,
    inside: Collection[str] = (),
    where: str,
) -> dict[str, int]:
    """The samples of each part of one split.

    Args:
        asked: What the user wants; None: the default.
        default: Number by part; None, or no entry: all that the others leave.
        rows: Samples in the split.
        inside: Parts that lie inside the burn-in part, and so take no samples from the others.
        where: Names the split in messages.

    Raises:
        DataError: The parts need more samples than there are.
    """
    shares = [size for part, size in asked.items() if isinstance(size, float) and part not in inside]
    if math.fsum(shares) > 1 + 1e-9:
        raise DataError(f"{where}: the shares {_sum(shares)} are more than 1; ask for less.")
    sizes = {part: default.get(part) if size is None else _count(size, rows) for part, size in asked.items()}
    total = sum(size for part, size in sizes.items() if size is not None and part not in inside)
    listing = ", ".join(
        f"{part} {size}{' by default' if asked[part] is None else ''}"
        for part, size in sizes.items()
        if size is not None and part not in inside
    )
    if total > rows:
        raise DataError(f"{where} has {rows} samples, too few for {listing}, {total} in all; ask for fewer.")
    whole = {part: rows - total if size is None else size for part, size in sizes.items()}
    for part, what in (("victim", "to learn online from"), ("test", "to test on")):
        if whole.get(part) == 0:
            raise DataError(f"{where} has {rows} samples, and none is left {what} ({listing}); ask for fewer.")
    for part in whole.keys() & set(inside):
        if whole[part] > whole["burn_in"]:
            inner, outer = f"{part} ({whole[part]})", f"burn_in ({whole['burn_in']})"
            raise DataError(f"{where}: with overlap, {inner} lies inside {outer}; ask for fewer.")
    return whole


def _count(size: Size, rows: int) -> int:
    # 0.29 * 100 is a little less than 29 in binary
    return size if isinstance(size, int) else math.floor(size * rows + 1e-9)


def _sum(shares: Iterable[float]) -> str:
    return " + ".join(f"{share:g}" for share in shares)
