"""The picture of a terminal shows the commands of the script that draws it, and loads nothing."""

from __future__ import annotations

import html
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PICTURE = (ROOT / "docs" / "terminal.svg").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("terminal_svg", ROOT / "scripts/terminal_svg.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_of(picture: str) -> str:
    """What is written in an SVG, white space made single."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", picture)).split())


def test_the_picture_shows_the_commands_of_the_script(script):
    shown = text_of(PICTURE)
    for command in script.COMMANDS:
        assert " ".join(command.split()) in shown


def test_colours_become_styles_and_nothing_is_lost(script):
    picture = script.drawn([("llmquant plan x", "\x1b[1mbold\x1b[0m and plain")])
    assert text_of(picture).endswith("$ llmquant plan x bold and plain")
    assert "font-weight: bold" in picture


@pytest.mark.parametrize("source", ["committed", "drawn now"])
def test_the_picture_loads_nothing(script, source):
    picture = PICTURE if source == "committed" else script.drawn([("llmquant", "words")])
    assert not re.search(r"@font-face|@import|\bhref=|url\((?!#)", picture)
