"""A folder of items like the package's own."""

from pathlib import Path

import pytest

from tests.reproduce.made import item_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One item with its base and published numbers."""
    return item_folder(tmp_path)
