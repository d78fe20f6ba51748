"""One call checks a component: which one is meant, and what is said of its faults."""

from collections.abc import Sequence

import pytest

from mithridate.core import registry
from mithridate.core.errors import ConfigError
from mithridate.core.registry import KINDS, Kind, entries, register, settings
from mithridate.core.watch import Reading
from mithridate.defences.clip import Clip
from mithridate.monitors.accuracy_floor import AccuracyFloor
from mithridate.testing import check_component, clean_cost, component_checks


@settings
class Faulty(AccuracyFloor):
    """Says too much"""

    def alarm(self, readings: Sequence[Reading]) -> str | None:
        if len(readings) == 1:
            raise KeyError("first")
        return ""


def test_by_class_by_name_and_by_name_and_kind() -> None:
    check_component(AccuracyFloor)
    check_component("accuracy_floor")
    check_component("accuracy_floor", kind="monitor")


def test_all_faults_are_told_with_their_checks() -> None:
    with pytest.raises(AssertionError) as caught:
        check_component(Faulty)
    told = str(caught.value)
    assert told.startswith("monitor Faulty (Faulty) fails 3 of ")
    assert "- check_described: Faulty has no one-line description" in told
    assert "- check_runs: Faulty() raises KeyError: 'first'" in told
    assert "- check_says_a_text_or_nothing: Faulty() says ''" in told


def test_a_class_that_a_plugin_registers_is_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._entries, "monitor", dict(entries("monitor")))

    @register("monitor", "of_a_plugin", presets={"bad": {"floor": 7.0}})
    @settings
    class OfAPlugin(AccuracyFloor):
        """Alarm when accuracy is below a floor.

        Source:
            These tests.
        """

    with pytest.raises(AssertionError, match=r"monitor of_a_plugin \(OfAPlugin\) fails .*\n- check_round_trip"):
        check_component("of_a_plugin")


def test_a_name_of_two_kinds_needs_the_kind() -> None:
    with pytest.raises(ConfigError, match="'clean' is the name of attack and update_attack"):
        check_component("clean")


def test_a_name_of_nothing_and_a_class_of_nothing() -> None:
    with pytest.raises(ConfigError, match="no component is named 'klip'"):
        check_component("klip")
    with pytest.raises(ConfigError, match="did you mean 'clip'"):
        check_component("clipp", kind="defence")
    with pytest.raises(ConfigError, match="dict is no component: derive it from one of Aggregator, Attack"):
        check_component(dict)


def test_a_wrong_kind_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'defence'"):
        component_checks("defense")  # type: ignore[arg-type]  # the mistake


@pytest.mark.parametrize("kind", KINDS)
def test_checks_have_names_and_say_what_they_are_for(kind: Kind) -> None:
    names = [check.__name__ for check in component_checks(kind)]
    assert len(set(names)) == len(names)
    assert all(name.startswith("check_") for name in names)
    assert all((check.__doc__ or "").strip().endswith(".") for check in component_checks(kind))


def test_a_defence_that_is_off_costs_nothing_and_one_that_stops_learning_does() -> None:
    off = clean_cost(Clip(**Clip.neutral), seeds=range(2))
    assert off == (0.0, (0.0, 0.0))
    still = clean_cost(Clip(clip_norm=1e-6), seeds=range(2))
    assert len(still.each) == 2
    assert still.mean == pytest.approx(sum(still.each) / 2)
    assert any(cost != 0 for cost in still.each)
