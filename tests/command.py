"""The command line as a test calls it: in this process, or in one of its own."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from mithridate.cli import app as cli
from mithridate.cli import terminal


class Result(NamedTuple):
    """What a call ended with."""

    code: int
    stdout: str
    stderr: str

    @property
    def out(self) -> str:
        """What was printed, white space folded, for lines break where the terminal ends."""
        return " ".join(self.stdout.split())

    @property
    def err(self) -> str:
        return " ".join(self.stderr.split())


def invoke(*arguments: object, columns: int = 300, env: Mapping[str, str] | None = None) -> Result:
    """`mithridate` in this process, which keeps its number of threads. What is no `SystemExit` is raised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.set_num_threads", lambda n: None)
        for console in (terminal.out, terminal.err):  # they read COLUMNS once, when they are made
            patch.setattr(console, "width", columns)
        done = CliRunner().invoke(cli.app, [*map(str, arguments)], env={"COLUMNS": str(columns), **(env or {})})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Result(done.exit_code, done.stdout, done.stderr)


def started(
    *arguments: object, folder: Path, path: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`mithridate` in a process of its own.

    Args:
        arguments: Of the command.
        folder: Where it is called.
        path: One more place that modules are imported from.
        env: Beside this process's environment.
    """
    places = [*([str(path)] if path else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(  # noqa: S603  (our own command)
        [Path(sys.executable).parent / "mithridate", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def python(code: str, *arguments: object, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False)  # noqa: S603  (a test's own code)
