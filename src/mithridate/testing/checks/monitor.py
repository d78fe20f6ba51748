"""What every monitor must pass."""

import math
from collections.abc import Sequence
from functools import lru_cache

from mithridate.core.watch import Monitor, Reading
from mithridate.testing.checks.evidence import Evidence
from mithridate.testing.checks.subject import Check, entry_of, fresh, named_choices, variants
from mithridate.testing.checks.witness import Witness

START = Reading(0, 0.95, 0.2, None)
QUIET = (START, *(Reading(step, 0.95, 0.2, 0.25) for step in range(1, 8)))
HARMED = (*QUIET, Reading(8, 0.1, 9.0, 12.0))
UNMEASURED = (*QUIET, Reading(8, None, None, 0.25), Reading(9, 0.95, 0.2, 0.25))
NOTHING_LEARNED = (*QUIET, Reading(8, 0.95, 0.2, None))
ONE = (START,)
ODD = tuple(
    (START, Reading(1, value, value, value), Reading(2, 0.95, 0.2, value)) for value in (math.nan, math.inf, 0.0)
)
"""What a run can give at its worst: NaN, infinity, nothing left to learn."""


@lru_cache(maxsize=64)
def exercised(cls: type) -> Evidence:
    """What is found when a monitor reads quiet, odd and few readings in all its settings; tried once."""
    unset = [name for name, default in entry_of(cls).fields.items() if default is None]
    tables = [{}, *entry_of(cls).presets.values(), *named_choices(cls)]
    tables += [{name: value} for name in unset for value in (0.1, 1)]  # unset, some do nothing
    evidence = Evidence()
    with evidence.trying(cls.__name__):
        for monitor in variants(cls, tables):
            with evidence.trying(monitor):
                _watch(monitor, evidence)
            for readings in (ONE, UNMEASURED[:-1], UNMEASURED, *ODD):
                with evidence.trying(monitor):
                    _ask(monitor, readings, evidence)
    return evidence


def _ask(monitor: Monitor, readings: Sequence[Reading], evidence: Evidence) -> str | None:
    """What it says of some readings, watched."""
    given = list(readings)
    with Witness(monitor, evidence).watching("alarm", {}):
        text = monitor.alarm(given)
    if given != list(readings) and all(math.isfinite(r.loss or 0) for r in readings):  # NaN is not equal to itself
        evidence.add("inputs", monitor, "changed the readings that it was given in `alarm`")
    if text is not None and not (isinstance(text, str) and text):
        evidence.add("shape", monitor, f"says {text!r}: give the alarm's text, or None")
    return text


def _watch(monitor: Monitor, evidence: Evidence) -> None:
    """The same readings give the same answer, whatever else was read and whoever reads them."""
    orders = (QUIET, HARMED, NOTHING_LEARNED)
    other = fresh(monitor)
    first = [_ask(monitor, readings, evidence) for readings in orders]
    second = [_ask(other, readings, evidence) for readings in reversed(orders)]
    again = [_ask(monitor, readings, evidence) for readings in orders]
    if not first == again == second[::-1]:
        evidence.add("repeats", monitor, "says something else of the same readings")


def check_says_a_text_or_nothing(cls: type) -> None:
    """An alarm is a text; no alarm is None."""
    exercised(cls).require("shape")


CHECKS: Sequence[Check] = (check_says_a_text_or_nothing,)
