from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from mithridate.bench.store import Run, read_runs
from mithridate.report.rows import Row, rows
from mithridate.report.terminal import doubt_lines, fitted, measures_table, summary_table

Make = Callable[..., Run]
MakeRow = Callable[..., Row]


def test_terminal_table(demo_store: Path) -> None:
    made = rows(read_runs([demo_store]))
    assert summary_table(made).row_count == len(made)
    table = summary_table(made)
    drops = [str(cell) for cell in table.columns[5].cells]
    assert drops[4] == "19.3±2.0"


def test_the_terminal_says_what_its_columns_are(demo_store: Path) -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(fitted(summary_table(rows(read_runs([demo_store]))), 80))
    lines = capture.get().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("clean "))
    heads = " ".join(lines[:first])
    for words in ("Accuracy, mean±std", "start", "before", "after", "trigger", "points", "phase", "batches", "n seeds"):
        assert words in heads
    assert lines[-1].startswith("accumulative")  # no footnote
    narrow = str(fitted(summary_table(rows(read_runs([demo_store]))), 40))
    assert "attack clean, defence none, start % 97.6±0.5, before trigger % 98.1±0.5" in narrow


def test_terminal_shows_markup_as_text(make_run: Make) -> None:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(summary_table(rows([make_run(label="[red]x[/red]\x1b[31m"), make_run(dataset="mnist")])))
    assert "[red]x[/red] [31m" in capture.get()
    assert "mnist" in capture.get()


def test_terminal_measures(defended_rows: list[Row]) -> None:
    table = measures_table(defended_rows)
    assert table is not None
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table)
    lines = [line.split() for line in capture.get().splitlines()]
    assert all(len(line) <= 80 for line in capture.get().splitlines())
    assert lines[-3:] == [
        ["none", "96.0±1.0", "—", "—", "70.0±0.0", "—", "—", "—"],
        ["dsc", "94.0±2.0", "-2.0±1.0", "5.0", "91.0±1.0", "+21.0±1.0", "20.0", "2.1"],
        ["gate", "96.0±1.0", "0.0±0.0", "—", "95.0±0.0", "+25.0±0.0", "—", "1.2"],
    ]
    assert "trigger of accumulative" in " ".join(capture.get().split())


def test_terminal_has_no_measures_without_a_defence(make_row: MakeRow) -> None:
    assert measures_table([make_row(0.1), make_row(0.0, attack="clean")]) is None


def test_terminal_measures_of_what_was_run_only(make_row: MakeRow) -> None:
    hostile = make_row(0.1, defence="clip", defence_label="[red]clip[/red]", label="[bold]x[/bold]")
    table = measures_table([hostile, make_row(0.0, attack="clean", dataset="mnist", defence="clip")])
    assert table is not None
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    assert "[red]clip[/red]" in capture.get()
    assert "trigger of [bold]x[/bold]" in capture.get()
    assert table.row_count == 2


def test_the_terminal_counts_the_doubts_and_names_the_serious_ones(demo_store: Path, make_row: MakeRow) -> None:
    count, *serious = doubt_lines(rows(read_runs([demo_store])))
    assert "doubts: " in count
    assert f"{len(serious)} serious" in count
    assert any("Diverged: pgd, loud" in line for line in serious)
    assert all(line.startswith("serious: ") for line in serious)
    assert doubt_lines([make_row(0.0, 0.0, 0.0, attack="clean")]) == ["0 doubts."]


def test_settings_that_differ_stand_behind_the_labels(make_run: Make) -> None:
    table = summary_table(rows([make_run(eps=0.1), make_run(eps=0.2)]))
    assert [str(cell) for cell in table.columns[0].cells] == ["accumulative, eps 0.1", "accumulative, eps 0.2"]
    assert len(table.columns) == 8
