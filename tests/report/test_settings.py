from collections.abc import Callable

from mithridate.bench.store import Run
from mithridate.report.settings import flattened, settings, shared, varying

Make = Callable[..., Run]


def test_settings_leave_out_what_names_the_run(make_run: Make) -> None:
    assert settings(make_run(seed=0)) == settings(make_run(seed=1))
    assert settings(make_run())["attack.eps"] == "0.2"


def test_shared_and_varying_split_the_settings() -> None:
    tables = [flattened({"a": {"x": 1, "y": [1, 2]}, "b": "s"}), flattened({"a": {"x": 2, "y": [1, 2]}})]
    assert shared(tables) == {"a.y": "[1, 2]"}
    assert varying(tables, shared(tables)) == {"a.x": "1 | 2", "b": "s | unset"}


def test_seeds_are_no_difference_of_settings(federated: Make) -> None:
    first, second = federated(seed=0), federated(seed=1)
    assert settings(first) == settings(second)
