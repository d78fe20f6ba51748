"""For authors of components: what every component must pass, a toy stream, and what a defence costs on clean ones."""

from mithridate.testing.conformance import check_component, component_checks
from mithridate.testing.cost import CleanCost, clean_cost
from mithridate.testing.toy import toy_learner, toy_stream

__all__ = ["CleanCost", "check_component", "clean_cost", "component_checks", "toy_learner", "toy_stream"]
