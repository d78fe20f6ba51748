"""For authors of components: a toy stream, and the checks that every component must pass."""

from mithridate.testing.conformance import attack_checks, component_checks, defence_checks, detector_checks
from mithridate.testing.for_aggregators import aggregator_checks
from mithridate.testing.for_update_attacks import update_attack_checks
from mithridate.testing.toy import toy_learner, toy_stream

__all__ = [
    "aggregator_checks",
    "attack_checks",
    "component_checks",
    "defence_checks",
    "detector_checks",
    "toy_learner",
    "toy_stream",
    "update_attack_checks",
]
