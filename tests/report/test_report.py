# ruff: noqa: RUF001  (cells are written with a multiplication sign)

import base64
import csv
import errno
import hashlib
import inspect
import re
import shutil
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mithridate.bench import store
from mithridate.bench.store import Run, read_runs
from mithridate.core.errors import StoreError, WriteError
from mithridate.report import ReportPaths, build_report
from mithridate.report.figures.accuracy_curves import accuracy_curves
from mithridate.report.page import inline
from mithridate.report.page import page as render
from mithridate.report.rows import Row
from mithridate.report.tables.section import TableSection

Make = Callable[..., Run]
MakeRow = Callable[..., Row]
Save = Callable[[Run], Run]

VOID = {"meta", "br", "img", "link", "hr", "input"}
HOSTILE = (
    "=cmd|' /C calc'!A0 \"><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)> {{7*7}} ../../up"
)


class Page(HTMLParser):
    """Text, tables, ids, links and resources of a page; fails on unbalanced tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.resources: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.words: list[str] = []
        self.comments: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            self.attributes.append(name)
            if name == "id":
                self.ids.append(value or "")
            elif name in {"href", "xlink:href"} and tag in {"a", "use"}:
                self.links.append(value or "")
            elif name in {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}:
                self.resources.append(value or "")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)
        if self.open and self.open[-1] in {"td", "th", "code"} and self.tables and self.tables[-1]:
            self.tables[-1][-1][-1] += data

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def check_self_contained(page: Page, source: str) -> None:
    assert all(re.fullmatch(r"#.+|(figures/)?[A-Za-z0-9_-]+\.[a-z]+", link) for link in page.links)  # beside the page
    assert all(resource.startswith(("data:", "#")) for resource in page.resources)
    assert all(match.startswith(("#", "data:")) for match in re.findall(r"url\(\s*['\"]?([^)]*)", source))
    assert "@import" not in source
    assert not {"link", "iframe", "object", "embed", "base", "form", "img"} & set(page.tags)
    assert page.tags.count("script") <= 1  # ours, which the page's policy names by its hash and lets nothing else run
    assert not [name for name in page.attributes if name.startswith("on")]
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


@pytest.fixture(scope="module")
def built(demo_store: Path, tmp_path_factory: pytest.TempPathFactory) -> ReportPaths:
    return build_report([demo_store], tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(built: ReportPaths) -> Page:
    return Page(built.html.read_text(encoding="utf-8"))


def test_all_files_are_written(built: ReportPaths) -> None:
    out = built.html.parent
    written = {path for path in out.rglob("*") if path.is_file()} - {out / ".report.lock"}
    assert written == {built.html, *built.files.values(), *built.figures}
    tables = [f"{name}.{kind}" for name in ("summary", "measures") for kind in ("csv", "parquet", "md", "tex")]
    assert sorted(built.files) == sorted([*tables, "runs.csv", "runs.parquet"])
    assert all(path == out / name for name, path in built.files.items())
    assert {path.suffix for path in built.figures} == {".svg", ".png", ".pdf"}
    assert len(built.figures) == 3 * (1 + 4 + 1 + 1)  # accuracy, images, norms, the clean stream


def test_the_page_links_every_file_beside_it(built: ReportPaths, page: Page) -> None:
    there = {path.relative_to(built.html.parent).as_posix() for path in (*built.files.values(), *built.figures)}
    assert {link for link in page.links if not link.startswith("#")} == there


def test_parquet_and_csv_hold_the_same_rows(built: ReportPaths) -> None:
    for name in ("summary", "runs", "measures"):
        lines = pq.read_table(built.files[f"{name}.parquet"]).to_pylist()
        with built.files[f"{name}.csv"].open(encoding="utf-8", newline="") as handle:
            texts = list(csv.DictReader(handle))
        assert [{key: "" if v is None else str(v) for key, v in line.items()} for line in lines] == texts


def test_page_is_self_contained(built: ReportPaths, page: Page) -> None:
    check_self_contained(page, built.html.read_text(encoding="utf-8"))


def test_page_reads_in_order(page: Page) -> None:
    wanted = ["chart-1", "doubts", "results", "costs", "holds", "clean-stream", "images", "norms", "alarms", "runs"]
    assert [anchor for anchor in page.ids if anchor in wanted] == wanted


def test_the_only_script_that_may_run_is_ours(built: ReportPaths) -> None:
    html = built.html.read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    assert script == Path(inspect.getfile(build_report)).with_name("page.js").read_text(encoding="utf-8")


def test_headline_is_computed(demo_store: Path, page: Page) -> None:
    runs = read_runs([demo_store])

    def mean(attack: str, of: Callable[[Mapping[str, Any]], float]) -> float:
        return 100 * statistics.mean(
            of(run.summary) for run in runs if (run.summary["attack"], run.summary["defence"]) == (attack, "none")
        )

    def mean_drop(attack: str) -> float:
        return mean(attack, lambda summary: float(summary["drop"]))

    lost = mean("accumulative", lambda summary: summary["accuracy_start"] - summary["accuracy_before_trigger"])
    assert (
        f"One batch cost {mean_drop('accumulative'):.1f} points (n = 3) after a phase of 3 to 4 batches that had "
        f"already cost {lost:.1f} points; "
        f"the same kind of batch alone (vanilla) cost {mean_drop('vanilla'):.1f} points (n = 3)." in page.text
    )


def test_table_equals_independent_numbers(demo_store: Path, page: Page) -> None:
    runs = read_runs([demo_store])
    table = next(table for table in page.tables if table[0][:2] == ["attack", "defence"])
    assert len(table) == 11
    for attack, defence, *cells in table[1:]:
        members = [r.summary for r in runs if (r.summary["attack"], r.summary["defence"]) == (attack, defence)]
        for cell, metric in zip(
            cells, ("accuracy_start", "accuracy_before_trigger", "accuracy_after_trigger", "drop"), strict=False
        ):
            values = [100 * s[metric] for s in members if s[metric] is not None]
            mean, std = cell.split(" ± ")
            assert float(mean) == pytest.approx(statistics.mean(values), abs=0.051)
            assert float(std) == pytest.approx(statistics.stdev(values), abs=0.051)
    assert [row[-1] for row in table[1:]].count("2 of 3") == 1


def test_alarms_are_folded_and_counted(demo_store: Path, built: ReportPaths, page: Page) -> None:
    alarmed = [[step for step in run.trace if step["alarms"]] for run in read_runs([demo_store])]
    said = f"{sum(map(len, alarmed))} in {sum(map(bool, alarmed))} of {len(alarmed)} runs"
    source = built.html.read_text(encoding="utf-8").partition('<h2 id="alarms">')[2]
    assert re.match(rf".*</h2>\s*<details>\s*<summary>{said}</summary>\s*<div class=\"scroll\"", source)


def test_the_chart_stands_under_the_headline_before_anything_else(built: ReportPaths) -> None:
    source = built.html.read_text(encoding="utf-8")
    marks = ('class="headline"', 'class="numbers"', "<svg", 'class="setting"', 'class="names"')
    order = [source.index(mark) for mark in marks]
    assert order == sorted(order)
    assert source.count('<dl class="numbers">') == 1
    assert "Line chart of test accuracy by steps" in source[order[2] : order[2] + 400]


def test_doubts_are_named_with_their_cells(page: Page) -> None:
    for sentence in (
        "pgd, loud × none: 1 of 3 runs (seed 2) diverged",
        "accumulative × clip: 1 of 3 runs (seed 1) halted before the trigger; the drop is that of the other 2.",
        "pgd, loud × clip: 20.0 points were lost before the trigger and 6.0 in its step",
        "accumulative × clip: a monitor raised an alarm before the trigger in 1 of 3 runs (seed 1).",
        "accuracy below the floor",
    ):
        assert sentence in page.text
    assert "Too few seeds" in page.text.partition("Checked, nothing found")[2]


def test_every_run_and_setting_is_there(demo_store: Path, page: Page) -> None:
    runs = page.tables[-1]
    assert {row[0] for row in runs[1:]} == {run.path.name for run in read_runs([demo_store])}
    for piece in ("burn_in.epochs", "2.12.0", "attack.name = vanilla", "amplified 2 times"):
        assert piece in page.text


@pytest.mark.slow
def test_same_runs_give_the_same_bytes(demo_store: Path, built: ReportPaths, tmp_path: Path) -> None:
    again = build_report([demo_store], tmp_path)
    assert again.html.read_bytes() == built.html.read_bytes()
    assert [p.read_bytes() for p in again.figures] == [p.read_bytes() for p in built.figures]


def test_hostile_names_stay_text(make_run: Make, save_run: Save, tmp_path: Path) -> None:
    run = make_run(
        label=HOSTILE,
        defence_label=HOSTILE,
        dataset=HOSTILE,
        model=HOSTILE,
        alarms={1: HOSTILE},
        channels=1,
        environment={HOSTILE: HOSTILE},
        config={"title": HOSTILE, "data": {"name": HOSTILE, "nested": {HOSTILE: HOSTILE}}},
        summary={"status": HOSTILE, "stopped_by": HOSTILE},
    )
    save_run(replace(run, path=tmp_path / "store" / "run"))
    built = build_report([tmp_path / "store"], tmp_path / "out" / "deep")
    source = built.html.read_text(encoding="utf-8")
    page = Page(source)
    check_self_contained(page, source)
    assert HOSTILE in page.text
    assert all(path.parent == tmp_path / "out" / "deep" / "figures" for path in built.figures)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+\.(svg|png|pdf)", path.name) for path in built.figures)
    for path in (built.files["summary.csv"], built.files["runs.csv"]):
        with path.open(encoding="utf-8", newline="") as handle:
            (record,) = csv.DictReader(handle)
        assert record["attack"] == f"'{HOSTILE}"
    assert "<script" not in built.files["summary.md"].read_text(encoding="utf-8")
    assert all("<script" not in p.read_text(encoding="utf-8") for p in built.figures if p.suffix == ".svg")


def test_undefended_runs_have_no_measures(make_run: Make, save_run: Save, tmp_path: Path) -> None:
    for seed in (0, 1):
        save_run(replace(make_run(seed=seed), path=tmp_path / "store" / str(seed)))
    built = build_report([tmp_path / "store"], tmp_path / "out")
    assert not [name for name in built.files if name.startswith("measures")]
    assert not {"costs", "holds"} & set(Page(built.html.read_text(encoding="utf-8")).ids)


def test_a_table_section_is_escaped_and_left_out_without_rows(make_row: MakeRow) -> None:
    def section(name: str, rows: dict[str, list[tuple[str, ...]]]) -> TableSection:
        head = ("who", "how <much>")
        return TableSection(
            name, f"Heading {name}", "Intro & more.", head, rows, note="Last <b>word</b>.", names=1, bold=1
        )

    one = section("one", {"a on b": [("<i>x</i>", "1.0"), ("y", "—")]})
    two = section("two", {"a on b": [("x", "1.0")], "c on d": [("y", "2.0")]})
    last = section("last", {"": [("z", "0")]})  # what follows a table is not told from its last cell
    source = render([make_row(0.1)], [one, section("none", {}), two, last])
    page = Page(source)
    check_self_contained(page, source)
    assert [anchor for anchor in page.ids if anchor in {"one", "none", "two"}] == ["one", "two"]
    assert "#none" not in page.links
    tables = [table for table in page.tables if table[0] == ["who", "how <much>"]]
    assert tables[:2] == [
        [["who", "how <much>"], ["<i>x</i>", "1.0"], ["y", "—"]],
        [["who", "how <much>"], ["a on b"], ["x", "1.0"], ["c on d"], ["y", "2.0"]],
    ]
    assert page.text.count("Last <b>word</b>.") == 3
    assert one.markdown().splitlines() == [
        "| who | how <much> |",
        "| --- | ---: |",
        "| &lt;i&gt;x&lt;/i&gt; | 1.0 |",
        "| y | — |",
    ]
    assert two.markdown().splitlines()[0::3] == ["| model and data set | who | how <much> |", "| c on d | y | 2.0 |"]


def test_many_sentences_of_a_finding_are_a_list(make_row: MakeRow) -> None:
    few = [make_row(0.2), *(make_row(0.1, defence=name) for name in "abcd")]
    assert "<li>Under" not in render(few, [])
    page = render([*few, make_row(0.1, defence="e")], [])
    assert page.count("<li>Under") == 5
    assert "<li>The attack is accumulative.</li>" in page


@pytest.mark.slow
def test_names_that_look_alike_get_files_of_their_own(make_run: Make, save_run: Save, tmp_path: Path) -> None:
    for i, label in enumerate(("a b", "a/b", "A:b")):
        save_run(replace(make_run(label=label, channels=1), path=tmp_path / "store" / str(i)))
    names = [path.name.lower() for path in build_report([tmp_path / "store"], tmp_path / "out").figures]
    assert len(set(names)) == len(names) == 3 * (1 + 3 + 1)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"channels": 3},
        {"after": None, "status": "halted", "alarms": {3: "stop"}},
        {"attack": "clean", "accuracies": (0.9,)},
        {"environment": {}},
    ],
    ids=["bare", "images", "halted", "clean", "no environment"],
)
def test_one_run_is_enough(make_run: Make, save_run: Save, tmp_path: Path, how: dict[str, Any]) -> None:
    save_run(replace(make_run(**how), path=tmp_path / "run"))
    built = build_report([tmp_path / "run"], tmp_path / "out")
    source = built.html.read_text(encoding="utf-8")
    check_self_contained(Page(source), source)
    assert "1 seed (0)" in source


@pytest.mark.slow
def test_several_groups_share_a_page(make_run: Make, save_run: Save, tmp_path: Path) -> None:
    for dataset in ("digits", "mnist"):
        save_run(replace(make_run(dataset=dataset), path=tmp_path / "store" / dataset))
    built = build_report([tmp_path / "store"], tmp_path / "out")
    source = built.html.read_text(encoding="utf-8")
    check_self_contained(Page(source), source)
    first, second = (source.index(f'<p class="subject">small_cnn on {name}</p>') for name in ("digits", "mnist"))
    assert first < source.index('id="chart-1"') < second < source.index('id="chart-2"')


def test_an_empty_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no finished run"):
        build_report([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inlined_figures_share_no_ids(make_row: MakeRow) -> None:
    drawing = accuracy_curves([make_row(0.2)])
    assert drawing is not None
    first, second = (inline(replace(drawing, alt='a "quoted" <alt>'), prefix) for prefix in ("one", "two"))
    assert first.startswith('<svg role="img" aria-label="a &#34;quoted&#34; &lt;alt&gt;"')
    ids = [{part.partition('"')[0] for part in svg.split(' id="')[1:]} for svg in (first, second)]
    assert len(ids[0]) == len(ids[1]) > 10
    assert not ids[0] & ids[1]
    used = {part.partition('"')[0] for part in first.split('xlink:href="#')[1:]}
    assert used
    assert used <= ids[0]


def test_inlined_figures_have_the_colours_of_the_page_and_their_names_are_left_alone(make_row: MakeRow) -> None:
    label = 'a #0072b2: #d55e00 id="b url(#c'
    drawing = accuracy_curves([make_row(0.2, label=label)])
    assert drawing is not None
    svg = inline(drawing, "one")
    assert ">defence: none</text>" in svg
    assert f"> {label}</text>" in svg
    styles = re.findall(r'style="([^"]*)"', svg)
    assert not [text for text in styles if "#" in text]
    assert {"var(--ink)", "var(--paper)", "var(--shade)"} <= {
        name for t in styles for name in re.findall(r"var\(.*?\)", t)
    }
    assert "<style" not in svg


@pytest.mark.slow
def test_a_report_on_a_disk_that_is_full_is_one_message_and_keeps_the_old_one(
    demo_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build_report(demo_store, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(WriteError, match=r"summary\.csv cannot be written \(No space left on device\)"):
            build_report(demo_store, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert old.html.is_file()


@pytest.mark.slow
def test_a_report_where_no_folder_can_be(demo_store: Path, tmp_path: Path) -> None:
    (tmp_path / "report").write_text("mine", encoding="utf-8")
    with pytest.raises(WriteError, match="cannot be written"):
        build_report(demo_store, tmp_path / "report")
    assert (tmp_path / "report").read_text(encoding="utf-8") == "mine"


@pytest.mark.slow
def test_what_a_killed_report_left_is_removed(demo_store: Path, tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    for folder in (tmp_path, tmp_path / "figures"):
        (folder / ".report.html.x.part").write_text("half", encoding="utf-8")
    build_report(demo_store, tmp_path)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
def test_runs_that_have_not_ended_are_named(demo_store: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_store, tmp_path / "store")
    store.write_toml(tmp_path / "store" / "later__none__seed7" / store.CONFIG, {})
    page = build_report(tmp_path / "store", tmp_path / "report").html.read_text(encoding="utf-8")
    assert "have not ended: later__none__seed7." in page
