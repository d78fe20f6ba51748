"""Messages and the family of errors that the command line prints without a traceback."""

import inspect

import pytest

from mithridate.core import errors
from mithridate.core.errors import UserError, nearest


def test_every_error_is_a_users_error_with_a_docstring() -> None:
    found = {name: e for name, e in vars(errors).items() if inspect.isclass(e) and issubclass(e, Exception)}
    assert set(found) == {
        "UserError",
        "ConfigError",
        "DataError",
        "CheckpointError",
        "DeviceError",
        "StoreError",
        "WriteError",
        "BusyError",
        "ComponentError",
        "EngineError",
        "ThreatModelError",
    }
    for error in found.values():
        assert issubclass(error, UserError)
        assert error.__doc__
        assert str(error("what, where, what to do")) == "what, where, what to do"
    assert not issubclass(UserError, (ValueError, OSError, AssertionError)), (
        "an `except ValueError` must not swallow it"
    )


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("epz", ["steps", "eps"], "did you mean 'eps'? Known: eps, steps."),
        ("momentun", ["lam", "momentum"], "did you mean 'momentum'? Known: lam, momentum."),
        ("zzz", ["steps", "eps"], "Known: eps, steps."),
        ("", ["b", "a"], "Known: a, b."),
        ("eps", [], "Known: none."),
        ("stps", {"steps": 1, "step_size": 2}, "did you mean 'steps'? Known: step_size, steps."),
    ],
)
def test_nearest(name: str, known: list[str], message: str) -> None:
    assert nearest(name, known) == message
    assert nearest(name, iter(known)) == message
