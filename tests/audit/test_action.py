"""The GitHub Action: its script runs, and every input that it names is used."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ACTION = Path(__file__).parents[2] / "action" / "action.yml"
TEXT = ACTION.read_text(encoding="utf-8")


def script() -> str:
    """The last step's script, its indentation taken off."""
    body = TEXT.rpartition("run: |\n")[2]
    return "\n".join(line.removeprefix("        ") for line in body.splitlines())


def inputs() -> set[str]:
    block = TEXT.partition("inputs:\n")[2].partition("\noutputs:")[0]
    return set(re.findall(r"^  ([\w-]+):$", block, flags=re.MULTILINE))


def test_every_input_is_used_and_no_other_is() -> None:
    assert inputs() == set(re.findall(r"\$\{\{ inputs\.([\w-]+) \}\}", TEXT)) >= {"plan", "out", "inconclusive"}


def test_it_is_yaml_of_a_composite_action() -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    action = yaml.safe_load(TEXT)
    assert action["runs"]["using"] == "composite"
    assert set(action["inputs"]) == inputs()
    assert all("shell" in step for step in action["runs"]["steps"] if "run" in step)
    assert action["outputs"]["verdict"]["value"] == "${{ steps.audit.outputs.verdict }}"


@pytest.mark.parametrize(
    ("code", "inconclusive", "ends", "verdict"),
    [
        (0, "fail", 0, "pass"),
        (1, "fail", 1, "fail"),
        (3, "fail", 3, "inconclusive"),
        (3, "pass", 0, "inconclusive"),
        (1, "pass", 1, "fail"),
        (2, "pass", 2, "mistake"),
    ],
)
def test_the_script_ends_as_the_verdict_says(
    code: int, inconclusive: str, ends: int, verdict: str, tmp_path: Path
) -> None:
    command = tmp_path / "mithridate"
    command.write_text(
        f'#!/bin/sh\nmkdir -p "$4"; echo "# page of $2" > "$4/audit.md"; exit {code}\n', encoding="utf-8"
    )
    command.chmod(0o755)
    outputs, summary = tmp_path / "outputs", tmp_path / "summary"
    done = subprocess.run(  # noqa: S603  (our own script)
        ["/bin/bash", "-e", "-c", script()],
        env={
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "PLAN": "my plan.toml",
            "OUT": str(tmp_path / "out put"),
            "INCONCLUSIVE": inconclusive,
            "GITHUB_OUTPUT": str(outputs),
            "GITHUB_STEP_SUMMARY": str(summary),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ends, done.stderr
    assert outputs.read_text(encoding="utf-8") == f"verdict={verdict}\n"
    assert summary.read_text(encoding="utf-8") == "# page of my plan.toml\n"
