"""The settings of runs as flat text: what all of them share, and what differs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mithridate.bench.store import Run
from mithridate.report.wording import one_line


def config_table(run: Run, name: str) -> Mapping[str, Any]:
    """One table of a run's settings; empty if the run has none of that name."""
    table = run.config.get(name, {})
    return table if isinstance(table, Mapping) else {}


def flattened(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `table.key -> value`, both as text."""
    flat: dict[str, str] = {}
    for key, value in table.items():
        name = f"{prefix}{one_line(key)}"
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            flat[name] = one_line(text)
    return flat


def settings(run: Run) -> dict[str, str]:
    """The run's settings without title, variant (which repeats some of them) and seed, flattened."""
    left_out = {"title", "variant", "run.seed", "run.seeds", "federated.seeds"}
    return {key: value for key, value in flattened(run.config).items() if key not in left_out}


def shared(tables: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The entries that all tables have with the same value."""
    return {key: value for key, value in tables[0].items() if all(table.get(key) == value for table in tables)}


def varying(tables: Sequence[Mapping[str, str]], left_out: Mapping[str, str]) -> dict[str, str]:
    """All entries but some; where the tables disagree, an entry has all their values.

    Args:
        tables: Some runs' settings or environments.
        left_out: Keys to leave out.
    """
    keys = dict.fromkeys(key for table in tables for key in table if key not in left_out)
    return {key: " | ".join(dict.fromkeys(table.get(key, "unset") for table in tables)) for key in keys}
