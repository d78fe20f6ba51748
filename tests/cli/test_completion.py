"""A shell that asks what may follow is told."""

import os
import subprocess
import sys

import pytest

CODE = "import sys; sys.argv = ['mithridate']; from mithridate.cli import main; main()"


@pytest.mark.parametrize(
    ("typed", "word", "offered"),
    [("mithridate re", 1, {"report", "reproduce"}), ("mithridate run --eng", 2, {"--engine"})],
)
def test_bash_is_told_commands_and_options(typed: str, word: int, offered: set[str]) -> None:
    asked = {"_MITHRIDATE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(word)}
    done = subprocess.run(  # noqa: S603  (our own command)
        [sys.executable, "-c", CODE], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert set(done.stdout.split()) == offered, done.stderr
