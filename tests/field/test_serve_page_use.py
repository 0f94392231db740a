"""The chat page in a browser, for people who write code and make mistakes: every character is
shown, a refused message changes nothing, the page works behind a proxy with a prefix, and nothing
can be left on the server's disk or sent by another site's page."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright
from proxy import proxied
from serving import NAME, TINY, running

from llmquant_serve.engines.base import EngineError, Step, Token
from llmquant_serve.engines.local import LocalEngine
from llmquant_serve.generation.text_model import TextModel
from llmquant_serve.service import Limits, Service

# Gradio uses what pandas has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")
expect.set_options(timeout=20_000)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Saying(LocalEngine):
    """Says ``words``, after ``thinks`` seconds and with ``pause`` seconds behind each; fails at
    once, or after them, when ``fails`` says so."""

    words, fails = "Yes.", ""
    thinks = pause = 0.0

    def as_before(self):
        self.words, self.fails, self.thinks, self.pause = "Yes.", "", 0.0, 0.0

    async def generate(self, prompt, sampling):
        if self.fails == "at once":
            raise EngineError("the <engine> broke at once")
        await asyncio.sleep(self.thinks)
        ids = self.tokenizer.encode(self.words, add_special_tokens=False)
        for i in ids[:-1]:
            yield Step((Token(i),))
            await asyncio.sleep(self.pause)
        if self.fails == "midway":
            raise EngineError("the <engine> broke midway")
        yield Step((Token(ids[-1]),), "stop")


@contextmanager
def serving_page(model, limits=None, **options):
    from llmquant_serve.chat.page import mount

    engine = Saying(model)
    text = TextModel(TINY, engine.info.vocab)
    engine.tokenizer = text.tokenizer
    service = Service(engine, text, NAME, limits or Limits())
    with running(
        service, ui=True, extend=lambda app: mount(app, service, (), None, TINY), **options
    ) as live:
        yield live


@pytest.fixture(scope="module")
def server(llama):
    with serving_page(llama, Limits(max_prompt=1500, max_body=100_000)) as live:
        yield live


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.fail("the page is tested in a browser and there is none: install chromium")
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(browser, url):
    page = browser.new_context(accept_downloads=True).new_page()
    page.set_default_timeout(20_000)
    page.goto(f"{url}/ui/", wait_until="domcontentloaded")
    expect(page.locator("#box textarea")).to_be_visible(timeout=30_000)
    return page


@pytest.fixture(scope="module")
def one_page(browser, server):
    page = opened(browser, server.url)
    yield page
    page.context.close()


@pytest.fixture
def page(one_page, server):
    """The page, its conversation empty."""
    server.service.engine.as_before()
    if one_page.locator("#clear").is_visible():  # nothing to clear, no button
        one_page.locator("#clear").click()
    expect(one_page.locator("#chat .message")).to_have_count(0)
    return one_page


def send(page, text):
    page.locator("#box textarea").fill(text)
    page.locator("#send").click()


def shown(page, side):
    return page.locator(f"#chat .{side}.message")


def exported(page):
    with page.expect_download() as download:
        page.locator("#export").click()
    return json.loads(Path(download.value.path()).read_text(encoding="utf-8"))


TEXTS = [
    "Write <name> here", "vector<int> v; std::map<std::string, int> m;", "a<b and b>c && d",
    "<b>bold</b> <script>alert(1)</script>", "&lt;div&gt; &amp; &#60; &nbsp;", "if (a < b) { x }",
    "<!-- a comment --> <br> </p>", "`<tag>` and ``a ` b`` and `open", "**bold** __init__ *args _x_",
    "# title\n- item <1>\n> quote", "```c\n#include <stdio.h>\n\nint a[3];\n```\nafter <that>",
    "```\nnot closed <yet>", "[a](javascript:alert(1)) ![i](http://127.0.0.1:9/x.png)",
    "$x<y$ $$a$$ \\(b\\) \\<c\\>", "${1+1} {{x}} {% raw %}", "  two  spaces\ttab", "a\n\n\nb",
    "<think>why</think>", "'\"<'", "<>", "日本 <語> 🙂",
]  # fmt: skip


def test_every_character_is_shown_and_exported(page, server):
    """The same text as a message and as a reply."""
    sides, complaints = ("user", "bot"), []
    page.on("dialog", lambda d: complaints.append(d.message))
    page.on("request", lambda r: complaints.append(r.url) if ":9/" in r.url else None)
    for i, text in enumerate(TEXTS, 1):
        server.service.engine.words = text
        send(page, text)
        expect(shown(page, "bot")).to_have_count(i)
        for side in sides:
            expect(shown(page, side).last).to_have_js_property("textContent", text)
    for side in sides:
        assert shown(page, side).evaluate_all("all => all.map(m => m.textContent)") == TEXTS
    assert [m["content"] for m in exported(page)["messages"]] == [t for t in TEXTS for _ in sides]
    assert complaints == []


def test_the_copy_button_copies_the_text(page, server):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    server.service.engine.words = "vector<int> `a<b` &lt;"
    send(page, "Hello.")
    expect(shown(page, "bot")).to_have_text("vector<int> `a<b` &lt;")
    page.locator("#chat .turn.bot button.copy").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == "vector<int> `a<b` &lt;"


@pytest.mark.parametrize("kind", ["too long", "fails at once", "fails midway", "template"])
def test_a_refused_message_changes_nothing(page, server, monkeypatch, kind):
    engine = server.service.engine
    send(page, "First.")
    expect(shown(page, "bot")).to_have_count(1)
    bad = "word " * 2000 if kind == "too long" else "Second <one>."
    with monkeypatch.context() as broken:
        if kind == "template":
            broken.setattr(
                server.service.text.tokenizer, "chat_template", "{{ raise_exception('no <x>') }}"
            )
        engine.fails = kind.removeprefix("fails ") if kind.startswith("fails") else ""
        send(page, bad)
        words = {"too long": "the prompt has", "template": "no <x>"}.get(
            kind, kind[len("fails ") :]
        )
        notices = page.get_by_text(words)
        expect(notices).to_have_count(1)
        expect(shown(page, "user")).to_have_count(1)
        expect(shown(page, "bot")).to_have_text(["Yes."])
        expect(page.locator("#box textarea")).to_have_value(bad)
        engine.words = kept = "Again." if kind == "too long" else "Yes."
        page.locator("#regenerate").click()
        if kind != "too long":  # nothing is too long without that message
            expect(notices).to_have_count(2)
        expect(shown(page, "bot")).to_have_text([kept])
    engine.fails = ""
    send(page, "Third.")
    expect(shown(page, "bot")).to_have_text([kept, kept])
    assert contents(page) == ["First.", kept, "Third.", kept]


def contents(page):
    return [m["content"] for m in exported(page)["messages"]]


@pytest.mark.parametrize("twice", ["double click", "two clicks", "click and Enter"])
def test_sending_twice_asks_once(page, server, twice):
    server.service.engine.pause = 0.3
    page.locator("#box textarea").fill("Once.")
    if twice == "double click":
        page.locator("#send").dblclick()
    else:
        page.locator("#send").click()
        page.wait_for_timeout(150)
        if twice == "two clicks":
            page.locator("#send").click()
        else:
            page.locator("#box textarea").press("Enter")
    expect(shown(page, "bot")).to_have_text(["Yes."])
    assert contents(page) == ["Once.", "Yes."]


def test_the_next_message_ends_the_reply_before_it(page, server):
    engine = server.service.engine
    engine.words, engine.pause = "a b c d e f g h i j k l m n o p q r s t u v w x y z", 1.0
    send(page, "First.")
    for count in (1, 2, 3):
        expect(shown(page, "bot")).to_have_count(count)
        engine.words, engine.pause = ("Yes.", 0.0) if count == 3 else (engine.words, 1.0)
        send(page, f"Next {count}.")
    expect(shown(page, "bot").last).to_have_text("Yes.")
    messages = contents(page)
    assert messages[0::2] == ["First.", "Next 1.", "Next 2.", "Next 3."]
    assert messages[-1] == "Yes."
    assert all("z" not in words and words for words in messages[1::2])


def test_a_message_stopped_before_a_word_is_in_the_box_again(page, server):
    engine = server.service.engine
    send(page, "First.")
    expect(shown(page, "bot")).to_have_text(["Yes."])
    engine.thinks = 60.0
    send(page, "A long question.")
    expect(shown(page, "user")).to_have_count(2)
    page.locator("#stop").click()
    expect(page.locator("#box textarea")).to_have_value("A long question.")
    expect(shown(page, "user")).to_have_text(["First."])
    server.until_idle()
    engine.thinks = 0.0
    page.locator("#send").click()
    expect(shown(page, "bot")).to_have_text(["Yes.", "Yes."])
    assert contents(page) == ["First.", "Yes.", "A long question.", "Yes."]
    engine.thinks = 60.0
    page.locator("#regenerate").click()
    expect(shown(page, "bot")).to_have_count(1)
    page.locator("#stop").click()
    expect(shown(page, "bot")).to_have_text(["Yes.", "Yes."])
    engine.as_before()  # tests without a page use it too


def left_on_disk():
    root = Path(tempfile.gettempdir()) / "gradio"
    return sorted(str(p) for p in root.rglob("*") if p.is_file()) if root.exists() else []


UPLOADS = (
    "upload", "upload/", "/upload", "process_recording", "stream/x", "component_server", "call/answer",
)  # fmt: skip


@pytest.mark.parametrize("route", UPLOADS)
def test_nothing_can_be_uploaded(server, route):
    before = left_on_disk()
    with server.client as client:
        for size in (10, 50_000, 300_000):
            answer = client.post(f"/ui/gradio_api/{route}", files={"files": ("a.bin", b"x" * size)})
            assert answer.status_code in (404, 413), answer.text
            assert "error" in answer.json()
        assert client.get("/ui/gradio_api/deep_link?session_hash=x").status_code == 404
    assert left_on_disk() == before


def test_the_page_has_the_limits_of_the_api(server):
    with server.client as client:
        for path in ("/ui/gradio_api/queue/join", "/ui/gradio_api/run/predict", "/ui/login"):
            assert client.post(path, json={"data": ["x" * 200_000]}).status_code == 413
            chunked = client.post(path, content=(b"x" * 10_000 for _ in range(20)))
            assert chunked.status_code >= 400


OTHER = "http://evil.example"
POSTS = [
    ("/v1/completions", {"prompt": "a", "max_tokens": 1}), ("/tokenize", {"prompt": "a"}),
    ("/ui/gradio_api/queue/join", {"data": []}), ("/ui/gradio_api/run/predict", {"data": []}),
    ("/ui/login", {}),
]  # fmt: skip
FOREIGN = [
    {"origin": OTHER}, {"origin": OTHER, "sec-fetch-site": "cross-site"}, {"origin": "null"},
    {"origin": "http://127.0.0.1:1", "sec-fetch-site": "same-site"}, {"sec-fetch-site": "cross-site"},
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), POSTS, ids=[p for p, _ in POSTS])
def test_a_post_from_another_origin_is_refused(server, path, body):
    with server.client as client:
        for headers in FOREIGN:
            answer = client.post(path, json=body, headers=headers)
            assert answer.status_code == 403, (headers, answer.text)
            assert "--cors-origin" in answer.json()["error"]["message"]
        for headers in (
            {},
            {"origin": server.url},
            {"origin": server.url, "sec-fetch-site": "same-origin"},
        ):
            assert client.post(path, json=body, headers=headers).status_code != 403


def test_a_page_of_another_origin_cannot_post_in_the_browser(browser, server, tmp_path):
    (tmp_path / "evil.html").write_text("<p>evil</p>", encoding="utf-8")
    page = browser.new_context().new_page()
    page.goto(f"file://{tmp_path}/evil.html")
    before = left_on_disk()
    for path in ("/ui/gradio_api/upload", "/ui/gradio_api/queue/join", "/v1/completions"):
        page.evaluate(
            """async url => { const f = new FormData(); f.append("files", new Blob(["x".repeat(50000)]), "a");
            try { await fetch(url, {method: "POST", body: f, mode: "no-cors"}); } catch (e) {} }""",
            server.url + path,
        )
    assert left_on_disk() == before
    page.context.close()


@pytest.fixture(scope="module")
def rooted(llama):
    with serving_page(llama, root_path="/a/llm") as live:
        yield live


PREFIXES = [
    pytest.param("rooted", "/a/llm", {}, True, id="root path, stripped"),
    pytest.param("rooted", "/a/llm", {}, False, id="root path, not stripped"),
    pytest.param("server", "/llm", {"X-Forwarded-For": "192.0.2.7"}, True, id="forwarded"),
]


@pytest.mark.parametrize(("name", "prefix", "headers", "strip"), PREFIXES)
def test_the_page_works_behind_a_prefix(browser, request, name, prefix, headers, strip):
    server = request.getfixturevalue(name)
    server.service.engine.as_before()
    headers = headers and {"X-Forwarded-Prefix": prefix, **headers}
    with proxied(server.url, prefix, strip=strip, headers=headers) as url:
        page = opened(browser, url)
        foreign = []
        page.on(
            "request",
            lambda r: None if r.url.startswith((url, "data:", "blob:")) else foreign.append(r.url),
        )
        send(page, "Hello <you>.")
        expect(shown(page, "bot")).to_have_text(["Yes."])
        assert len(exported(page)["messages"]) == 2
        answer = page.evaluate("async url => (await fetch(url + '/v1/models')).json()", url)
        assert answer["data"][0]["id"] == NAME
        assert foreign == []
        page.context.close()


@pytest.mark.parametrize("prefix", ["//evil.example", "/a b", "evil", "/../x", "/a\\b", ""])
def test_a_strange_forwarded_prefix_is_ignored(server, prefix):
    with server.client as client:
        answer = client.get("/openapi.json", headers={"x-forwarded-prefix": prefix})
    assert answer.status_code == 200
    assert "evil" not in json.dumps(answer.json().get("servers", []))
