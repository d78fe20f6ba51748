"""Items: read, merged over their bases, refused where they are wrong; and the paper's table beside ours."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from mithridate.core.errors import ConfigError
from mithridate.report.rows import rows
from mithridate.report.tables.latex import latex
from mithridate.report.tables.section import Toned
from mithridate.reproduce.checks import Interval, Ruling
from mithridate.reproduce.comparison import beside, compared, records, written
from mithridate.reproduce.item import SCALES, read_item
from mithridate.reproduce.outcome import panels_of, series_drawings, verdicts
from mithridate.reproduce.run import progress
from tests.reproduce.made import run_of

NAME = "some2020-table1"


def change(folder: Path, file: str, old: str, new: str) -> None:
    path = folder / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_a_scale_is_laid_over_what_all_share_and_that_over_the_base(folder: Path) -> None:
    recipes = {scale: read_item(NAME, folder).recipe(scale) for scale in SCALES}
    assert [r.data.name for r in recipes.values()] == ["digits", "cifar10", "cifar10"]
    assert [(r.run.lr, r.run.steps) for r in recipes.values()] == [(0.1, 1), (0.01, 16), (0.1, 100)]
    assert {tuple(a.label for a in r.attacks) for r in recipes.values()} == {("clean-stream", "vanilla")}
    assert all(r.model.width == 4 for r in recipes.values())


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("items/some2020-table1.toml", 'extends = "digits"', 'extends = "digit"', "no base 'digit'.*digits"),
        ("bases/digits.toml", "[recipe.model]", 'extends = "digits"\n[recipe.model]', "circle"),
        ("published/table.csv", "data,attack,defence", "data,attack,defense", "no column defence"),
        ("published/table.csv", "83.4,", "83.4%,", "line 2: value and std"),
        ("items/some2020-table1.toml", "[small.run]", "[small.runs]", "'runs'.*run"),
        ("items/some2020-table1.toml", "[[check]]", "[[checks]]", "'checks'.*check"),
        ("items/some2020-table1.toml", "[table.cells.data]", "[table.cells.date]", "no row or column"),
        ("items/some2020-table1.toml", 'published = "table.csv"', 'published = "tabel.csv"', "no published/tabel.csv"),
        ("items/some2020-table1.toml", "claim =", "claims =", "'claims'.*claim"),
    ],
)
def test_a_wrong_file_is_named(folder: Path, file: str, old: str, new: str, message: str) -> None:
    change(folder, file, old, new)
    with pytest.raises(ConfigError, match=message):
        read_item(NAME, folder)


def test_an_unknown_item_and_a_wrong_recipe_are_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match="some2020-table1"):
        read_item("some2020-table11", folder)
    change(folder, "items/some2020-table1.toml", "lr = 0.01", "lrr = 0.01")
    with pytest.raises(ConfigError, match=r"some2020-table1 at scale small.*lrr"):
        read_item(NAME, folder).recipe("small")


def test_an_item_may_show_the_runs_of_another(folder: Path, tmp_path: Path) -> None:
    other = folder / "items" / "some2020-figure1.toml"
    head = 'title = "The same"\nsource = "Somebody et al., Figure 1"\nclaim = "the same"\nalso = ["some2020-table1"]\n'
    other.write_text(head, encoding="utf-8")
    table, figure = read_item(NAME, folder), read_item("some2020-figure1", folder)
    assert [part.name for part in figure.parts] == [NAME]
    assert progress(figure, "smoke", tmp_path) == progress(table, "smoke", tmp_path) == (0, 8)
    other.write_text(head + 'extends = "digits"\n[recipe.attack]\nname = "clean"\n', encoding="utf-8")
    assert [part.name for part in read_item("some2020-figure1", folder).parts] == ["some2020-figure1", NAME]
    assert progress(read_item("some2020-figure1", folder), "smoke", tmp_path) == (0, 10)


def test_a_panel_has_a_line_of_each_measure(folder: Path) -> None:
    change(folder, f"items/{NAME}.toml", 'y = "after", line = "attack"', 'y = ["before", "after"], unit = "accuracy"')
    (drawing,) = series_drawings(read_item(NAME, folder), rows(RUNS))
    assert drawing.alt.count("accuracy before the trigger") == drawing.alt.count("accuracy after the trigger") == 1
    change(folder, f"items/{NAME}.toml", '["before", "after"]', '["before", "afterr"]')
    with pytest.raises(ConfigError, match="unknown measure 'afterr'"):
        read_item(NAME, folder)


def test_points_of_a_line_are_its_seeds_and_few_of_them_have_no_bar(folder: Path) -> None:
    (panel,) = panels_of(read_item(NAME, folder), [*RUNS, run_of(2, 0.92)])
    two, three = panel.lines["clean-stream"]["none"], panel.lines["vanilla"]["none"]
    assert (two.values, two.ends) == ([81.0, 85.0], None)
    assert three.values == [90.0, 91.0, 92.0]
    assert three.ends == pytest.approx((91 - 2.484, 91 + 2.484), abs=1e-3)  # t of 2 degrees, 4.303, over root 3


def test_the_bar_of_two_seeds_does_not_flatten_a_figure(folder: Path) -> None:
    (drawing,) = series_drawings(read_item(NAME, folder), rows(RUNS))
    ticks = [float(text) for text in re.findall(r">([\d.]+)</text>", drawing.svg)]
    assert min(ticks) >= 40  # the interval of (81, 85) alone would reach from 58 to 108
    assert max(ticks) <= 100


RUNS = [
    *(run_of(s, a, attack="clean-stream") for s, a in ((0, 0.81), (1, 0.85))),
    *(run_of(s, a) for s, a in ((0, 0.90), (1, 0.91))),
    run_of(0, 0.5, defence="clip", attack="clean-stream", config={"defence": {"name": "clip", "clip_norm": 0.1}}),
]


def test_a_mean_near_zero_has_no_more_digits_than_the_number_beside_it(folder: Path) -> None:
    cell = compared(read_item(NAME, folder), RUNS[:4])[0]
    near_zero = replace(cell, seeds={0: -1e-14, 1: 1e-14}, interval=Interval.of([-1.0, 1.0 + 1e-14]))
    assert written(near_zero) == "0.0 ± 12.7 (83.4)"


def test_each_printed_number_stands_beside_ours(folder: Path) -> None:
    item = read_item(NAME, folder)
    cells = compared(item, RUNS[:4])
    assert [c.interval and round(c.interval.mean, 6) for c in cells] == [83.0, None, 90.5, None, None]
    assert cells[0].difference == pytest.approx(-0.4)
    (first, *_) = records(item, cells)
    assert (first["paper"], first["n"], first["seeds"]) == (83.4, 2, "0:81 1:85")
    table = beside(item, cells, "smoke")
    assert list(table.head) == ["data", "attack", "ST", "GC"]
    (lines,) = table.rows.values()
    assert [line[:2] for line in lines] == [["CIFAR-10", "Clean"], ["CIFAR-10", "Poison"], ["SVHN", "Clean"]]
    assert lines[0][2].endswith("(83.4)")
    tones = [cell.tone for line in lines for cell in line if isinstance(cell, Toned)]
    assert tones == ["near", "absent", "apart", "absent", "absent"]
    assert "3 of 5" in table.note


def test_a_single_seed_is_said_to_be_near_or_nothing(folder: Path) -> None:
    item = read_item(NAME, folder)
    near, _, far, *_ = map(written, compared(item, [run_of(0, 0.84, attack="clean-stream"), run_of(0, 0.90)]))
    assert isinstance(near, Toned)
    assert near.tone == "near"
    assert not isinstance(far, Toned)  # no interval says that the paper's number is outside


def test_table_and_claims_may_be_about_some_runs_only(folder: Path) -> None:
    others = [replace(run, config={**run.config, "variant": "lr-0.1"}) for run in RUNS[:4]]
    change(folder, f"items/{NAME}.toml", "[recipe]", 'where = { variant = ["none", "lr-0.03"] }\n\n[recipe]')
    item, seeds = read_item(NAME, folder), {0: 81.0, 1: 85.0}
    assert compared(item, [*RUNS, *others])[0].seeds == pytest.approx(seeds)
    assert compared(item, others)[0].interval is None
    assert [v.outcome for v in verdicts(item, others)] == [Ruling.ABSENT]
    change(folder, f"items/{NAME}.toml", "variant =", "variants =")
    with pytest.raises(ConfigError, match=r"\[where\].*variants"):
        read_item(NAME, folder)


def test_latex_prints_the_table_and_escapes_it(folder: Path) -> None:
    text = latex(beside(read_item(NAME, folder), compared(read_item(NAME, folder), RUNS[:4]), "smoke"))
    assert text.count(r"\\") == 4
    assert r"$\pm$" in text
    assert "±" not in text
