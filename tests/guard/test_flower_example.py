"""The example app, run in one process; one slow test runs it on the real engine."""

import contextlib
import importlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import tomli_w
import torch

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

import tomllib

from flwr.app import Context, RecordDict

EXAMPLE = Path(__file__).parents[2] / "examples" / "flower"
CONFIG: dict[str, Any] = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
Federation = Callable[..., tuple[list[float], list[dict[str, Any]]]]


@pytest.fixture
def federation(make_grid: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Federation]:
    """Runs the app with some of its settings changed; gives test accuracy by round and what the guard reported."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    client, server = (importlib.import_module(f"guarded_digits.{name}_app") for name in ("client", "server"))

    def run(**changed: Any) -> tuple[list[float], list[dict[str, Any]]]:
        config = {**CONFIG, "output": str(tmp_path), **{k.replace("_", "-"): v for k, v in changed.items()}}
        torch.set_num_threads(1)  # as the clients set it, which here are in the server's process
        grid = make_grid(client.app, config["clients"], config)
        server.app(grid, Context(1, 0, {}, RecordDict(), config))
        return read(tmp_path)

    yield run
    for name in [name for name in sys.modules if name.startswith("guarded_digits")]:
        del sys.modules[name]


def read(folder: Path) -> tuple[list[float], list[dict[str, Any]]]:
    rounds = [row["accuracy"] for row in json.loads((folder / "rounds.json").read_text())]
    report = folder / "guard.jsonl"
    return rounds, [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []


@pytest.mark.slow
def test_an_accumulative_client_breaks_fedavg_and_not_the_guarded(federation: Federation) -> None:
    """Quiet until its trigger, then worse than the same trigger alone; clipped or vetoed, the model stays. Medians."""
    trigger = CONFIG["trigger-round"]
    stories: dict[str, dict[str, Any]] = {
        "attacked": {"guarded": False},
        "alone": {"guarded": False, "lam": 0.0},
        "guarded": {},
        "gated": {"clip_norm": math.inf},
    }
    runs = {
        name: [federation(seed=seed, num_server_rounds=trigger, **changed) for seed in (0, 1, 2)]
        for name, changed in stories.items()
    }

    def accuracy(name: str, number: int) -> float:
        return median(rounds[number] for rounds, _ in runs[name])

    assert accuracy("attacked", trigger - 1) > accuracy("attacked", 0) - 0.05  # nobody would have raised an alarm
    assert accuracy("attacked", trigger) < accuracy("attacked", trigger - 1) - 0.3
    assert accuracy("attacked", trigger) < accuracy("alone", trigger) - 0.2  # the accumulation is what does it
    assert accuracy("guarded", trigger) > accuracy("guarded", 0) - 0.03
    for _, report in runs["guarded"]:
        bounded = {line["node"] for line in report if line["event"] == "bounded"}
        assert bounded == {100}  # no honest client is touched
    for rounds, report in runs["gated"]:
        assert trigger in [line["round"] for line in report if line["event"] == "vetoed"]
        assert rounds[trigger] == rounds[trigger - 1]  # the old model stays


REASONS = {"nan": "NaN or infinite", "shape": "has shape", "missing": "is missing", "huge": "limit 1e+09"}


def refused_kinds(report: list[dict[str, Any]]) -> Counter[tuple[int, str]]:
    """How often each client was refused for each kind of garbage."""
    refusals = [line for line in report if line["event"] == "refused"]
    return Counter((x["node"], kind) for x in refusals for kind, words in REASONS.items() if words in x["reason"])


def test_three_of_twenty_send_garbage_and_every_round_completes(
    federation: Federation, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each of the three sends NaN, other shapes, too few arrays and 1e30 in turn."""
    rounds, report = federation(attack="garbage", hostile_ids="3,7,11", num_server_rounds=4)
    assert len(rounds) == 5
    assert rounds[-1] > rounds[0] - 0.05
    assert refused_kinds(report) == Counter((node, kind) for node in (103, 107, 111) for kind in REASONS)
    assert {line["counts"]["accepted"] for line in report if line["event"] == "closed"} == {17}
    table = (tmp_path / "guard.txt").read_text(encoding="utf-8")
    assert "The guard in 4 rounds: 12 refused" in table
    assert table in capsys.readouterr().out


def test_of_an_absurd_number_of_examples_only_the_number_is_set_right(federation: Federation) -> None:
    rounds, report = federation(attack="garbage", garbage="huge,count", hostile_ids="3,7", num_server_rounds=3)
    assert rounds[-1] > rounds[0] - 0.05
    whose = {(line["node"], line["event"]) for line in report if "node" in line}
    assert whose == {(103, "refused"), (107, "capped")}


@pytest.mark.slow
def test_the_seed_decides_the_run(federation: Federation) -> None:
    first, again, other = (federation(attack="none", seed=seed, num_server_rounds=1)[0] for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_garbage_ruins_or_ends_an_unguarded_run(federation: Federation) -> None:
    nan, _ = federation(guarded=False, attack="garbage", garbage="nan", num_server_rounds=1)
    assert nan[-1] < 0.2
    with pytest.raises(Exception, match="same keys"):
        federation(guarded=False, attack="garbage", garbage="missing", num_server_rounds=1)


def test_a_wrong_setting_of_the_attack_is_named(federation: Federation) -> None:
    with pytest.raises(Exception, match="trigger"):
        federation(trigger="reverse", num_server_rounds=1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


RealRun = Callable[..., tuple[list[float], list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRun]:
    """Runs the app with `flwr run`, on a SuperLink of this test's own and a free port.

    `flwr run` would start one by itself that stays up; this one is known by its process id and ended by it.
    """
    port, folder = free_port(), tmp_path_factory.mktemp("real")
    home = folder / "flwr"
    home.mkdir()
    link = {"address": f"127.0.0.1:{port}", "insecure": True}
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"default": "own", "own": link}}))
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--database", str(home / "state.db"), "--log-file", str(home / "superlink.log")]
    process = subprocess.Popen(command, env=environment)  # noqa: S603  (a fixed command)

    def run(name: str, **changed: Any) -> tuple[list[float], list[dict[str, Any]]]:
        out = folder / name
        settings = {"output": str(out), **{k.replace("_", "-"): v for k, v in changed.items()}}
        line = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
        nodes = "num-supernodes=20 client-resources-num-cpus=1"
        command = ["flwr", "run", str(EXAMPLE), "--stream", "-c", line, "--federation-config", nodes]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)  # noqa: S603  (a fixed command)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (out / "rounds.json").exists(), done.stdout + done.stderr  # `flwr run` returns 0 for a failed app too
        return read(out)

    try:
        deadline = time.monotonic() + 120
        while not answers(port):
            assert process.poll() is None, "the SuperLink ended"
            assert time.monotonic() < deadline, "the SuperLink does not answer"
            time.sleep(0.5)
        yield run
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and, by their ids, all that it started: a run that was cut short goes on for a while without it."""
    family = descendants(process.pid)
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """What a process started, and what that started in turn; Flower opens sessions of its own on the way."""
    command = ["ps", "-eo", "pid=,ppid="]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603  (a fixed command)
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    family = [pid]
    for one in family:  # grows as it goes
        family += [child for child, parent in pairs if parent == one]
    return family[1:]


def answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


on_the_real_engine = pytest.mark.skipif(find_spec("ray") is None, reason="the extra 'flower' is not installed (no ray)")


@pytest.mark.slow
@on_the_real_engine
def test_flwr_run_completes_every_round_of_garbage(real_run: RealRun) -> None:
    rounds, report = real_run("garbage", attack="garbage", hostile_ids="3,7,11", num_server_rounds=4)
    assert len(rounds) == 5
    assert rounds[-1] > rounds[0] - 0.05
    found = refused_kinds(report)
    assert len({node for node, _ in found}) == 3
    assert sorted(kind for _, kind in found) == sorted(list(REASONS) * 3)  # each client, each kind
    assert set(found.values()) == {1}
    assert {line["counts"]["accepted"] for line in report if line["event"] == "closed"} == {17}


@pytest.mark.slow
@on_the_real_engine
def test_flwr_run_breaks_under_fedavg_and_not_under_the_guard(real_run: RealRun) -> None:
    trigger = CONFIG["trigger-round"]
    _, quiet = real_run("clean", attack="none")
    broken, _ = real_run("fedavg", guarded=False)
    gated, vetoes = real_run("gate", clip_norm=1e9)
    kept, report = real_run("guarded")
    assert {line["event"] for line in quiet} == {"opened", "closed"}  # the guard takes nothing from honest clients
    assert broken[trigger] < broken[trigger - 1] - 0.3
    assert gated[trigger] == gated[trigger - 1]
    assert trigger in [line["round"] for line in vetoes if line["event"] == "vetoed"]
    assert kept[trigger] > kept[0] - 0.05
    assert len({line["node"] for line in report if line["event"] == "bounded"}) == 1
