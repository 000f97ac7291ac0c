"""The page in headless Chromium; skipped where none is installed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from reports.report import write
from tests.reports.test_page import HOSTILE, SUITES, made_up

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as started:
        # The sandbox of Chromium cannot start for root; the pages are our own.
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("shown")
    suites = {name: SUITES[name] for name in ("bbh__fusellm", "commonsense")}
    return write(made_up(home, ["base", "one", "other"], suites, items=4))["html"]


class Said:
    """Everything a page said or asked for while it was open."""

    def __init__(self, page: Page) -> None:
        self.messages: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.messages.append(message.text))
        page.on("pageerror", lambda error: self.messages.append(str(error)))
        page.on("dialog", lambda dialog: self.messages.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: self.requests.append(request.url))


def opened(chromium: Browser, file: Path, **how: Any) -> tuple[Page, Said]:
    page = chromium.new_page(**how)
    page.set_default_timeout(20_000)
    said = Said(page)
    page.goto(file.as_uri())
    return page, said


@pytest.fixture
def page(chromium: Browser, file: Path) -> Iterator[Page]:
    page, said = opened(chromium, file)
    yield page
    assert said.messages == []
    assert said.requests == [file.as_uri()]
    page.close()


def column(page: Page, panel: str, place: int) -> list[str | None]:
    cells = page.locator(f"#{panel} tbody tr > :nth-child({place})")
    return [cell.get_attribute("data-order") for cell in cells.all()]


def test_a_head_sorts_its_column_both_ways_by_mouse_and_by_keys(page: Page) -> None:
    values = [float(str(v)) for v in column(page, "bbh", 2)]
    assert values != sorted(values)
    button = page.locator("#bbh thead button").nth(1)
    button.click()
    assert [float(str(v)) for v in column(page, "bbh", 2)] == sorted(values)
    head = page.locator("#bbh thead th").nth(1)
    assert head.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")  # the button keeps the focus
    assert [float(str(v)) for v in column(page, "bbh", 2)] == sorted(values, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    page.locator("#bbh thead button").first.click()
    assert head.get_attribute("aria-sort") is None
    names = page.locator("#bbh tbody th").all_inner_texts()
    # In the order of people: 2 before 10.
    assert names[:3] == ["bbh__fusellm_0", "bbh__fusellm_1", "bbh__fusellm_2"]


def test_what_is_not_measured_sorts_last_either_way(page: Page) -> None:
    order = "table => [...table.tBodies[0].rows].map(row => row.cells[1].dataset.order ?? null)"
    page.evaluate("delete document.querySelector('#bbh tbody tr:nth-child(3) td').dataset.order")
    for _ in range(2):
        page.locator("#bbh thead button").nth(1).click()
        assert page.locator("#bbh table").evaluate(order)[-1] is None


def test_a_number_shows_its_signature_when_pointed_at_or_reached_by_keys(page: Page) -> None:
    bar = page.locator("#signature")
    assert bar.is_hidden()
    cell = page.locator("#scores tbody tr").nth(1).locator("td").first
    cell.hover()
    assert bar.inner_text().startswith("suite:bbh__fusellm@p1|")
    assert "model:one@" in bar.inner_text()
    page.mouse.move(0, 0)
    page.locator("#scores [tabindex='0'][data-signature]").focus()
    assert "model:base@" in bar.inner_text()
    page.keyboard.press("ArrowDown")
    assert "model:one@" in bar.inner_text()
    page.keyboard.press("ArrowRight")
    assert bar.inner_text().startswith("suite:commonsense@p1|")
    page.keyboard.press("Escape")
    assert bar.is_hidden()
    # A table's numbers are one stop of the Tab key.
    assert page.locator("#bbh [tabindex='0'][data-signature]").count() == 1


def test_items_are_browsed_by_suite_and_rows(page: Page) -> None:
    browser = page.locator("[data-browser]")
    suite, one, other, which = browser.locator("select").all()
    suite.select_option(label="Suite bbh__fusellm")
    one.select_option(label="base")
    other.select_option(label="other")
    total = browser.locator("details").count()
    data = json.loads(page.locator("#data").text_content() or "")["items"]["suites"][0]
    assert total == sum(i["said"][0][0] != i["said"][2][0] for i in data["items"])
    told = browser.get_by_role("status").inner_text()
    assert told == (
        f"{total} shown; {data['differ'][0][2]} of the suite's items differ between these rows."
    )
    which.select_option(label="first row better")
    better = browser.locator("details").count()
    which.select_option(label="second row better")
    assert better + browser.locator("details").count() == total
    item = browser.locator("details").first
    item.locator("summary").focus()
    page.keyboard.press("Enter")
    assert item.locator("h4").all_inner_texts() == ["base: wrong", "other: right"]
    prompt, first, second = item.locator("pre").all_inner_texts()
    number = prompt.split()[1]
    assert first.startswith(f"Row 0 says {number}: so so")
    assert second.startswith(f"Row 2 says {number}: so so")
    other.select_option(label="base")
    assert browser.get_by_role("status").inner_text() == "Choose two rows."


def test_a_phone_scrolls_tables_and_not_the_page(chromium: Browser, file: Path) -> None:
    page, _ = opened(chromium, file, viewport={"width": 360, "height": 640})
    page.evaluate("document.querySelectorAll('details').forEach(box => { box.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    wide = page.locator("#scores .scroll")
    assert wide.get_attribute("tabindex") == "0"
    assert wide.get_attribute("aria-label") == "Table: Scores, and gains below them"
    page.close()


def test_the_page_follows_the_readers_light_and_prints(chromium: Browser, file: Path) -> None:
    colours = []
    for scheme in ("light", "dark"):
        page, _ = opened(chromium, file, color_scheme=scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        ink = page.locator("#gains svg text").first.evaluate("x => getComputedStyle(x).fill")
        assert ink == page.evaluate("getComputedStyle(document.body).color")
        page.close()
    assert colours == ["rgb(255, 255, 255)", "rgb(13, 17, 23)"]
    page, said = opened(chromium, file, color_scheme="dark")
    page.emulate_media(media="print")  # ink on paper, whatever the screen is like
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(31, 35, 40)"
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF")
    assert said.messages == []
    page.close()


def test_hostile_text_is_shown_and_does_nothing(chromium: Browser, tmp_path: Path) -> None:
    hostile = HOSTILE.replace("\ud800", "")
    rows = [f"base{hostile}", f"one{hostile}"]
    suites = {"commonsense": (2, "exact_match", True)}
    index = made_up(tmp_path, rows, suites, 10, hostile, length=1_000_000)
    page, said = opened(chromium, write(index)["html"])
    box = page.locator("[data-browser] details").first
    box.locator("summary").click()
    shown = box.locator("pre").first.inner_text()
    assert shown.startswith("<script>alert(1)</script><img src=x onerror=alert(2)>]]>&amp;|`$x$`")
    assert "characters left out" in shown
    assert page.evaluate("[document.images.length, document.scripts.length]") == [0, 2]
    assert "base<script>" in page.locator("#scores tbody th").first.inner_text()
    assert said.messages == []
    assert len(said.requests) == 1
    page.close()


def test_the_policy_refuses_a_script_that_got_in(chromium: Browser, file: Path) -> None:
    broken = file.with_name("broken.html")
    broken.write_text(file.read_text().replace("</main>", "<script>alert(1)</script></main>"))
    page, said = opened(chromium, broken)
    page.wait_for_function("document.querySelector('thead button')")
    assert len(said.messages) == 1
    assert "Content Security Policy" in said.messages[0]
    page.close()
