"""Burn-ins, which are the same for the tests of a file: they have tests of their own."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("burn-ins")
