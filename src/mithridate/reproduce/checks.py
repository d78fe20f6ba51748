"""What a paper claims, as checks on our runs; and what the runs say to each."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from scipy.special import stdtrit

from mithridate.bench.store import Run
from mithridate.core.errors import ConfigError, nearest, shown
from mithridate.reproduce.selection import Selection, paired

CONFIDENCE = 0.95
"""Of every interval: the share of such intervals that hold the true mean, were seeds normally distributed."""


class Ruling(StrEnum):
    """What the runs say to a claim."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNDECIDED = "not decided"
    ABSENT = "not run"


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % confidence interval (Student's t).

    Args:
        mean: Over seeds.
        low: Lower end; -inf for a single seed.
        high: Upper end; inf for a single seed.
        values: One a seed.
    """

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Of at least one value; of a single one, the interval is the whole line."""
        mean, n = fmean(values), len(values)
        half = math.inf if n < 2 else float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * stdev(values) / math.sqrt(n)
        return cls(mean, mean - half, mean + half, tuple(values))


@dataclass(frozen=True)
class RangeTest:
    """One quantity that must lie in a range.

    Args:
        selections: What it is computed of, side by side, seed by seed.
        quantity: From one seed's numbers.
        low: Least value.
        high: Largest value.
        strict: Whether the ends themselves are outside.
    """

    selections: Sequence[Selection]
    quantity: Callable[[Sequence[float]], float]
    low: float
    high: float
    strict: bool = False

    def interval(self, runs: Sequence[Run]) -> Interval | None:
        """Over the seeds that have all of it; None without any."""
        rows = paired([selection.by_place(runs) for selection in self.selections])
        values = [value for row in rows if math.isfinite(value := self.quantity(row))]
        return Interval.of(values) if values else None

    def outcome(self, interval: Interval | None) -> Ruling:
        """Whether the whole interval is inside the range, outside, or neither."""
        if interval is None:
            return Ruling.ABSENT
        low, high = interval.low, interval.high
        if (self.low < low and high < self.high) or (not self.strict and self.low <= low and high <= self.high):
            return Ruling.HOLDS
        if high < self.low or low > self.high or (self.strict and (high <= self.low or low >= self.high)):
            return Ruling.FAILS
        return Ruling.UNDECIDED


@dataclass(frozen=True)
class Judgement:
    """What the runs say to one claim.

    Args:
        says: The claim.
        outcome: Of all its parts.
        intervals: Of each part; None where nothing was run.
        unit: What the numbers are.
    """

    says: str
    outcome: Ruling
    intervals: Sequence[Interval | None]
    unit: str

    @property
    def n(self) -> int:
        """Seeds of the part that has the fewest."""
        return min((len(i.values) if i else 0 for i in self.intervals), default=0)


@dataclass(frozen=True)
class Check:
    """A claim that runs can speak to.

    Args:
        says: In one sentence.
        unit: What is looked at: `difference`, `ratio` or `value`.
        parts: All of them must be so.
    """

    says: str
    unit: str
    parts: Sequence[RangeTest]

    @classmethod
    def of(cls, table: Mapping[str, Any], *, where: str) -> "Check":
        """From a table with `says` and one of `greater`, `increasing`, `ratio`, `within`, `close`.

        Raises:
            ConfigError: None of these or several, or a key that does not belong to it.
        """
        values = dict(table)
        says = values.pop("says", None)
        if not isinstance(says, str) or not says:
            raise ConfigError(f"{where}: a check needs says, its claim in one sentence.")
        kinds = [kind for kind in KINDS if kind in values]
        if len(kinds) != 1:
            raise ConfigError(f"{where} '{says}': give one of {', '.join(KINDS)}.")
        (kind,) = kinds
        what = values.pop(kind)
        tables = [what] if kind == "within" else what
        if not isinstance(tables, list) or not all(isinstance(t, Mapping) for t in tables):
            raise ConfigError(f"{where} '{says}': {kind} = {shown(what)}: give tables that choose runs.")
        selections = [Selection.of(t, where=f"{where} '{says}'") for t in tables]
        if any(not selection.measure for selection in selections):
            raise ConfigError(f"{where} '{says}': each choice of runs needs a measure.")
        least = {"within": 1, "greater": 2, "ratio": 2, "close": 2, "increasing": 2}[kind]
        if len(selections) < least or (kind != "increasing" and len(selections) > least):
            raise ConfigError(f"{where} '{says}': {kind} compares {least}, and {len(selections)} are given.")
        keys, make = KINDS[kind]
        for key, value in values.items():
            if key not in keys:
                raise ConfigError(f"{where} '{says}': unknown key '{key}': {nearest(key, keys)}")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{where} '{says}': {key} = {shown(value)}: give a number.")
        if missing := [key for key in ("by",) if kind == "close" and key not in values]:
            raise ConfigError(f"{where} '{says}': close needs {missing[0]}.")
        return cls(says, {"within": "value", "ratio": "ratio"}.get(kind, "difference"), make(selections, **values))

    def verdict(self, runs: Sequence[Run]) -> Judgement:
        """What some runs say to it."""
        intervals = [part.interval(runs) for part in self.parts]
        outcomes = [part.outcome(interval) for part, interval in zip(self.parts, intervals, strict=True)]
        order = (Ruling.FAILS, Ruling.ABSENT, Ruling.UNDECIDED, Ruling.HOLDS)  # the first of them that occurs
        return Judgement(self.says, min(outcomes, key=order.index), intervals, self.unit)


def _difference(row: Sequence[float]) -> float:
    return row[0] - row[1]


def _ratio(row: Sequence[float]) -> float:
    return row[0] / row[1] if row[1] else math.nan


def _greater(selections: Sequence[Selection], by: float | None = None) -> list[RangeTest]:
    """The first is above the second; with `by`, by that much or more: 0 is "as high, or higher"."""
    return [RangeTest(selections, _difference, by or 0, math.inf, strict=by is None)]


def _increasing(selections: Sequence[Selection], by: float | None = None) -> list[RangeTest]:
    return [part for below, above in pairwise(selections) for part in _greater((above, below), by)]


def _in_ratio(
    selections: Sequence[Selection], at_least: float = -math.inf, at_most: float = math.inf
) -> list[RangeTest]:
    return [RangeTest(selections, _ratio, at_least, at_most)]


def _within(selections: Sequence[Selection], low: float = -math.inf, high: float = math.inf) -> list[RangeTest]:
    return [RangeTest(selections, lambda row: row[0], low, high)]


def _close(selections: Sequence[Selection], by: float) -> list[RangeTest]:
    return [RangeTest(selections, _difference, -by, by)]


KINDS: Mapping[str, tuple[Sequence[str], Callable[..., list[RangeTest]]]] = {
    "greater": (("by",), _greater),
    "increasing": (("by",), _increasing),
    "ratio": (("at_least", "at_most"), _in_ratio),
    "within": (("low", "high"), _within),
    "close": (("by",), _close),
}
"""Kinds of checks: the keys that each takes, and its parts."""
