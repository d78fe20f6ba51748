"""The page in a browser: nothing is asked for, nothing complains, and it fits a phone."""

import shutil
from pathlib import Path
from typing import Any

import pytest

import mithridate as mi
from tests.audit.targets import QUICK, table_target

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra `test`")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt install chromium)"),
]


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("audit")
    target = lambda seed: table_target(seed, lr=10.0, defence="gate")  # noqa: E731  (called with `seed=`)
    mi.audit.run({"budget": QUICK}, target=target, out=out)
    return out / "audit.html"


@pytest.fixture(scope="module")
def browser() -> Any:
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1300])
def test_it_loads_nothing_complains_of_nothing_and_fits(browser: Any, html: Path, scheme: str, width: int) -> None:
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(html.as_uri())
    assert (asked, said) == ([html.as_uri()], [])
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    first = page.locator("section.finding p")
    assert 4 <= first.count() <= 11
    assert page.locator("h2").first.inner_text() == "Findings"
    assert page.locator("figure svg[role=img]").count() == 2
