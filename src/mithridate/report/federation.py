"""The order of the paper's federated results: defences by their bound, attacks by their strength."""

from collections.abc import Sequence

from mithridate.report.rows import Row
from mithridate.report.wording import number

NORMS = ("l2", "linf")
"""The norms of clipping, in the order of the paper's tables."""


def by_bound(rows: Sequence[Row]) -> list[Row]:
    """Rows in the order of the paper's columns: no clipping, l2 bounds from wide to narrow, linf bounds, the others."""

    def place(row: Row) -> tuple[int, int, float, str]:
        defence = row.defence_settings
        bound, norm = number(defence.get("clip_norm")), str(defence.get("norm"))
        if row.defence_name == "none":
            return 0, 0, 0.0, ""
        if row.defence_name == "clip" and bound is not None and norm in NORMS:
            return 1, NORMS.index(norm), -bound, row.defence
        return 2, 0, 0.0, row.defence

    return sorted(rows, key=place)


def by_strength(rows: Sequence[Row]) -> list[Row]:
    """No attack, poisoned triggers, accumulative phases; in those by trigger, loss scaling and number of rounds."""

    def place(row: Row) -> tuple[int, str, float, float]:
        rank = {"clean": 0, "direct": 1}.get(row.attack_name, 2)
        scaling = number(row.attack_settings.get("trigger_scale" if rank == 1 else "lam"))
        return rank, attack_setting(row, "trigger"), scaling or 0.0, row.mean_steps

    return sorted(rows, key=place)


def attack_setting(row: Row, key: str) -> str:
    """One of the attack's settings in words; empty if it is unset."""
    value = row.attack_settings.get(key)
    return "" if value is None else f"{value:g}" if isinstance(value, int | float) else str(value)
