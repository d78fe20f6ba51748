"""Which runs a table's cell, a figure's line or a claim is about, and which number of them."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import fmean
from typing import Any

from mithridate.bench.changes import ARRAYS, TABLES, toml_value
from mithridate.bench.recipe import Cell
from mithridate.bench.store import Run
from mithridate.core.errors import ConfigError, nearest, shown
from mithridate.core.settings import UNSET, by_path
from mithridate.report.rows import seed
from mithridate.reproduce.quantities import check_measure, quantity

LABELS = ("attack", "defence")
"""What a run is called by; a label that a grid made of another one begins with it, a plus sign and a setting."""

Place = tuple[int | None, str]
"""Seed and variant of a run."""


@dataclass(frozen=True)
class Selection:
    """Some runs, and a number of each.

    Args:
        where: What must all be so: of a label (`attack`, `defence`), `variant` or path of a setting (`run.lr`), the
            values that are accepted.
        measure: Which number; empty if only the runs are meant.
        detector: Of which detector; empty for the only one.
    """

    where: Sequence[tuple[str, Sequence[Any]]] = ()
    measure: str = ""
    detector: str = ""

    @classmethod
    def of(cls, table: Mapping[str, Any], *, where: str) -> "Selection":
        """From a table such as `{attack = "ours", run.lr = [0.1, 0.01], measure = "drop"}`.

        Args:
            table: Conditions as they stand in a file.
            where: Begins messages.

        Raises:
            ConfigError: Unknown table or measure, or a value that nothing can be compared with.
        """
        flat = by_path(table)
        measure, detector = (_text(flat.pop(key, ""), f"{where}: {key}") for key in ("measure", "detector"))
        if measure:
            check_measure(measure)
        for path in flat:
            first = path.partition(".")[0]
            if first not in (*TABLES, "variant") or ("." not in path and path not in (*LABELS, "variant")):
                raise ConfigError(f"{where}: unknown condition '{path}': {nearest(first, (*TABLES, 'variant'))}")
            if first in ARRAYS and first not in LABELS:
                raise ConfigError(f"{where}: [{first}] has parts; choose by attack, defence, detector or variant.")
        return cls([(path, v if isinstance(v, list) else [v]) for path, v in flat.items()], measure, detector)

    @classmethod
    def asked(cls, conditions: Sequence[str]) -> "Selection":
        """From conditions on a command line, all of which must be so.

        Args:
            conditions: `PATH=VALUE` or `PATH=VALUE,VALUE`: such as `defence=none,dsc` or `run.lr=0.1`.

        Raises:
            ConfigError: No `=` or no value, or an unknown table.
        """
        chosen = cls()
        for condition in conditions:
            path, _, text = (part.strip() for part in condition.partition("="))
            values = [toml_value(value.strip()) for value in text.split(",") if value.strip()]
            where = f"--only {condition[:80]}"
            if not values or path in {"measure", "detector"}:
                raise ConfigError(f"{where}: write a label or setting and its values, such as defence=none,dsc.")
            chosen = chosen.joined(cls.of({path: values}, where=where))
        return chosen

    def joined(self, other: "Selection") -> "Selection":
        """What both ask for; measure and detector are the other's, if it names them."""
        return Selection([*self.where, *other.where], other.measure or self.measure, other.detector or self.detector)

    def picks(self, run: Run) -> bool:
        """Whether a run is among them."""
        return self.fits(run.summary, run.config)

    def picks_cell(self, cell: Cell) -> bool:
        """Whether a run that is yet to be made would be among them."""
        return self.fits({"attack": cell.attack.label, "defence": cell.defence.label}, cell.config())

    def fits(self, labels: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
        """Whether a run is among them that is called so and has these settings.

        Args:
            labels: Of `attack` and `defence`.
            config: Its settings.
        """
        return all(any(_fits(labels, config, path, v) for v in values) for path, values in self.where)

    def runs(self, runs: Iterable[Run]) -> list[Run]:
        """Those of some runs."""
        return [run for run in runs if self.picks(run)]

    def by_place(self, runs: Iterable[Run]) -> dict[Place, float]:
        """The number by seed and variant; the mean where several runs share both."""
        values: dict[Place, list[float]] = defaultdict(list)
        for run in self.runs(runs):
            value = quantity(run, self.measure, detector=self.detector)
            if value is not None:
                values[seed(run), str(run.config.get("variant", ""))].append(value)
        return {place: fmean(several) for place, several in values.items()}


def by_seed(values: Mapping[Place, float]) -> dict[int | None, float]:
    """One number a seed: the mean over variants."""
    seeds: dict[int | None, list[float]] = defaultdict(list)
    for (number, _), value in values.items():
        seeds[number].append(value)
    return {number: fmean(several) for number, several in seeds.items()}


def paired(several: Sequence[Mapping[Place, float]]) -> list[list[float]]:
    """Numbers of the same seed side by side, a list a seed.

    Where all come from the same variants of a grid, those of one variant are compared with each other, and means over
    variants are taken afterwards by whoever compares; here each is averaged over the variants that all have.

    Args:
        several: What is compared, by seed and variant.
    """
    common = set.intersection(*map(set, several)) if several else set()
    shared = [{place: values[place] for place in common} if common else values for values in several]
    means = [by_seed(values) for values in shared]
    seeds = sorted(set.intersection(*map(set, means)), key=str) if means else []
    return [[mean[number] for mean in means] for number in seeds]


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where} = {shown(value)}: give a text.")
    return value


def setting_of(run: Run, path: str) -> object:
    """A label (`attack`, `defence`), the variant, or a setting by its path; None if the run has not got it."""
    return _setting(run.summary, run.config, path)


def _setting(labels: Mapping[str, Any], config: Mapping[str, Any], path: str) -> object:
    if path in LABELS:
        return labels.get(path)
    value: object = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _fits(labels: Mapping[str, Any], config: Mapping[str, Any], path: str, wanted: object) -> bool:
    """Whether a setting is as wanted; of a label, also whether one that a recipe multiplied was called so before."""
    value = _setting(labels, config, path)
    if _equal(value, wanted):
        return True
    if path not in LABELS or not isinstance(value, str) or not value.startswith(f"{wanted}+"):
        return False
    added = value.removeprefix(f"{wanted}+")
    table, rule = config.get(path), _setting(labels, config, "federated.rule")
    keys = set(table) - {"label"} if isinstance(table, Mapping) else set()
    names = [part.get("label", part.get("name")) for part in (table, rule) if isinstance(part, Mapping)]
    # A grid adds KEY-VALUE, TABLE.KEY-VALUE or a component; a list of rules or surrogates adds the label of each.
    return (
        any(added.startswith((f"{key}-", f"{path}.{key}-")) for key in keys)
        or any(re.match(rf"{re.escape(name)}($|[+-])", added) for name in names if isinstance(name, str))
        or (path == "attack" and "surrogate" in config and "+" not in added)
    )


def _equal(value: object, wanted: object) -> bool:
    if value is None or wanted is None:
        return wanted in (None, UNSET)
    numbers = [_number(value), _number(wanted)]
    if numbers[0] is not None and numbers[1] is not None:
        return math.isclose(numbers[0], numbers[1], rel_tol=1e-9)
    return value == wanted


def _number(value: object) -> float | None:
    """A number, also one that is written as a fraction; truth values are none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    try:
        return float(Fraction(value)) if isinstance(value, str) and "/" in value else None
    except (ValueError, ZeroDivisionError):
        return None
