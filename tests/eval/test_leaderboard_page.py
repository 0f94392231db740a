"""The page in a real browser: it sorts, filters and shows its plots, alone, without an error and
without the network.

Debian's chromium (``apt-get install chromium``) driven by playwright, which downloads no browser of
its own here. Without one these tests fail: a page that was never opened proves nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import board_kit as kit
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from llmquant_eval.leaderboard.html import render_html
from llmquant_eval.leaderboard.ranking import make_boards

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script>\"'"
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    assert found is not None, (
        "no chromium on PATH; the page is tested in one: apt-get install chromium"
    )
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, headless=True, args=FLAGS)
        yield started
        started.close()


@dataclass
class Opened:
    """A page, and what it said and asked for."""

    page: Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        """The visible rows, in their order."""
        return self.page.locator("tbody:visible").evaluate_all(
            "rows => rows.map(r => r.dataset.row)"
        )


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Opened]:
    """A ranking of four and one of two models, opened from disk."""
    other = kit.report(kit.candidate(EVIL, 1.1, 3_000_000), kit.candidate("b", 1.2, 2_000_000))
    assert other.text is not None
    other = other.model_copy(
        update={"text": other.text.model_copy(update={"sha256": "f" * 64, "source": "file:z.txt"})}
    )
    path = tmp_path / "board.html"
    path.write_text(render_html(make_boards(kit.stored(kit.four(), other))), encoding="utf-8")
    page = browser.new_page()
    page.set_default_timeout(10_000)
    seen = Opened(page)
    page.on(
        "console",
        lambda message: (
            seen.errors.append(message.text) if message.type in ("error", "warning") else None
        ),
    )
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on(
        "dialog", lambda dialog: (seen.errors.append(f"dialog {dialog.message}"), dialog.dismiss())
    )
    page.on("request", lambda request: seen.requests.append(request.url))
    page.goto(path.as_uri())
    yield seen
    assert seen.errors == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [path.as_uri()]
    page.close()


FOUR = ["base", "good", "small", "bad"]


def test_two_rankings_stand_apart(opened: Opened) -> None:
    assert opened.page.locator("section.board").count() == 2
    assert opened.names() == [*FOUR, "base", EVIL, "b"]
    assert opened.page.locator("thead").first.locator("button").all_inner_texts()[:4] == [
        "#",
        "model",
        "scheme",
        "ratio",
    ]


@pytest.mark.parametrize(
    ("column", "once", "twice"),
    [
        pytest.param(
            "size",
            ["small", "good", "bad", "base"],
            ["base", "bad", "good", "small"],
            id="least first",
        ),
        pytest.param(
            "decode tok/s",
            ["small", "good", "bad", "base"],
            ["base", "bad", "good", "small"],
            id="most first",
        ),
        pytest.param(
            "model",
            ["bad", "base", "good", "small"],
            ["small", "good", "base", "bad"],
            id="by name",
        ),
        # The reference has no top-1 agreement with itself: it stands last either way.
        pytest.param(
            "top-1 %",
            ["good", "small", "bad", "base"],
            ["bad", "small", "good", "base"],
            id="one without",
        ),
    ],
)
def test_a_header_sorts(opened: Opened, column: str, once: list[str], twice: list[str]) -> None:
    header = opened.page.locator("thead").first.get_by_role("button", name=column, exact=True)
    header.click()
    assert opened.names()[:4] == once
    header.click()
    assert opened.names()[:4] == twice
    assert opened.names()[4:] == ["base", EVIL, "b"]


def test_filters(opened: Opened) -> None:
    board = opened.page.locator("section.board").first
    board.locator("[name=filter]").fill("W3 bad")
    assert opened.names()[0] == "bad"
    assert board.locator(".count").inner_text() == "1 of 4 models"
    assert board.locator("svg g.off").count() > 0
    board.locator("[name=filter]").fill("")
    board.locator("[name=bits]").select_option("4")
    assert opened.names()[:2] == ["good", "small"]
    board.locator("[name=bits]").select_option("")
    board.locator("[name=front]").check()
    assert opened.names()[:3] == ["base", "good", "small"]


def test_plots_show_and_switch(opened: Opened) -> None:
    board = opened.page.locator("section.board").first
    assert board.locator("figure:visible").count() == 2
    for figure in board.locator("figure:visible svg").all():
        box = figure.bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) > 150
    assert board.locator("figure:visible .whisker").count() > 0
    board.locator("[name=loss]").select_option("perplexity_ratio")
    assert (
        board.locator("figure:visible").evaluate_all("all => all.map(f => f.dataset.loss)")
        == ["perplexity_ratio"] * 2
    )


def test_a_row_unfolds_its_command(opened: Opened) -> None:
    board = opened.page.locator("section.board").first
    assert board.locator("pre:visible").count() == 0
    board.get_by_role("button", name="good").click()
    assert (
        board.locator("pre:visible").inner_text()
        == "llmquant quantize m -o out/x\nllmquant eval out/x --text file:t.txt"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(opened: Opened, scheme: str) -> None:
    opened.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    ratios = opened.page.evaluate(
        CONTRAST, ["body", "td", "thead button", "p", "svg .tick", "svg .name", "figcaption"]
    )
    assert {
        name: ratio for name, ratio in ratios.items() if ratio < 4.5
    } == {}  # WCAG 2.1, level AA
    background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


# WCAG 2.1 contrast of each selector's first element with the nearest painted background behind it.
CONTRAST = """selectors => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => {
    const [r, g, b] = c.slice(0, 3).map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  return Object.fromEntries(selectors.map((s) => {
    const e = document.querySelector(s), style = getComputedStyle(e);
    const [a, b] = [light(rgb(s.startsWith("svg") ? style.fill : style.color)), light(behind(e))].sort((x, y) => y - x);
    return [s, (a + 0.05) / (b + 0.05)];
  }));
}"""


def test_a_phone_scrolls_tables_and_not_the_page(opened: Opened) -> None:
    opened.page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert opened.page.locator(".scroll").first.evaluate("e => e.scrollWidth > e.clientWidth")
    assert (
        opened.page.locator("figure svg").first.evaluate("e => e.getBoundingClientRect().width")
        <= PHONE["width"]
    )
