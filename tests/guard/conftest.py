"""What tests of federations share: a grid in this process, and the same draws in each."""

import gc
import logging
import random
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest

collect_ignore = [] if find_spec("flwr") else ["federation.py"]  # doctests are looked for in every module


@pytest.fixture(autouse=True)
def _same_sampling() -> Iterator[None]:
    """Flower draws clients with Python's global generator."""
    state = random.getstate()
    random.seed(0)
    yield
    random.setstate(state)


@pytest.fixture
def make_grid(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes grids. Meanwhile Flower is quiet, and does not collect garbage by force for every single client."""
    from tests.guard.federation import InProcessGrid

    monkeypatch.setattr(gc, "collect", lambda generation=2: 0)
    monkeypatch.setattr(logging.getLogger("flwr"), "disabled", True)
    return InProcessGrid
