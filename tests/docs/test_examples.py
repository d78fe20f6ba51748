"""Every example of one file runs, and the guard in it does what it is there for."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

NEEDS = {"plain_loop": "torch", "tabular": "torch", "lightning_loop": "lightning", "hugging_face": "transformers"}
"""The library that an example is about, by the example."""

pytestmark = pytest.mark.slow


def test_every_example_of_one_file_is_run_here() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_an_example(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    done = subprocess.run(  # noqa: S603  (our own example)
        [sys.executable, ROOT / "examples" / f"{name}.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    without, guarded = (
        float(re.findall(rf"^{how} a guard: ([\d.]+)%", done.stdout, re.M)[0]) for how in ("without", "with")
    )
    assert guarded > without + 2, done.stdout
    assert list(tmp_path.iterdir()) == [], "an example leaves nothing behind"
