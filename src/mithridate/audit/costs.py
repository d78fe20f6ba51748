"""What everything cost in points of accuracy, from the runs of one side: pure functions."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

from mithridate.audit.attempts import CONTROLS
from mithridate.audit.result import AuditRun, Measure
from mithridate.audit.verdict import Cost

POINTS = 100
"""Points of accuracy in one."""


def costs_of(runs: Sequence[AuditRun]) -> Iterator[Cost]:
    """What everything cost, in points, by attack and measure.

    In one step: the largest fall of accuracy between one step and the next. Over the phase: how much lower accuracy
    ends than on the same stream left clean; of the clean stream itself, than where it began.

    Args:
        runs: Of one side.
    """
    by: dict[tuple[str, bool], dict[int, AuditRun]] = {}
    for one in runs:
        by.setdefault((one.attack, one.frozen), {})[one.seed] = one
    for (name, frozen), of_seed in by.items():
        if frozen:
            continue
        at_once = all(len(one.accuracy) == 2 for one in of_seed.values())
        clean, noise = ("clean_trigger", "noise_trigger") if at_once else ("clean", "noise")
        measures: list[Measure] = ["step"] if at_once else ["step", "phase"]
        for measure in measures:
            values = _values(by, name, clean, measure, frozen=False)
            beside = [other for other in (clean, noise) if other != name and (other, False) in by]
            if name in CONTROLS:
                beside = [other for other in beside if other == clean]
            if measure == "phase":
                beside = [other for other in beside if other != clean]  # it is what the cost is counted from
            control = {other: _values(by, other, clean, measure, frozen=False) for other in beside}
            of_frozen = _values(by, name, clean, measure, frozen=True) if (name, True) in by else None
            yield Cost(name, measure, values, control, of_frozen)


def _values(
    by: Mapping[tuple[str, bool], Mapping[int, AuditRun]], name: str, clean: str, measure: Measure, *, frozen: bool
) -> dict[int, float]:
    """Points by seed; a seed whose clean run is missing is left out where that is compared with."""
    values = {}
    for seed, one in by[name, frozen].items():
        reference = by.get((clean, frozen), {}).get(seed)
        if measure == "step":
            falls = [before - after for before, after in itertools.pairwise(one.accuracy)]
            values[seed] = POINTS * max(falls, default=0.0)
        elif name == clean:
            values[seed] = POINTS * (one.accuracy[0] - one.accuracy[-1])
        elif reference is not None:
            values[seed] = POINTS * (reference.accuracy[-1] - one.accuracy[-1])
    return values
