"""Two replies side by side: where they part, and that nothing a model says becomes HTML."""

from __future__ import annotations

import re

import pytest

from llmquant_serve.chat.compare import divergence, marked
from llmquant_serve.engines.base import Token
from llmquant_serve.generation.pieces import Piece


def said(*ids, text="x"):
    return [Piece(text, (Token(i, -0.5, ((i, -0.5), (9, -1.5))),), (0,)) for i in ids]


@pytest.mark.parametrize(
    ("left", "right", "at"),
    [
        pytest.param(said(7, 8), said(7, 8), None, id="equal"),
        pytest.param(said(7, 8), said(7), None, id="one begins the other"),
        pytest.param(said(7, 8, 9), said(7, 10, 9), 1, id="in the middle"),
        pytest.param(said(7), said(8), 0, id="at once"),
        pytest.param([], said(8), None, id="nothing yet"),
    ],
)
def test_where_they_part(left, right, at):
    assert divergence(left, right) == divergence(right, left) == at


def test_marks(tokenizer):
    page = marked(tokenizer, said(300, 301, 302, 303), said(300, 305, 302, 306))
    assert re.findall(r'class="(\w*)"', page) == ["ab", "", "first", "", "differs"]
    assert "0.607" in page
    assert "0.223" in page


def test_nothing_becomes_html(tokenizer):
    page = marked(tokenizer, said(300, text='<script>alert("1")</script>'), [])
    assert "<script" not in page
    assert "&lt;script&gt;" in page
