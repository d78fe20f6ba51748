"""What is shown while runs are made, where there is a terminal and where there is none; and how far a store is."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mithridate.bench.failure import Failure
from mithridate.bench.plan import Work
from mithridate.bench.recipe import Cell
from mithridate.cli import progress
from mithridate.cli.progress import Bars
from tests.command import invoke
from tests.recipes import tiny_recipe, tiny_text

SUMMARY = {"accuracy_start": 0.8, "accuracy_before_trigger": 0.7, "drop": 0.1, "steps": 3, "seconds": 2.0}


class Clock:
    """The time, as a test says it."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def cells(*changes: str) -> list[Cell]:
    return list(tiny_recipe('[[defence]]\nname = "none"\n[[defence]]\nname = "clip"\n', *changes).cells())


def shown(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> tuple[Bars, io.StringIO]:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, emoji=False, color_system=None)
    monkeypatch.setattr(progress, "out", console)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    return Bars(), text


def works(some: list[Cell]) -> list[Work]:
    return [Work(c.run_id, c.attack.label, c.defence.label, 101, 40, str(c.seed)) for c in some]


def test_without_a_terminal_there_is_a_line_for_every_epoch_and_run(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    bars, text = shown(monkeypatch, terminal=False)
    first, second = cells()
    with bars:
        bars.planned(works([first, second]), 1, "CPU")
        bars.cell(first, 0, 2)
        for epoch in (1, 2, 40):
            clock.now += 30
            bars.burn_in(first, 0, epoch, 40)
        bars.prepared(first)
        for step in (1, 2):
            clock.now += 20
            bars.step(first, step, 100, 0.5)
        bars.finished(first, SUMMARY, skipped=False)
        bars.cell(second, 1, 2)
        bars.failed(second, Failure("ValueError", "ValueError: [bold]why[/]."))
    assert text.getvalue().splitlines() == [
        "burn-in: about 20 min on this CPU; then 2 runs, whose time shows after their first steps",
        "noise__none__seed0: burn-in, seed 0: epoch 1 of 40, about 20 min left",
        "noise__none__seed0: burn-in, seed 0: epoch 2 of 40, about 19 min left",
        "noise__none__seed0: burn-in, seed 0: epoch 40 of 40",
        "about 67 min on this CPU, 2 of 2 runs left",
        "noise__none__seed0: 80.0% -> 70.0% after 3 batches, trigger step -10.0 points, 2.0 s"
        "  [1 of 2, about 34 min left]",
        "noise__clip__seed0 failed: ValueError: [bold]why[/].  [2 of 2]",
    ]


def test_a_short_grid_says_nothing_of_its_time(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    bars, text = shown(monkeypatch, terminal=False)
    (only, _) = cells()
    with bars:
        bars.planned(works([only]), 1, "CPU")
        bars.cell(only, 0, 1)
        for step in range(1, 100):
            clock.now += 5.9
            bars.step(only, step, 100, 0.5)
        bars.finished(only, SUMMARY, skipped=False)
    assert text.getvalue().splitlines() == [
        "noise__none__seed0: 80.0% -> 70.0% after 3 batches, trigger step -10.0 points, 2.0 s"
    ]


def test_the_finished_runs_of_a_store_say_beforehand_how_long_the_rest_takes(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    bars, text = shown(monkeypatch, terminal=False)
    some = cells("run.seeds=[0, 1, 2]")
    with bars:
        bars.planned(works(some), 2, "GPU")
        for cell in some[:2]:
            bars.finished(cell, {**SUMMARY, "seconds": 4040.0, "steps": 100, "burn_in_seconds": 400}, skipped=True)
        bars.cell(some[2], 2, 6)
    assert text.getvalue().splitlines()[-1] == "about 2.4 h on this GPU, 2 runs at a time, 4 of 6 runs left"
    assert "(kept)" in text.getvalue()


def test_on_a_terminal_every_run_that_is_under_way_has_a_bar(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    bars, text = shown(monkeypatch, terminal=True)
    first, second = cells()
    with bars:
        bars.planned(works([first, second]), 2, "CPU")
        bars.cell(first, 0, 2)
        bars.burn_in(first, 0, 1, 40)
        assert [task.description for task in bars.progress.tasks] == ["runs", "burn-in, seed 0"]
        bars.prepared(first)
        bars.step(first, 1, 100, 0.5)
        bars.cell(second, 1, 2)
        bars.step(second, 7, 100, 0.25)
        assert [(t.description, t.completed, t.total) for t in bars.progress.tasks] == [
            ("runs", 0, 2),
            ("crafting and learning", 1, 100),
            ("crafting and learning", 7, 100),
        ]
        assert bars.progress.tasks[-1].fields["note"] == "accuracy 25.0%  noise__clip__seed0"
        bars.finished(second, SUMMARY, skipped=False)
        bars.redone(first, "its trace is [damaged]")
        assert [task.completed for task in bars.progress.tasks] == [1, 1]
    assert "epoch 1" not in text.getvalue()
    assert "noise__none__seed0 is made anew: its trace is [damaged]" in text.getvalue()


# How far a store is, and grids of many runs.


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(tiny_text(), encoding="utf-8")
    return tmp_path / "tiny.toml"


def test_a_status_is_readable_at_80_columns(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    label = "a-label-as-long-as-a-label-may-be-and-so-the-run-is-not-shown-on"
    call = ("run", recipe, "--out", "runs", "--cache", "cache", "--threads", "1", "--seeds", "0,1")
    monkeypatch.setattr("mithridate.bench.workplace.run_cell", lambda *_: 1 / 0)
    assert invoke(*call, "--set", f"attack.label={label}").code == 1
    done = invoke("status", "runs", columns=80)
    assert done.code == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert f"{label[:50]}" in done.stdout.replace("\n", "")
    assert done.out.count("failed, step 0 of 4") == 2
    assert "ZeroDivisionError: division by zero" in done.out
    assert "2 runs: 2 failed" in done.out
    assert "the time left is not known" in done.out


@pytest.mark.parametrize("directory", ["nowhere", "."])
def test_a_status_of_no_store_is_a_mistake(recipe: Path, directory: str) -> None:
    done = invoke("status", directory)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert done.err.endswith("is no store; give the --out directory of `mithridate run`.")


MILLION = "grid.attack.eps=[" + ", ".join(f"{i / 1000}" for i in range(1000)) + "]"


def test_a_grid_of_a_million_runs_asks(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = ",".join(map(str, range(1000)))
    call = ("run", recipe, "--out", "runs", "--cache", "cache", "--seeds", seeds, "--set", MILLION)
    done = invoke(*call)
    assert (done.code, done.out) == (2, "")
    assert "the recipe's grid has 1,000,000 runs" in done.err
    assert "say --yes" in done.err
    assert not Path("runs").exists()
    monkeypatch.setattr("mithridate.cli.run._at_a_terminal", lambda: True)
    questions: list[str] = []
    monkeypatch.setattr("typer.confirm", questions.append)
    assert invoke(*call).code == 2
    assert "1,000,000 runs" in questions[0]


def test_who_means_many_runs_says_so(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def counted(wanted: Any, *_: object, **__: object) -> None:
        counts.append(len(list(wanted.cells())))
        raise KeyboardInterrupt

    monkeypatch.setattr("mithridate.bench.engine.run_recipe", counted)
    call = ("run", recipe, "--out", "runs", "--seeds", ",".join(map(str, range(1001))))
    assert invoke(*call).code == 2
    assert invoke(*call, "--yes").code == 130
    monkeypatch.setattr("mithridate.cli.run._at_a_terminal", lambda: True)
    monkeypatch.setattr("typer.confirm", lambda text: True)
    assert invoke(*call).code == 130
    assert counts == [1001, 1001]
