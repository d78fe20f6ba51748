"""The example app, run in one process; one slow test runs it on the real engine."""

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
from pathlib import Path
from typing import Any

import pytest
import tomli_w

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
    """Secret until its trigger, then worse than the same trigger alone; guarded, it ends as an honest one."""
    trigger = CONFIG["trigger-round"]
    honest, _ = federation(guarded=False, attack="none")
    attacked, _ = federation(guarded=False)
    alone, _ = federation(guarded=False, lam=0.0)
    guarded, report = federation(guarded=True)
    gated, gate = federation(guarded=True, clip_norm=math.inf)
    assert honest[-1] > 0.9
    assert min(attacked[1:trigger]) > honest[0] - 0.02  # nobody would have raised an alarm
    assert attacked[trigger] < attacked[trigger - 1] - 0.3
    assert attacked[trigger] < alone[trigger] - 0.1  # the accumulation is what does it
    assert all(mine > theirs - 0.02 for mine, theirs in zip(guarded, honest, strict=True))
    clipped = [line for line in report if line["event"] == "clipped" and line["round"] == trigger]
    assert [line["node"] for line in clipped] == [100]
    assert gated[:trigger] == attacked[:trigger]  # until then there is nothing that the gate could see
    assert gated[trigger] == gated[trigger - 1]  # vetoed: the old model stays
    assert gated[-1] > honest[-1] - 0.02
    assert [line["round"] for line in gate if line["event"] == "vetoed"] == [trigger]


@pytest.mark.parametrize("kinds", [("nan", "shape", "missing"), ("huge", "nan", "count")])
def test_three_of_twenty_send_garbage_and_every_round_completes(
    kinds: tuple[str, ...], federation: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds, report = federation(attack=",".join(kinds), hostile_ids="3,7,11", num_server_rounds=4)
    assert len(rounds) == 5
    assert rounds[-1] > rounds[0] - 0.01
    words = {"nan": "NaN or infinite", "shape": "has shape", "missing": "is missing", "huge": "limit 1e+09"}
    for node, kind in zip((103, 107, 111), kinds, strict=True):
        mine = [line for line in report if line.get("node") == node]
        assert [line["round"] for line in mine] == [1, 2, 3, 4]
        assert {line["event"] for line in mine} == {"capped" if kind == "count" else "refused"}
        assert all(words.get(kind, "examples") in line["reason"] for line in mine)
    closed = [line["counts"] for line in report if line["event"] == "closed" and line["phase"] == "train"]
    assert [counts["accepted"] for counts in closed] == [20 - sum(k != "count" for k in kinds)] * 4
    assert "refused node 103" in capsys.readouterr().out


def test_garbage_ruins_or_ends_an_unguarded_run(federation: Federation) -> None:
    nan, _ = federation(guarded=False, attack="nan", num_server_rounds=1)
    assert nan[-1] < 0.2
    with pytest.raises(Exception, match="same keys"):
        federation(guarded=False, attack="missing", num_server_rounds=1)


def test_a_wrong_setting_of_the_attack_is_named(federation: Federation) -> None:
    with pytest.raises(Exception, match="trigger"):
        federation(trigger="reversed", num_server_rounds=1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A SuperLink of this test's own, on a free port; gives the environment in which `flwr` finds it.

    `flwr run` would start one by itself that stays up; this one is known by its process id and ended by it.
    """
    port = free_port()
    home = tmp_path / "flwr"
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
    process = subprocess.Popen(command, env=environment, start_new_session=True)  # noqa: S603  (a fixed command)
    try:
        deadline = time.monotonic() + 120
        while not answers(port):
            assert process.poll() is None, "the SuperLink ended"
            assert time.monotonic() < deadline, "the SuperLink does not answer"
            time.sleep(0.5)
        yield environment
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # its own session: it and what it started, nothing else
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("MITHRIDATE_SLOW") != "1", reason="MITHRIDATE_SLOW is not 1")
def test_the_real_engine_completes_every_round(superlink: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = {"attack": "nan,shape,missing", "hostile-ids": "3,7,11", "num-server-rounds": 3, "output": str(out)}
    line = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
    nodes = "num-supernodes=20 client-resources-num-cpus=1"
    command = ["flwr", "run", str(EXAMPLE), "--stream", "-c", line, "--federation-config", nodes]
    done = subprocess.run(command, env=superlink, capture_output=True, text=True, timeout=900, check=False)  # noqa: S603  (a fixed command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "rounds.json").exists(), done.stdout + done.stderr
    rounds, report = read(out)
    assert len(rounds) == 4
    assert rounds[-1] > rounds[0] - 0.01
    refused = Counter((line["node"], line["reason"].split("'")[-1]) for line in report if line["event"] == "refused")
    assert len(refused) == 3
    assert set(refused.values()) == {3}  # each of the three, in each of three rounds
