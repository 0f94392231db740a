"""The chat page in a real browser: send, stream, stop, regenerate, settings, A/B, export, at
desktop and phone widths.

Set LLMQUANT_SCREENSHOTS to a folder to look at what the browser saw.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright
from serving import NAME, TINY, running

import llmquant
from llmquant_serve.engines.base import Sampling
from llmquant_serve.engines.local import LocalEngine
from llmquant_serve.generation.text_model import TextModel
from llmquant_serve.service import Limits, Service

# Gradio uses what pandas has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
SIZES = {"desktop": {"width": 1280, "height": 860}, "phone": {"width": 390, "height": 844}}
TABLE = """| model | perplexity | ratio | KL nats |
| --- | ---: | ---: | ---: |
| original | 12.34 ±0.1 | 1 | 0 |
| tiny | 12.71 ±0.1 | 1.030 ±0.002 | 0.0312 ±0.001 |"""


@pytest.fixture(scope="module")
def page_server(model, packed, tmp_path_factory):
    """Chat with tiny-llama packed, A/B with the original."""
    from llmquant_serve.chat.page import mount

    folder = tmp_path_factory.mktemp("card") / "model"
    shutil.copytree(packed, folder)
    card = f"# tiny\n\n<!-- llmquant:measured:start -->\n{TABLE}\n<!-- llmquant:measured:end -->\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    engines = [LocalEngine(m, 2) for m in (model, llmquant.load(TINY, dtype="float32"))]
    service, original = (Service(e, TextModel(TINY, e.info.vocab), NAME, Limits()) for e in engines)
    with running(
        service,
        ui=True,
        reference=original,
        extend=lambda app: mount(app, service, (), original, folder, TINY),
    ) as live:
        yield live


@pytest.fixture(scope="module")
def begun_server(model):
    """A page whose settings were given on the command line."""
    from llmquant_serve.chat.opening import Opening
    from llmquant_serve.chat.page import mount

    opening = Opening("You like rivers.", Sampling(max_tokens=7, temperature=0.0, seed=5))
    engine = LocalEngine(model, 2)
    service = Service(engine, TextModel(TINY, engine.info.vocab), NAME)
    with running(
        service, ui=True, extend=lambda app: mount(app, service, (), None, TINY, opening=opening)
    ) as live:
        yield live


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.fail(
            "the page is tested in a browser and there is none: install the package chromium"
        )
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(browser, server, size):
    page = browser.new_context(viewport=SIZES[size], accept_downloads=True).new_page()
    page.set_default_timeout(20_000)
    page.size, page.complaints = size, []
    page.on("pageerror", lambda e: page.complaints.append(str(e)))
    page.goto(f"{server.url}/ui/", wait_until="domcontentloaded")
    expect(page.locator("#box textarea")).to_be_visible(timeout=30_000)
    return page


@pytest.fixture(params=SIZES)
def page(browser, page_server, request):
    page = opened(browser, page_server, request.param)
    yield page
    assert page.complaints == []
    page.context.close()
    page_server.until_idle()


def test_leaving_the_page_frees_the_slot(browser, page_server):
    page = opened(browser, page_server, "desktop")
    configure(page, 1800)
    page.locator("#box textarea").fill("Tell me a very long story.")
    page.locator("#send").click()
    expect(bot(page).last).not_to_be_empty()
    before = page_server.steps
    page.context.close()
    page_server.until_idle(60)
    assert page_server.steps - before < 900


def look(page, name):
    if folder := os.environ.get("LLMQUANT_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}-{page.size}.png")


def configure(page, most, system=None):
    page.locator("#settings button").first.click()
    number, slider = (
        page.locator(f"#temperature input[type={kind}]") for kind in ("number", "range")
    )
    # A box that is just being shown forgets what is typed in its first moment; the slider shows
    # what was understood.
    for _ in range(20):
        number.fill("0")
        page.wait_for_timeout(200)
        if slider.input_value() == "0":
            break
    page.locator("#max-tokens input").fill(str(most))
    if system is not None:
        page.locator("#system textarea").fill(system)
    page.locator("#max-tokens input").press("Tab")
    look(page, "settings")
    page.wait_for_timeout(
        400
    )  # nobody folds the settings away faster; Gradio would forget what was just typed
    page.locator("#settings button").first.click()


def bot(page):
    return page.locator("#chat .bot.message")


def test_the_top_says_what_answers(page):
    top = page.locator("#facts")
    for said in ("W4 g128 sym, RTN", "of the original's 11.5 MB", "perplexity ×1.030, KL 0.0312"):
        expect(top).to_contain_text(said)


def test_an_empty_page_shows_what_can_be_done(page):
    """And nothing that cannot be: an example is a message, and then there is something to clear."""
    expect(page.locator("#chat .empty")).to_contain_text(f"Ask {NAME}")
    for button in ("stop", "regenerate", "clear", "export"):
        expect(page.locator(f"#{button}")).to_be_hidden()
    look(page, "empty")
    page.locator("#box textarea").fill("Not sent yet.")
    page.locator("#examples button").first.click()
    expect(page.locator("#chat .user.message")).to_have_text(["What is the capital of France?"])
    expect(page.locator("#box textarea")).to_have_value("Not sent yet.")
    expect(page.locator("#examples")).to_be_hidden()
    expect(page.locator("#stop")).to_be_hidden()
    page.locator("#clear").click()
    expect(page.locator("#examples")).to_be_visible()


def test_the_page_is_as_high_as_the_window(page, page_server):
    """The conversation scrolls, the page does not, and the box stays in sight."""
    configure(page, 400)
    page.locator("#box textarea").fill("line\n" * 60)
    page.locator("#send").click()
    expect(page.locator("#status")).to_contain_text("tokens/s")
    high = page.evaluate("""() => ({
        window: innerHeight, page: document.documentElement.scrollHeight,
        wide: document.documentElement.scrollWidth - innerWidth,
        box: document.querySelector("#box").getBoundingClientRect().bottom,
        chat: document.querySelector("#chat").clientHeight,
        content: document.querySelector("#chat").scrollHeight})""")
    assert high["page"] <= high["window"], high
    assert high["wide"] <= 0, high
    assert high["window"] - 90 < high["box"] < high["window"], high
    assert high["content"] > high["chat"] > high["window"] / 2, high
    page.keyboard.press("Escape")  # or it was done already
    expect(page.locator("#stop")).to_be_hidden()


def test_a_refused_message_is_a_notice_and_no_traceback_in_the_log(page, capfd):
    page.locator("#box textarea").fill("word " * 6000)
    page.locator("#send").click()
    expect(page.get_by_text("this server takes at most")).to_be_visible(timeout=30_000)
    look(page, "refused")
    assert "Traceback" not in capfd.readouterr().err


def test_the_first_message_on_an_untouched_page(page):
    page.locator("#box textarea").fill("Hello.")
    page.locator("#box textarea").press("Enter")
    expect(page.locator("#status")).to_contain_text("tokens/s")
    expect(bot(page)).to_have_count(1)
    expect(page.get_by_text("Error")).to_have_count(0)
    page.keyboard.press("Escape")
    expect(page.locator("#stop")).to_be_hidden()


def test_what_the_command_line_said_is_what_the_page_begins_with(browser, begun_server):
    """Also where nobody has opened the settings."""
    page = opened(browser, begun_server, "desktop")
    page.locator("#box textarea").fill("Tell me about the river.")
    page.locator("#send").click()
    expect(page.locator("#status")).to_contain_text(re.compile(r"\b7 tokens .* cut"))
    said = {"system": "You like rivers.", "user": "Tell me about the river."}
    messages = [{"role": role, "content": text} for role, text in said.items()]
    asked = {"messages": messages, "max_tokens": 7, "temperature": 0}
    with begun_server.client as client:
        answer = client.post("/v1/chat/completions", json=asked).json()
    read = f"{answer['usage']['prompt_tokens']} prompt tokens"
    expect(page.locator("#status")).to_contain_text(read)
    assert bot(page).text_content() == answer["choices"][0]["message"]["content"]
    page.locator("#settings button").first.click()
    for place, value in (("system textarea", "You like rivers."), ("seed input", "5")):
        expect(page.locator(f"#{place}")).to_have_value(value)
    page.context.close()


def test_a_setting_that_cannot_be_is_named_and_an_empty_one_is_no_limit(page):
    """The message is back in the box."""
    page.locator("#settings button").first.click()
    page.wait_for_timeout(600)
    number = page.locator("#max-tokens input")
    number.fill("0")
    number.press("Tab")
    page.wait_for_timeout(400)
    page.locator("#box textarea").fill("Tell me about the river.")
    page.locator("#box textarea").press("Enter")
    expect(page.get_by_text("Longest reply is 0 in the settings")).to_be_visible()
    expect(page.locator("#box textarea")).to_have_value("Tell me about the river.")
    expect(page.locator("#chat .message")).to_have_count(0)
    number.fill("")
    number.press("Tab")
    page.wait_for_timeout(400)
    page.locator("#box textarea").press("Enter")
    expect(page.locator("#status")).to_contain_text(re.compile(r" ([2-9]|\d\d+) tokens "))
    page.keyboard.press("Escape")


def test_a_conversation(page, page_server):
    configure(page, 24, "You like rivers.")
    page.locator("#box textarea").fill("Tell me about the river.")
    page.locator("#send").click()
    expect(page.locator("#status")).to_contain_text("24 tokens")
    first = bot(page).last.inner_text()
    assert first.strip()
    look(page, "chat")
    configure(page, 12)
    page.locator("#regenerate").click()
    expect(page.locator("#status")).to_contain_text("12 tokens")
    expect(bot(page)).to_have_count(1)
    assert first.startswith(
        bot(page).last.inner_text().rstrip()[:20]
    )  # greedy: the same again, shorter
    with page.expect_download() as download:
        page.locator("#export").click()
    kept = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert kept["system"] == "You like rivers."
    assert [m["role"] for m in kept["messages"]] == ["user", "assistant"]
    page.locator("#box textarea").fill("And then?")
    page.locator("#box textarea").press("Enter")
    expect(bot(page)).to_have_count(2)
    page.locator("#clear").click()
    expect(bot(page)).to_have_count(0)


def test_clear_empties_the_page_at_any_moment_of_a_reply(page):
    configure(page, 12)
    for wait_ms in (0, 50, 100, 150, 200, 300, 400):
        page.locator("#box textarea").fill("And then?")
        page.locator("#box textarea").press("Enter")
        expect(bot(page)).to_have_count(1)
        page.wait_for_timeout(wait_ms)
        page.locator("#clear").click()
        expect(page.locator("#chat .empty")).to_be_visible()
        page.wait_for_timeout(400)
        expect(page.locator("#chat .empty")).to_be_visible()
        expect(page.locator("#stop")).to_be_hidden()


def test_stop_frees_the_slot(page, page_server, monkeypatch):
    monkeypatch.setattr(page_server.counter, "pause", 0.02)
    configure(page, 1800)
    page.locator("#box textarea").fill("Tell me a very long story.")
    page.locator("#send").click()
    expect(bot(page).last).not_to_be_empty()
    assert page_server.service.engine.load().running == 1
    before = page_server.steps
    page.locator("#stop").click()
    page_server.until_idle(60)
    assert page_server.steps - before < 1700
    expect(page.locator("#chat [aria-busy=true]")).to_have_count(0)
    expect(bot(page)).to_have_count(1)
    look(page, "stopped")


def test_two_models_side_by_side(page):
    configure(page, 40)
    page.get_by_role("tab", name="A/B").click()
    page.locator("#ab-box textarea").fill("Tell me about the history of the river.")
    page.locator("#ab-go").click()
    expect(page.locator("#ab-verdict")).to_contain_text("first difference is at token")
    expect(page.locator("#ab-left .first")).to_have_count(1)
    expect(page.locator("#ab-right .first")).to_have_count(1)
    title = page.locator("#ab-left .first").get_attribute("title")
    assert re.match(r"'.*' [01]\.\d{3} \(.*the other model: [01]\.\d{3} \(", title, re.DOTALL), (
        title
    )
    expect(page.locator("#ab-verdict .tile")).to_have_count(3)
    expect(page.locator("#ab-verdict")).to_contain_text(re.compile(r"\d+ of 40 tokens"))
    expect(page.locator("#ab-stop")).to_be_hidden()
    look(page, "ab")


def test_the_measured_table_is_shown(page):
    page.get_by_role("tab", name="Measured").click()
    expect(page.get_by_role("cell", name="12.34")).to_be_visible()
    look(page, "measured")
