"""Commands that start no server because they cannot be right, and a chat in a terminal that gets
anything for its input."""

from __future__ import annotations

import re

import pytest
import typer
from serving import TINY
from typer.testing import CliRunner

from llmquant.errors import UsageError
from llmquant_serve.cli import register
from llmquant_serve.server import Binding


def command(*arguments, **options):
    """A command in this process."""
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, arguments, **options)


MISUSE = [
    pytest.param({"LLMQUANT_API_KEY": ""}, [], "LLMQUANT_API_KEY is set but empty", id="empty key"),
    pytest.param(
        {"LLMQUANT_API_KEY": "\t "}, [], "LLMQUANT_API_KEY is set but empty", id="blank key"
    ),
    pytest.param(
        {}, ["--api-key", ""], "an API key must be ASCII, not empty", id="empty --api-key"
    ),
    pytest.param({}, ["--root-path", "llm"], "--root-path is 'llm'", id="no slash"),
    pytest.param({}, ["--root-path", "/a b"], "--root-path is '/a b'", id="a space"),
    pytest.param({}, ["--root-path", "//x"], "--root-path is '//x'", id="another host"),
    pytest.param({}, ["--trusted-proxy", "not an address"], "--trusted-proxy", id="no address"),
    *(
        pytest.param(
            {}, ["--cors-origin", origin], f"--cors-origin is '{origin}'", id=f"{origin!r}"
        )
        for origin in ("", "page.example", "http://page.example/", "http://Page.example", "http://")
    ),
]


@pytest.mark.parametrize(("variables", "arguments", "words"), MISUSE)
def test_misuse_starts_no_server(monkeypatch, variables, arguments, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = command("serve", str(TINY), "--port", "0", *arguments)
    assert isinstance(result.exception, UsageError)
    assert words in str(result.exception)


@pytest.mark.parametrize("option", ["--drain-timeout", "--stall-timeout", "--sse-keep-alive"])
@pytest.mark.parametrize("seconds", ["inf", "nan", "-1", "1e300", "x"])
def test_seconds_that_are_no_time_start_no_server(option, seconds):
    result = command("serve", str(TINY), "--port", "0", option, seconds)
    assert result.exit_code == 2
    assert option in result.output


@pytest.mark.parametrize(
    "origin", ["*", "null", "http://page.example", "https://a.b:8443", "chrome-extension://abc"]
)
def test_origins_of_browsers_are_taken(origin):
    assert Binding("127.0.0.1", 0, cors_origins=(origin,)).cors_origins == (origin,)


CONVERSATION = [
    ("First.", True), ("word " * 3000, False), (b"bad \xff\xfe bytes", False), ("Second.", True),
    (b"/system \xff", False), ("/retry", True), (b"\xc3", False), ("Third.", True),
]  # fmt: skip


def test_a_terminal_chat_survives_what_it_refuses():
    """Bad bytes and a message that is too long are refused, and what follows is answered."""
    lines = [line if isinstance(line, bytes) else line.encode() for line, _ in CONVERSATION]
    ran = command(
        "chat", str(TINY), "--max-new-tokens", "4", "--temperature", "0",
        input=b"\n".join(lines) + b"\n",
    )  # fmt: skip
    said = ran.stderr
    assert (ran.exit_code, ran.exception) == (0, None), said
    answered = [int(n) for n in re.findall(r"· (\d+) tokens ·", said)]
    assert [n > 0 for n in answered] == [ok for _, ok in CONVERSATION if ok]
    assert said.count("not valid Unicode") == 3
    assert said.count("the conversation is as it was before") == 3
    first, *_, third = [int(n) for n in re.findall(r"(\d+) prompt tokens", said) if int(n)]
    assert first < third < 200


def test_a_system_prompt_that_is_no_text_is_misuse():
    result = command("chat", str(TINY), "--system", "\udcff")
    assert isinstance(result.exception, UsageError)
    assert "--system is not valid Unicode" in str(result.exception)
