"""Ctrl-C: the exit code is 130, there is no traceback, and the command goes on where it was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.recipes import tiny_text

LONG = tiny_text(
    '[attack]\nname = "accumulative"\nsteps = 50\n', "data.victim=1000", "data.batch_size=1", "run.steps=900"
)

START = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
"""A background job of a shell inherits that interrupts are ignored."""


def interrupted(code: str, ready: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Send one interrupt to a process once it has printed a word, or made a file of that name."""
    log = folder / "out.txt"
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(  # noqa: S603  (a fixed command)
            [sys.executable, "-c", START + code],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
        )
        deadline = time.monotonic() + 120
        while ready not in log.read_text(encoding="utf-8") and not list(folder.rglob(ready)):
            assert process.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    return subprocess.CompletedProcess([], process.returncode, log.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("module", ["typer", "torch", "mithridate.bench.engine"])
def test_an_interrupt_in_an_import_is_no_traceback(tmp_path: Path, module: str) -> None:
    """The import stands still until it is interrupted."""
    code = (
        "import sys, time, importlib.abc\n"
        "class Slow(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}:\n"
        "            print('READY', flush=True)\n"
        "            time.sleep(60)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "sys.argv = ['mithridate', 'run', 'r.toml']\n"
        "from mithridate.cli import main\n"
        "main()\n"
    )
    (tmp_path / "r.toml").write_text(LONG, encoding="utf-8")
    done = interrupted(code, "READY", tmp_path)
    assert done.returncode == 130
    assert "Traceback" not in done.stdout
    assert "interrupted" in done.stdout


def test_an_interrupt_that_a_finaliser_swallows_is_heard_all_the_same(tmp_path: Path) -> None:
    code = (
        "import time, mithridate.cli.app as app\n"
        "class Held:\n"
        "    def __del__(self):\n"
        "        print('READY', flush=True)\n"
        "        time.sleep(30)\n"
        "def command():\n"
        "    Held()\n"
        "    print('GOES ON', flush=True)\n"
        "    time.sleep(30)\n"
        "app.main = command\n"
        "from mithridate.cli import main\n"
        "main()\n"
    )
    start = time.monotonic()
    done = interrupted(code, "READY", tmp_path)
    assert done.returncode == 130
    assert "GOES ON" in done.stdout
    assert "interrupted" in done.stdout
    assert "Traceback" not in done.stdout
    assert "ignored" not in done.stdout
    assert time.monotonic() - start < 30, "it does not wait until the command has ended by itself"


def test_an_error_that_foreign_code_makes_of_an_interrupt_is_no_traceback(tmp_path: Path) -> None:
    code = (
        "import sys, time, mithridate.cli.app as app\n"
        "def command():\n"
        "    try:\n"
        "        print('READY', flush=True)\n"
        "        time.sleep(60)\n"
        "    except KeyboardInterrupt:\n"
        "        raise RuntimeError('some library') from None\n"
        "app.main = command\n"
        "from mithridate.cli import main\n"
        "main()\n"
    )
    done = interrupted(code, "READY", tmp_path)
    assert done.returncode == 130
    assert "Traceback" not in done.stdout


@pytest.mark.slow
def test_an_interrupt_while_a_batch_is_crafted_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(LONG, encoding="utf-8")
    arguments = "['mithridate', 'run', 'r.toml', '--out', 'runs', '--cache', 'cache', '--device', 'cpu']"
    code = f"import sys; sys.argv = {arguments}; from mithridate.cli import main; main()"
    done = interrupted(code, "state.safetensors", tmp_path)
    assert done.returncode == 130
    assert "Traceback" not in done.stdout
    assert "--resume" in done.stdout
    assert not list(tmp_path.rglob("*.part"))
