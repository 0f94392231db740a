"""Every message that docs/troubleshooting.md quotes is one that the sources can write.

A heading of the page is a message in backticks, with ``…`` where a name or a number stands. The
sources are parsed: a string constant, or an f-string with a gap for each of its expressions, joined
where literals stand side by side or are added. A message is found if the words between its ``…``
occur, in order, in one such string; the first words at its start, unless the message begins with
``…``. So a reworded error fails here until the page says the same.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
PACKAGES = ("llmquant", "eval/llmquant_eval", "serve/llmquant_serve")
GAP = "\0"


def words(text: str) -> str:
    """White space made single."""
    return re.sub(r"\s+", " ", text)


def string(node: ast.AST) -> str | None:
    """The text of an expression made of string literals, a gap for each part that is none."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(string(value) or GAP for value in values)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            parts = string(left), string(right)
            return None if parts == (None, None) else "".join(part or GAP for part in parts)
    return None


def strings(source: str) -> Iterator[str]:
    """Every whole string of a module but its docstrings."""
    left: list[ast.AST] = [ast.parse(source)]
    while left:
        node = left.pop()
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        text = string(node)
        if text is None:
            left.extend(ast.iter_child_nodes(node))
        else:
            yield words(text)


def quoted(page: str) -> list[str]:
    """The messages that a page has as headings."""
    return re.findall(r"^### `(.+)`$", page, re.MULTILINE)


def is_written_by(message: str, text: str) -> bool:
    """Whether ``text`` has the fixed words of ``message`` in their order."""
    first, *others = (words(part) for part in message.split("…"))
    if not text.startswith(first):
        return False
    place = len(first)
    for part in others:
        found = text.find(part, place)
        if found < 0:
            return False
        place = found + len(part)
    return True


FILES = [
    ROOT / "hatch_build.py",
    *(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))),
]
SOURCES = [text for path in FILES for text in strings(path.read_text(encoding="utf-8"))]
MESSAGES = quoted(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_in_the_sources(message):
    assert any(is_written_by(message, text) for text in SOURCES)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_has_enough_words_to_be_found_by(message):
    assert len(re.findall(r"[A-Za-z]{2,}", message)) >= 3


def test_the_page_has_the_usual_messages_once_each():
    assert 25 <= len(MESSAGES) == len(set(MESSAGES))


def test_every_message_is_followed_by_what_it_means_and_what_to_do():
    sections = re.split(r"^### ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    for section in sections:
        _, _, told = section.partition("\n")
        assert len(told.split()) >= 12, section


SOURCE = '''
def refuse(name, rows, why):
    """A docstring that says: nothing may be written."""
    raise ValueError(
        f"{name} has {len(rows)} rows, too few " "for this; " + why + " (give more)"
    )
'''


@pytest.mark.parametrize(
    ("message", "found"),
    [
        pytest.param("… has … rows, too few for this; … (give more)", True, id="the whole of it"),
        pytest.param("… rows, too few for this", True, id="a part of it"),
        pytest.param("… has … rows, too many for this", False, id="another word"),
        pytest.param("has … rows, too few", False, id="not its start"),
        pytest.param("… rows, too few for this; … has …", False, id="another order"),
        pytest.param("nothing may be written", False, id="a docstring"),
        pytest.param("… has 3 rows, too few for this", False, id="a number where a gap is"),
    ],
)
def test_the_search_finds_what_is_there_and_nothing_else(message, found):
    assert any(is_written_by(message, text) for text in strings(SOURCE)) is found
