"""Which row another is compared with: its undefended twin, and the noise that an attack must beat."""

from collections.abc import Iterable, Sequence

from mithridate.report.rows import Row
from mithridate.report.settings import flattened
from mithridate.report.statistic import Statistic

BUDGET_KEYS = ("eps", "norm", "poison_ratio")
"""The settings of an attack that say how much it may change."""

FEDERATED_BUDGET_KEYS = ("poison_ratio", "trigger_scale", "trigger_norm")
"""The settings of an attack on a federation that say how many clients it has, and how long an update they send."""


def undefended(row: Row, among: Iterable[Row]) -> Row | None:
    """The row of the same attack, data set and model without a defence; None if there is none, or it is this one."""
    if row.defence_name == "none":
        return None
    same = (other for other in among if (other.group, other.attack) == (row.group, row.attack))
    return next((other for other in same if other.defence_name == "none"), None)


def budget(row: Row) -> dict[str, tuple[str, ...]]:
    """The budget settings of a cell that its runs record, with all values that occur."""
    tables = [flattened(run.config) for run in row.runs]
    keys = FEDERATED_BUDGET_KEYS if row.federated else BUDGET_KEYS
    every = {key: tuple(dict.fromkeys(v for t in tables if (v := t.get(f"attack.{key}")) is not None)) for key in keys}
    return {key: values for key, values in every.items() if values}


def noise_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """The noise to compare an attack with: same defence; of equal budget if there is such, else the most harmful."""
    noises = [other for other in rows if other.is_noise and other.defence == row.defence and other.statistic("drop").n]
    return max(noises, key=lambda n: (budget(n) == budget(row), n.statistic("drop").mean), default=None)


def noise_bar(row: Row, rows: Sequence[Row]) -> float | None:
    """What an attack's drop must exceed: mean plus std of its noise (0 for a single run); None if there is no noise."""
    noise = noise_of(row, rows)
    drop = Statistic() if noise is None else noise.statistic("drop")
    return None if drop.mean is None else drop.mean + (drop.std or 0)
