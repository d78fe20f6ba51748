from collections.abc import Callable
from pathlib import Path

from mithridate.bench.store import Run, read_runs
from mithridate.report.rows import groups, rows
from mithridate.report.tables.results import to_markdown

Make = Callable[..., Run]


def test_markdown_is_one_table(demo_store: Path) -> None:
    made = rows(read_runs([demo_store]))
    lines = to_markdown(made).splitlines()
    assert len(lines) == 2 + len(made)
    assert {line.count("|") for line in lines} == {12}
    for line, row in zip(lines[2:], made, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        drop = row.statistic("drop")
        assert drop.mean is not None
        assert drop.std is not None
        assert cells[0] == row.attack
        assert cells[5] == f"{100 * drop.mean:.1f} ± {100 * drop.std:.1f}".replace("-0.0", "0.0")


def test_markdown_escapes_names(make_run: Make) -> None:
    text = to_markdown(rows([make_run(label="a|b\n<script>`x`[y](z)")]))
    assert len(text.splitlines()) == 3
    assert "a\\|b &lt;script&gt;\\`x\\`\\[y\\](z)" in text


def test_groups_get_columns_of_their_own(make_run: Make) -> None:
    made = rows([make_run(), make_run(dataset="mnist")])
    assert list(groups(made)) == [("digits", "small_cnn"), ("mnist", "small_cnn")]
    assert to_markdown(made).startswith("| data set | model | attack |")
