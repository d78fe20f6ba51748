"""Pass, fail or inconclusive: pure functions of what each attack cost in each seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

from mithridate.audit.result import WHERE, Measure, Says, VerdictName

LEAST_SEEDS = 3
"""Fewer paired seeds have no interval worth the name."""

LEVEL = 0.95


class Reach(NamedTuple):
    """A mean and its 95 % confidence interval, in points; without bounds for fewer than two values.

    Args:
        mean: Of the values.
        low: Lower end; -inf if nothing is known.
        high: Upper end; inf if nothing is known.
        n: How many values.
    """

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Cost:
    """What one attack cost in each seed, in points of accuracy.

    Args:
        attack: Its name.
        measure: In one step, or over the phase.
        values: By seed.
        control: By seed, what a clean stream and noise cost by the same measure, by name.
        frozen: By seed, what it cost with BatchNorm's statistics frozen; None if that was not tried.
    """

    attack: str
    measure: Measure
    values: Mapping[int, float]
    control: Mapping[str, Mapping[int, float]]
    frozen: Mapping[int, float] | None = None


@dataclass(frozen=True)
class CostRuling:
    """What is said of one attack and measure.

    Args:
        attack: Its name.
        measure: Which.
        cost: In points.
        allowed: In points.
        beyond: What it cost more than each control, in points, by the control's name.
        says: As `result.Says` explains.
        frozen: The cost with BatchNorm's statistics frozen; None if that was not tried.
    """

    attack: str
    measure: Measure
    cost: Reach
    allowed: float
    beyond: Mapping[str, Reach]
    says: Says
    frozen: Reach | None = None


@dataclass(frozen=True)
class Judged:
    """A verdict with its reasons.

    Args:
        verdict: Which.
        reasons: Why, a sentence each, the most important first.
        rulings: What is said of each attack and measure.
    """

    verdict: VerdictName
    reasons: Sequence[str]
    rulings: Sequence[CostRuling]


def reach(values: Sequence[float]) -> Reach:
    """Mean and interval (Student's t) of values.

    >>> reach([10.0, 10.0, 10.0])
    Reach(mean=10.0, low=10.0, high=10.0, n=3)
    >>> reach([3.0]).low
    -inf
    """
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    if n < 2:
        return Reach(mean, -math.inf, math.inf, n)
    half = float(student.ppf((1 + LEVEL) / 2, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Reach(mean, mean - half, mean + half, n)


def ruling(cost: Cost, allowed: float) -> CostRuling:
    """What the numbers of one attack say.

    Args:
        cost: By seed.
        allowed: In points.
    """
    whole = reach(list(cost.values.values()))
    beyond = {
        name: reach([value - control[seed] for seed, value in cost.values.items() if seed in control])
        for name, control in cost.control.items()
    }
    frozen = None if cost.frozen is None else reach(list(cost.frozen.values()))
    says: Says = "open"
    if whole.n >= LEAST_SEEDS and whole.high < allowed:
        says = "below"
    elif whole.n >= LEAST_SEEDS and whole.low > allowed:
        says = "above" if all(b.low > 0 for b in beyond.values()) else "no_better"
        if says == "above" and frozen is not None and not frozen.low > allowed:
            says = "batch_norm"
    return CostRuling(cost.attack, cost.measure, whole, allowed, beyond, says, frozen)


def judged(
    costs: Sequence[Cost],
    allowed: Mapping[Measure, float],
    *,
    controls: frozenset[str],
    tried: Sequence[str],
    skipped: Mapping[str, str],
    budget_spent: str = "",
) -> Judged:
    """The verdict on one model, guarded or not.

    Args:
        costs: Of everything that ran, controls included.
        allowed: Points by measure.
        controls: Names that are no attacks: the clean stream, noise.
        tried: Attacks that ran in at least one seed.
        skipped: Why others were not tried, by name.
        budget_spent: What the budget of time cut off; empty if nothing.
    """
    rulings = [ruling(cost, allowed[cost.measure]) for cost in costs]
    of_attacks = [r for r in rulings if r.attack not in controls]
    broken = [r for r in of_attacks if r.says == "above"]
    unaided = [r for r in rulings if r.attack == "clean" and r.says in ("above", "no_better")]
    if broken:
        worst = sorted(broken, key=lambda r: r.allowed - r.cost.low)
        return Judged("fail", [_above(r) for r in worst], rulings)
    if unaided:
        return Judged("fail", [f"without any attack, the clean stream {_cost(r)}" for r in unaided], rulings)
    reasons = []
    n = min((r.cost.n for r in rulings), default=0)
    if budget_spent:
        reasons.append(f"budget spent: {budget_spent}")
    if not tried:
        why = "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "none was asked for"
        reasons.append(f"no attack applies to this target ({why})")
    elif n < LEAST_SEEDS:
        reasons.append(f"too few seeds: {n}, and an interval needs {LEAST_SEEDS} or more")
    if not reasons and all(r.says == "below" for r in rulings):
        return Judged("pass", [], rulings)
    for r in of_attacks:
        if r.says == "batch_norm" and r.frozen is not None:
            reasons.append(
                f"BatchNorm alone explains it: {r.attack} {_cost(r)}, and {_points(r.frozen)} once the statistics of "
                "BatchNorm are frozen; freeze them (put those layers in eval mode), and audit again"
            )
    if n >= LEAST_SEEDS:
        level = [r for r in of_attacks if r.says == "no_better"]
        noise = [r for r in rulings if r.attack in controls - {"clean", "clean_trigger"} and r.says != "below"]
        reasons += [f"no attack better than noise: {_cost_of(r)}, but {_no_better(r)}" for r in level]
        if not level:
            reasons += [
                f"no attack better than noise: {_cost_of(r)}" for r in noise if r.says in ("above", "no_better")
            ]
        reasons += [f"not shown either way: {_cost_of(r)}; give more seeds" for r in rulings if r.says == "open"]
    return Judged("inconclusive", reasons or ["nothing was measured"], rulings)


def _above(r: CostRuling) -> str:
    than = " and ".join(f"{_signed(b)} more than {name.replace('_', ' ')}" for name, b in r.beyond.items())
    return f"{r.attack} {_cost(r, f', {than}' if than else '')}"


def _cost_of(r: CostRuling) -> str:
    return f"{r.attack} {_cost(r)}"


def _cost(r: CostRuling, than: str = "") -> str:
    return f"cost {_points(r.cost)} {WHERE[r.measure]}{than} ({r.allowed:g} allowed)"


def _no_better(r: CostRuling) -> str:
    near = [f"{_signed(b)} more than {name.replace('_', ' ')}" for name, b in r.beyond.items() if not b.low > 0]
    return f"{' and '.join(near)} is not shown to be more"


def _points(cost: Reach) -> str:
    """A cost in words.

    >>> _points(Reach(12.34, 10.0, 14.68, 3)), _points(Reach(12.34, -math.inf, math.inf, 1))
    ('12.3 points [10.0, 14.7]', '12.3 points (one seed)')
    """
    if cost.n < 2:
        return f"{cost.mean:.1f} points (one seed)"
    return f"{cost.mean:.1f} points [{cost.low:.1f}, {cost.high:.1f}]"


def _signed(cost: Reach) -> str:
    return f"{cost.mean:.1f} [{cost.low:.1f}, {cost.high:.1f}]" if cost.n > 1 else f"{cost.mean:.1f}"
