"""Terminals of all kinds: other encodings, few columns, and paths that look like markup."""

import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from mithridate.bench.store import read_runs
from mithridate.cli import app as cli
from mithridate.cli import terminal
from mithridate.core import registry
from mithridate.core.registry import KINDS, entries
from tests.command import invoke, started
from tests.recipes import tiny_text

RECIPE = """
title = "A [bold]tiny[/bold] :smile: recipe"
[[attack]]
name = "clean"
[[attack]]
name = "noise"
[[defence]]
name = "none"
[[defence]]
name = "clip"
clip_norm = 1.0
"""
ODD = "out [bold] [x] :smile: [/red]"


@pytest.fixture(scope="module", autouse=True)
def _no_figures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mithridate.report.figure_sections", lambda *_: [])
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs in a folder whose name looks like markup."""
    root = tmp_path_factory.mktemp("runs")
    (root / "tiny [x].toml").write_text(tiny_text(RECIPE, "run.seeds=[0, 1]"), encoding="utf-8")
    done = invoke("run", root / "tiny [x].toml", "--out", root / ODD, "--cache", root / "cache", "--device", "cpu")
    assert done.code == 0, done
    assert "A [bold]tiny[/bold] :smile: recipe\n" in done.stdout
    return root / ODD


class Printed(NamedTuple):
    """What a call ended with."""

    code: int
    out: bytes
    err: bytes


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Printed]:
    """Calls the command as a process would, in this one, on a terminal of an encoding and a width."""

    def called(*arguments: object, encoding: str = "utf-8", columns: int = 80) -> Printed:
        buffers = [io.BytesIO(), io.BytesIO()]
        streams = [io.TextIOWrapper(buffer, encoding=encoding) for buffer in buffers]
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", ["mithridate", *map(str, arguments)])
            patch.setattr("sys.stdout", streams[0])
            patch.setattr("sys.stderr", streams[1])
            patch.setattr("sys.path", [*sys.path])
            for console in (terminal.out, terminal.err):
                patch.setattr(console, "width", columns)
            with pytest.raises(SystemExit) as ended:
                cli.main()
        for stream in streams:
            stream.flush()
        out, err = (written.getvalue() for written in buffers)
        return Printed(int(ended.value.code or 0), out, err)

    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)  # the test session has its own
    return called


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_every_encoding_shows_the_numbers_and_the_path(
    encoding: str, runs: Path, tmp_path: Path, call: Callable[..., Printed]
) -> None:
    done = call("report", runs, "--out", tmp_path / "é [x] ±", encoding=encoding)
    assert (done.code, done.err) == (0, b"")
    text = done.out.decode(encoding)
    mean = 100 * sum(run.summary["accuracy_start"] for run in read_runs(runs)[:2]) / 2
    assert f"{mean:.1f}±" in text.replace("+-", "±")
    assert "[x]" in text
    assert (tmp_path / "é [x] ±" / "report.html").is_file()
    missing = call("report", tmp_path / "no 名 [bold] \x1b[31m", encoding=encoding)
    assert missing.code == 2
    assert b"[bold] ?[31m is not a directory" in missing.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["PYTHONIOENCODING", "LC_ALL"],
)
def test_a_process_on_a_terminal_that_knows_ascii_alone(
    environment: dict[str, str], runs: Path, tmp_path: Path
) -> None:
    done = started("report", runs, "--out", tmp_path / "é [x]", folder=tmp_path, env={"COLUMNS": "80", **environment})
    assert (done.returncode, done.stderr) == (0, "")
    assert "[x]/report.html" in done.stdout.replace("\n", "")
    assert (tmp_path / "é [x]" / "report.html").is_file()


def test_a_path_of_other_bytes_is_told(call: Callable[..., Printed]) -> None:
    done = call("report", os.fsdecode(b"/no/such/\xff"))
    assert done.code == 2
    assert done.err.startswith(b"error: /no/such/? is not a directory")


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_no_number_is_cut_and_no_line_too_long(
    columns: int, runs: Path, tmp_path: Path, call: Callable[..., Printed]
) -> None:
    done = call("report", runs, "--out", tmp_path, columns=columns)
    lines = done.out.decode().splitlines()
    assert max(map(len, lines[:-1])) <= columns  # the last one is the path, which stays whole
    words = done.out.decode().replace(",", " ").split()
    for run in read_runs(runs):
        assert run.summary["attack"] in words
    assert "…" not in done.out.decode()
    for line in (tmp_path / "summary.md").read_text(encoding="utf-8").splitlines()[2:]:
        for cell in line.split("|")[3:6]:
            assert cell.strip().replace(" ± ", "±") in words


def test_what_a_path_looks_like_is_no_markup(runs: Path) -> None:
    root = runs.parents[1]
    command = ["run", root / "tiny [x].toml", "--out", runs, "--cache", root / "cache", "--device", "cpu"]
    again = invoke(*command, "--resume", columns=60)
    assert again.code == 0
    assert f"delete {runs} to run them again" in again.stdout.replace("\n", "")
    assert f"report: {runs}/report.html" in again.stdout
    refused = invoke(*command, columns=60)
    assert refused.code == 2
    assert f"error: {runs}/clean__none__seed0" in refused.stderr.replace("\n", "")


@pytest.mark.parametrize("arguments", [["--threads", "1025"], ["--threads", "9" * 30], ["--threads=-1"]])
def test_threads_out_of_range_are_refused(arguments: list[str], runs: Path) -> None:
    done = invoke("run", runs.parents[1] / "tiny [x].toml", *arguments)
    assert done.code == 2
    assert "--threads" in done.err


@pytest.mark.parametrize(
    "seeds", ["9" * 20, "-1", "", ",", "0,0", "1e3", "0x1", "9" * 5000, "1.5", "[0]", "\x1b[31m", "a" * 5000]
)
def test_seeds_out_of_range_are_refused(
    seeds: str, runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("run", runs.parents[1] / "tiny [x].toml", f"--seeds={seeds}")
    assert done.code == 2
    assert "seeds" in done.stderr
    assert len(done.stderr) < 650
    assert "\x1b[31m" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_matplotlibrc_that_cannot_be_read_is_told(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe\x00")
    env = {"MATPLOTLIBRC": str(tmp_path), "MPLBACKEND": "nonsense"}
    done = started("report", runs, "--out", tmp_path / "out", folder=tmp_path, env=env)
    assert done.returncode == 2
    assert "error: matplotlib cannot be loaded ('utf-8'" in done.stderr
    assert "Traceback" not in done.stderr


# `~`.


@pytest.mark.slow
def test_the_home_directory_is_known_by_its_sign_everywhere(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_entries", {kind: dict(entries(kind)) for kind in KINDS})  # as they were, after it
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "of_the_home_directory.py").write_text(
        "import mithridate as mi\n@mi.register('monitor', 'silent')\n@mi.settings\nclass Silent(mi.Monitor):\n"
        "    'Nothing.'\n    def alarm(self, readings):\n        return None\n",
        encoding="utf-8",
    )
    (tmp_path / "tiny.toml").write_text(tiny_text(RECIPE), encoding="utf-8")
    command = ["run", "~/tiny.toml", "--out=~/out", "--device=cpu", "--plugin=~/of_the_home_directory.py", "--seeds=0"]
    done = invoke(*command, env={"MITHRIDATE_CACHE": "~/cache"})
    assert done.code == 0, done
    assert len(read_runs("~/out")) == 4
    assert any((tmp_path / "cache" / "burn_in").iterdir())
    assert invoke("report", "~/out", "--out=~/page").code == 0
    assert (tmp_path / "page" / "report.html").is_file()
    for command, message in (
        (["run", "tiny.toml", "--set=data.name=npz", "--set=data.path=~/x.npz"], f"{tmp_path}/x.npz is not there"),
        (["run", "tiny.toml", "--set=burn_in.checkpoint=~/x.pt"], f"{tmp_path}/x.pt"),
        (["run", "tiny.toml", "--set=data.name=mnist", "--data-root=~/none"], f"data root {tmp_path}/none"),
        (["report", "~nobody-at-all/x"], "write the path without ~"),
    ):
        refused = invoke(*command, *(["--out=~/other"] if command[0] == "run" else []))
        assert refused.code == 2
        assert message in refused.err
    other = ["run", "tiny.toml", "--set=data.name=mnist", "--out=~/other"]
    assert f"data root {tmp_path}/none" in invoke(*other, env={"MITHRIDATE_DATA": "~/none"}).err
    assert not [path for path in tmp_path.iterdir() if "~" in path.name]
