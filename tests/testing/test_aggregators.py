"""Every aggregator passes every check, and none has vanished."""

import pytest

from mithridate.core.registry import entries
from mithridate.testing.conformance import Check, component_checks
from mithridate.testing.for_aggregators import aggregator_checks

EXPECTED = {
    "bucketing",
    "bulyan",
    "centered_clipping",
    "fltrust",
    "geometric_median",
    "krum",
    "mean",
    "median",
    "multi_krum",
    "nnm",
    "norm_bounding",
    "trimmed_mean",
}


def test_nothing_has_vanished() -> None:
    assert set(entries("aggregator")) == EXPECTED


@pytest.mark.parametrize("check", [*component_checks(), *aggregator_checks()], ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_aggregator(check: Check, name: str) -> None:
    check(entries("aggregator")[name].cls)
