"""Which checks a class fails."""

from collections.abc import Callable

import pytest

from mithridate.core.registry import Kind
from mithridate.testing import component_checks

Failing = Callable[[Kind, type], set[str]]


@pytest.fixture(scope="session")
def failing() -> Failing:
    """The names of the checks of a kind that a class fails, without `check_`."""

    def names(kind: Kind, cls: type) -> set[str]:
        failed = set()
        for check in component_checks(kind):
            try:
                check(cls)
            except AssertionError as error:
                failed.add(check.__name__.removeprefix("check_"))
                told = str(error)
            else:
                told = cls.__name__
            assert cls.__name__ in told, f"{check.__name__} does not say who fails: {told}"
        return failed

    return names
