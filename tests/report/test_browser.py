"""The page in a browser: nothing is asked for, nothing complains, tables sort, and it fits a phone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mithridate.bench.store import read_runs
from mithridate.core.batch import Batch
from mithridate.guard import Quarantine, StepLog, StepRecord
from mithridate.report import build_report
from mithridate.report.guarded import build_guard_report
from mithridate.reproduce.leaderboard import write_leaderboard

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra `test`")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt install chromium)"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def html(demo_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report([demo_store], tmp_path_factory.mktemp("page")).html


@pytest.fixture(scope="module")
def guard_html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    log, quarantine = StepLog(folder, defence={"name": "gate"}, environment={}), Quarantine(folder / "quarantine")
    for attempt in range(1, 30):
        record = StepRecord(attempt=attempt, step=0, verdict="refused", reason=40 * "why ", seconds=0, trusted_loss=1.0)
        log.note(record)
    quarantine.put(Batch(torch.rand(30, 3, 8, 8), torch.arange(30)), record=record)
    return build_guard_report(folder).html


@pytest.fixture(scope="module")
def board_html(demo_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_leaderboard(read_runs([demo_store]), tmp_path_factory.mktemp("board"), {})


def opened(browser: Any, html: Path, **context: Any) -> tuple[Any, list[str], list[str]]:
    """The page, what it asked for besides itself, and what its console said."""
    page = browser.new_context(**context).new_page()
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(html.as_uri())
    return page, [url for url in asked if url != html.as_uri()], said


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1300])
@pytest.mark.parametrize("which", ["html", "guard_html", "board_html"])
def test_it_loads_nothing_complains_of_nothing_and_fits(
    browser: Any, which: str, scheme: str, width: int, request: pytest.FixtureRequest
) -> None:
    page, asked, said = opened(
        browser, request.getfixturevalue(which), viewport={"width": width, "height": 900}, color_scheme=scheme
    )
    assert (asked, said) == ([], [])
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("figure svg[role=img]").count() >= 1
    wide = "boxes => boxes.filter(box => box.scrollWidth > box.clientWidth).length"
    assert width < 1300 or page.locator(".scroll, .card").evaluate_all(wide) == 0
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(255, 255, 255)") is (scheme == "light")


def test_the_chart_is_seen_at_once(browser: Any, html: Path) -> None:
    page, _, _ = opened(browser, html, viewport={"width": 1300, "height": 900})
    assert page.locator("figure svg").first.bounding_box()["y"] < 450
    assert page.locator("dl.numbers dd").first.bounding_box()["y"] < 300


def test_names_stay_in_sight_where_a_table_is_wider_than_a_phone(browser: Any, html: Path) -> None:
    page, _, _ = opened(browser, html, viewport={"width": 390, "height": 900})
    box = page.locator("#results ~ div.scroll").first
    box.evaluate("box => { box.scrollLeft = 200 }")
    name, number = (box.locator(f"tbody tr:first-child > :nth-child({n})").bounding_box() for n in (1, 5))
    edge = box.bounding_box()["x"]
    assert box.evaluate("box => box.scrollLeft") == 200
    assert name["x"] == pytest.approx(edge, abs=1)
    assert number["x"] < edge + box.bounding_box()["width"]


def test_figures_are_drawn_in_the_colours_of_the_mode(browser: Any, html: Path) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        page, _, _ = opened(browser, html, color_scheme=scheme)
        word = page.locator("figure svg text").first
        assert word.text_content()
        colours[scheme] = word.evaluate("text => getComputedStyle(text).fill")
        ground = page.locator("figure svg path").first.evaluate("path => getComputedStyle(path).fill")
        assert ground == page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colours["light"] == "rgb(28, 30, 33)"
    assert colours["dark"] == "rgb(230, 231, 233)"


def test_tables_sort_by_number_and_by_text_both_ways(browser: Any, html: Path) -> None:
    page, _, said = opened(browser, html)
    table = page.locator("#results ~ div table").first
    headings = [text.strip() for text in table.locator("thead th").all_inner_texts()]
    column = next(i for i, text in enumerate(headings) if text.startswith("drop"))

    def cells(number: int) -> list[str]:
        return [row.locator("th, td").nth(number).inner_text() for row in table.locator("tbody tr").all()]

    for down in (False, True):
        table.locator("thead th button").nth(column).click()
        drops = [float(text.split()[0]) for text in cells(column)]
        assert drops == sorted(drops, reverse=down)
        assert len(set(drops)) > 2
    table.locator("thead th button").nth(0).click()
    assert cells(0) == sorted(cells(0))
    assert said == []
