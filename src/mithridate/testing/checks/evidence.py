"""What is found against a component, kept by rule, so that each check can judge its own."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from mithridate.core.errors import DataError, ThreatModelError, UserError
from mithridate.core.registry import defaults, fields_of

Rule = Literal[
    "runs",
    "needs",
    "inputs",
    "model",
    "gradients",
    "train flags",
    "generators",
    "state",
    "notes",
    "repeats",
    "resumes",
    "batch of one",
    "dtype",
    "labels",
    "budget",
    "use of the budget",
    "domain",
    "partial ratio",
    "shape",
    "screened",
    "company",
    "other inputs",
]
"""What a fault is against."""

LONGEST = 200
"""Characters of a component in a message: those of nested tables are long."""


def named(component: object) -> str:
    """A component by its class and what is not as by default, short enough for a message."""
    if isinstance(component, type) or not dataclasses.is_dataclass(component):
        return getattr(component, "__name__", type(component).__name__)
    usual = defaults(type(component))
    told = [f"{key}={value!r}" for key, value in fields_of(component).items() if value != usual[key]]
    text = f"{type(component).__name__}({', '.join(told)})"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}...)"


class Evidence:
    """Faults of one class, by the rule that they are against."""

    def __init__(self) -> None:
        self._faults: dict[Rule, list[str]] = {}
        self.crashed = False
        """Whether it is no use to try it any further: it raised an error, and would again."""

    def add(self, rule: Rule, component: object, what: str) -> None:
        """Put a fault on record, once.

        Args:
            rule: What it is against.
            component: Whose it is.
            what: The end of a sentence that begins with the component.
        """
        faults = self._faults.setdefault(rule, [])
        fault = f"{named(component)} {what}"
        if fault not in faults:
            faults.append(fault)

    def require(self, rule: Rule) -> None:
        """Raise if there is a fault against a rule.

        Raises:
            AssertionError: Says which.
        """
        faults = self._faults.get(rule, [])
        more = f"; and {len(faults) - 3} more like it" if len(faults) > 3 else ""
        assert not faults, "; ".join(faults[:3]) + more

    @contextmanager
    def trying(self, component: object, crash: Rule = "runs", *, breach: Rule | None = None) -> Iterator[None]:
        """Put on record what the block raises, and go on after it.

        Args:
            component: Whose fault it is.
            crash: The rule that errors are against.
            breach: The one that AssertionErrors are against, which entry points raise at defects of a component; unset:
                the same.
        """
        try:
            yield
        except Exception as error:  # whatever an author's code can raise
            self.crashed = True
            rule, what = crash, f"fails: {error}"
            if isinstance(error, ThreatModelError):
                rule = "needs"
            elif isinstance(error, AssertionError):
                rule = breach or crash
            elif isinstance(error, DataError) and "outside the domain" in str(error):
                rule = "domain"
            elif not isinstance(error, UserError):
                what = f"raises {type(error).__name__}: {error}"
            self.add(rule, component, what)
