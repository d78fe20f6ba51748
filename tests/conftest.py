"""What every test may ask for, and what keeps tests away from the user's files."""

import os
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from _pytest.doctest import DoctestModule
from hypothesis import settings

if TYPE_CHECKING:
    from mithridate.data.stream import Stream
    from mithridate.training.learner import Learner

settings.register_profile("seeded", derandomize=True, deadline=None)  # the same examples on every machine, however busy
settings.load_profile("seeded")


@pytest.hookimpl(wrapper=True)
def pytest_collect_file() -> Generator[None, Sequence[pytest.Collector], list[pytest.Collector]]:
    """Look for no doctests in test files.

    That imports a file before it is imported as tests. Where it fails, half of the module stays behind, and the tests
    that it would have held are passed over: without this, a file with a wrong import counted as one skip.
    """
    collectors = yield
    return [collector for collector in collectors if not isinstance(collector, DoctestModule)]


@pytest.fixture(scope="session", autouse=True)
def _sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded images go to a folder that the run's workers share."""
    base = tmp_path_factory.getbasetemp()
    run = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MITHRIDATE_CACHE", str(run / "shared-cache"))
        yield


@pytest.fixture(autouse=True)
def _threads() -> None:
    """Torch has as many threads as the environment says, whatever a command has set in the test before.

    One by default: small models gain nothing from two, and `make test` keeps every core busy as it is.
    """
    torch.set_num_threads(int(os.environ.get("MITHRIDATE_TEST_THREADS", "1")))


@pytest.fixture(scope="session")
def stream() -> "Stream":
    """The toy stream; read only."""
    from mithridate.testing import toy_stream

    return toy_stream(0)


@pytest.fixture(scope="session")
def burned_in(stream: "Stream") -> "Learner":
    """The learner of the toy stream after its burn-in: to be copied, and never changed."""
    from mithridate.testing import toy_learner

    return toy_learner(stream)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data that MITHRIDATE_DATA names; tests that need it are skipped without, but not in CI."""
    value = os.environ.get("MITHRIDATE_DATA")
    if value:
        return Path(value)
    if os.environ.get("CI") == "true":
        pytest.fail("MITHRIDATE_DATA is not set: CI must run the tests on real data")
    pytest.skip("MITHRIDATE_DATA is not set: no real data to test on")
