"""The checks themselves: each refuses a rule that has the fault that it is there for."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from mithridate.aggregators.mean import Mean
from mithridate.aggregators.median import Median
from mithridate.core import registry
from mithridate.core.aggregator import Aggregator, Context, Property, Spread
from mithridate.core.registry import entries, register, settings
from mithridate.testing import for_aggregators as checks
from mithridate.testing.conformance import Check


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Wrong rules are registered in a copy that is thrown away."""
    monkeypatch.setattr(registry, "_entries", {**registry._entries, "aggregator": dict(entries("aggregator"))})
    yield
    checks.variants.cache_clear()


@settings
class Boast(Mean):
    """A mean that says it is a median."""

    average: ClassVar[bool] = False

    def most_hostile(self, n: int) -> int:
        return (n - 1) // 2

    def leeway(self, honest: Spread, n: int, context: Context) -> float:
        return 0.0


@settings
class First(Median):
    """Takes whoever answered first."""

    def combine(self, rows: Tensor, context: Context) -> Tensor:
        return rows[0].clone()


@settings
class Modest(Median):
    """Declares a fault that it has not."""

    unmet: ClassVar[Mapping[Property, str]] = {"scale": "for no reason that anyone could give"}


@settings
class Shrinking(Median):
    """Forgets to say that it pulls everything towards zero."""

    def combine(self, rows: Tensor, context: Context) -> Tensor:
        made = super().combine(rows, context)
        return made.div(1 + made.norm())


@settings
class Scribbler(Median):
    """Sorts what it was given in place."""

    def combine(self, rows: Tensor, context: Context) -> Tensor:
        rows.copy_(rows.sort(dim=0).values)
        return super().combine(rows, context)


@settings
class Gambler(Median):
    """Draws from the global generator."""

    def combine(self, rows: Tensor, context: Context) -> Tensor:
        return super().combine(rows, context) + 1e-12 * torch.randn(rows.shape[1], dtype=rows.dtype)


@settings
class Silent(Mean):
    """Does not say that it uses weights."""

    weighted: ClassVar[bool] = False


@settings
class Coy(Median):
    """Says that it is no better than a mean."""

    average: ClassVar[bool] = True

    def most_hostile(self, n: int) -> int:
        return 0


@pytest.mark.parametrize(
    ("cls", "check"),
    [
        (Boast, checks.check_hostile_rows),
        (First, checks.check_any_order),
        (Modest, checks.check_scale),
        (Shrinking, checks.check_scale),
        (Shrinking, checks.check_translation),
        (Shrinking, checks.check_consensus),
        (Scribbler, checks.check_rule_leaves_the_world_alone),
        (Gambler, checks.check_rule_leaves_the_world_alone),
        (Gambler, checks.check_rule_repeats),
        (Silent, checks.check_weights),
        (Coy, checks.check_average_is_declared),
    ],
)
def test_a_faulty_rule_is_caught(cls: type[Aggregator], check: Check) -> None:
    put: Callable[[Any], Any] = register("aggregator", "faulty")
    made = put(cls)
    with pytest.raises(AssertionError, match=cls.__name__):
        check(made)
