"""What a stream that nobody attacks does by itself, which every drop and every quiet phase is to be seen against."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from mithridate.bench.store import Run
from mithridate.report.rows import Row, seed
from mithridate.report.wording import MISSING, decimal, number, out_of, points

LEAST_STEPS = 2
"""Steps that a clean stream must have to say anything of how it moves."""

NEGLIGIBLE = 0.01
"""Changes of accuracy below one point are not argued about."""

QUIET_LOSS = 0.05
"""Without a clean stream to compare with, a phase that loses more accuracy than this (a fraction) before the trigger is
not quiet. The phases of Pang et al., Table 1, cost 2 to 5 points."""


@dataclass(frozen=True)
class CleanStream:
    """Accuracy along the clean stream of one cell, of all its seeds.

    Args:
        row: The cell.
        curves: Accuracies by seed, the start first, fractions.
    """

    row: Row
    curves: dict[int | None, list[float]]

    @property
    def low(self) -> float:
        """The lowest accuracy of any seed at any step."""
        return min(min(curve) for curve in self.curves.values())

    @property
    def high(self) -> float:
        """The highest accuracy of any seed at any step."""
        return max(max(curve) for curve in self.curves.values())

    @property
    def loss(self) -> float:
        """By how much it falls below its own start at its lowest, mean over seeds; 0 if it never does."""
        return fmean(curve[0] - min(curve) for curve in self.curves.values())

    @property
    def falls(self) -> list[float]:
        """What each step of each seed cost, a fraction."""
        return [before - after for curve in self.curves.values() for before, after in pairwise(curve)]

    def as_far(self, drop: float) -> tuple[int, int]:
        """How many of its steps cost at least as much as a drop (a fraction), and how many it has."""
        falls = self.falls
        return sum(fall >= drop for fall in falls), len(falls)


def accuracies(run: Run) -> list[float]:
    """Accuracy wherever it was measured, the start first."""
    return [value for step in run.trace if (value := number(step.get("accuracy"))) is not None]


def mean_accuracy(run: Run) -> float | None:
    """Mean accuracy over the steps at which it was measured, the trigger's included; the start is no step."""
    values = [value for step in run.trace[1:] if (value := number(step.get("accuracy"))) is not None]
    return fmean(values) if values else None


def clean_stream(row: Row, rows: Sequence[Row]) -> CleanStream | None:
    """The clean stream of a cell: same data set, model and defence; of several the one with the most steps.

    Args:
        row: An attacked cell, or a clean one.
        rows: All rows.

    Returns:
        None if there is none that took two steps.
    """
    streams: list[CleanStream] = []
    for other in rows:
        if other.attacking or (other.group, other.defence) != (row.group, row.defence):
            continue
        curves = {seed(run): curve for run in other.runs if len(curve := accuracies(run)) > LEAST_STEPS}
        streams += [CleanStream(other, curves)] if curves else []
    return max(streams, key=lambda clean: max(map(len, clean.curves.values())), default=None)


def quiet_limit(row: Row, rows: Sequence[Row]) -> tuple[float, str]:
    """What a phase may lose and still be called quiet, a fraction, and where that comes from, in words.

    It is what the clean stream under the same defence loses by itself, at least a point; without one, `QUIET_LOSS`.
    """
    clean = clean_stream(row, rows)
    if clean is None:
        return QUIET_LOSS, f"no clean stream to compare with, so quiet up to {points(QUIET_LOSS)} points"
    return max(clean.loss, NEGLIGIBLE), f"a clean stream loses up to {points(clean.loss)} by itself"


def is_quiet(row: Row, rows: Sequence[Row]) -> bool:
    """Whether a phase lost no more than `quiet_limit`, and no monitor raised an alarm in it; False if not measured."""
    lost = row.difference("accuracy_start", "accuracy_before_trigger").mean
    return lost is not None and lost <= quiet_limit(row, rows)[0] and not row.alarmed_early()


def clean_range(row: Row, rows: Sequence[Row]) -> str:
    """Lowest and highest accuracy of the cell's clean stream, in percent."""
    clean = clean_stream(row, rows)
    return MISSING if clean is None else f"{points(clean.low)} to {points(clean.high)}"


def clean_falls(row: Row, rows: Sequence[Row]) -> str:
    """How many steps of the cell's clean stream cost as much as its trigger did: `3 of 60 (5 %)`."""
    clean, drop = clean_stream(row, rows), row.statistic("drop").mean
    if clean is None or drop is None or not row.attacking:
        return MISSING
    some, steps = clean.as_far(drop)
    return f"{out_of(some, steps)} ({decimal(100 * some / steps, 0)} %)"
