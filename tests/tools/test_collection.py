"""That a file of tests which cannot be imported is an error, and not left out."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_test_file_that_cannot_be_imported_fails(tmp_path: Path) -> None:
    """With our own options and hooks: pytest had found the half of the module that was imported, and no test in it."""
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    (tmp_path / "tests" / "test_broken.py").write_text("from math import nothing\n\n\ndef test_one(): ...\n")
    (tmp_path / "tests" / "test_whole.py").write_text("def test_two(): ...\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)  # noqa: S603  (our own)
    assert done.returncode == pytest.ExitCode.INTERRUPTED, done.stdout
    assert "cannot import name 'nothing'" in done.stdout
