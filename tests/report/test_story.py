"""Three lines of what a poisoned stream did, from the runs alone."""

from pathlib import Path
from typing import Any

from mithridate.bench.store import Run
from mithridate.report.rows import rows
from mithridate.report.story import story


def run(attack: str, defence: str, start: float, before: float, after: float, *, steps: int, alarm: Any = None) -> Run:
    trace = [{"step": 0, "phase": "start", "poisoned": 0.0, "accuracy": start}]
    trace += [{"step": i + 1, "phase": "accumulative", "poisoned": 5.0, "accuracy": before} for i in range(steps)]
    trace.append({"step": steps + 1, "phase": "trigger", "poisoned": 5.0, "accuracy": after})
    summary = {
        "accuracy_start": start,
        "accuracy_before_trigger": before,
        "accuracy_after_trigger": after,
        "steps": steps,
        "first_alarm_step": alarm,
    }
    config = {
        "seed": 0,
        "data": {"name": "digits"},
        "model": {"name": "small_cnn"},
        "attack": {"name": attack},
        "defence": {"name": defence},
        "federated": {"rounds": 250},
    }
    return Run(path=Path(f"{attack}-{defence}"), config=config, trace=trace, summary=summary, environment={}, images={})


QUIET = run("accumulative", "none", 0.98, 0.971, 0.55, steps=250)
ALONE = run("direct", "none", 0.98, 0.98, 0.93, steps=0)
HELD = run("accumulative", "chain", 0.98, 0.97, 0.969, steps=250)


def test_the_story_is_told_from_the_runs() -> None:
    assert story(rows([QUIET, ALONE, HELD])) == [
        "Quiet: 250 poisoned rounds take the accuracy from 98.0 % to 97.1 %; no alarm.",
        "Then one round: 97.1 % -> 55.0 %. The same round without the quiet ones: 98.0 % -> 93.0 %.",
        "Defended (chain): the same poison leaves 96.9 %.",
    ]


def test_what_was_not_run_is_not_told() -> None:
    assert story(rows([ALONE])) == []
    assert len(story(rows([QUIET]))) == 2
    assert "without" not in story(rows([QUIET]))[1]


def test_an_alarm_in_the_phase_is_told() -> None:
    loud = run("accumulative", "none", 0.98, 0.9, 0.55, steps=250, alarm=3)
    (line, *_) = story(rows([loud]))
    assert line.startswith("Not quiet: ")
    assert line.endswith("an alarm in 1 of 1 run.")
