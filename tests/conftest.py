"""What every test may ask for, and what keeps tests away from the user's files."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded images go to a folder of this session; torch uses one thread: small models gain nothing from two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MITHRIDATE_CACHE", str(tmp_path_factory.mktemp("cache")))
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data that MITHRIDATE_DATA names; tests that need it are skipped without, but not in CI."""
    value = os.environ.get("MITHRIDATE_DATA")
    if value:
        return Path(value)
    if os.environ.get("CI") == "true":
        pytest.fail("MITHRIDATE_DATA is not set: CI must run the tests on real data")
    pytest.skip("MITHRIDATE_DATA is not set: no real data to test on")
