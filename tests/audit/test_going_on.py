"""An audit that is killed goes on: what was finished is not made again, and the result is that of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mithridate.audit import Audited

MODEL = """
from tests.audit.targets import toy_target

def make(seed):
    return toy_target(seed, lr=0.1)
"""
PLAN = """
target = "model.py:make"
seeds = [0, 1, 2]
[budget]
eps = 0.15
batches = 3
inner_steps = 3
"""
ROOT = Path(__file__).parents[2]


def audit(folder: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "mithridate", "audit", "audit.toml", "--out", "out", "--threads", "1"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, stdout=quiet, stderr=quiet)  # noqa: S603  (our own command)


def prepared(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model.py").write_text(MODEL, encoding="utf-8")
    (folder / "audit.toml").write_text(PLAN, encoding="utf-8")
    return folder


def told(folder: Path) -> object:
    values = json.loads((folder / "out" / "audit.json").read_bytes())
    for run in values["runs"]:
        del run["seconds"]
    del values["seconds"]
    return values


@pytest.mark.slow
def test_a_killed_audit_goes_on_to_what_an_undisturbed_one_says(tmp_path: Path) -> None:
    whole = prepared(tmp_path / "whole")
    assert audit(whole).wait() in (0, 1, 3)
    killed = prepared(tmp_path / "killed")
    runs, kills = killed / "out" / "runs", 0
    for wanted in (1, 5, 12, 20):
        process = audit(killed)
        while process.poll() is None:
            if runs.is_dir() and len([p for p in runs.iterdir() if not p.name.startswith(".")]) >= wanted:
                process.send_signal(signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
            time.sleep(0.01)
    assert kills >= 3
    before = {path.name: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    assert audit(killed).wait() in (0, 1, 3)
    assert {name: (runs / name).stat().st_mtime_ns for name in before} == before, "a finished run was made again"
    assert told(killed) == told(whole)
    assert not list(runs.glob(".*.part"))
    Audited.model_validate_json((killed / "out" / "audit.json").read_bytes())
