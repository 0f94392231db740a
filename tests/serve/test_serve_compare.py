"""Two answers side by side: where they differ first, how far each model agrees with the other's
answer, and that nothing a model says becomes HTML; and what the top of the page says."""

from __future__ import annotations

import re

import pytest

from llmquant_serve.chat.compare import agreement, divergence, marked, verdict
from llmquant_serve.chat.facts import facts_of, measured
from llmquant_serve.chat.replies import Reply
from llmquant_serve.engines.base import Token
from llmquant_serve.generation.pieces import Piece


def token(i, logprob=-0.5, best=None):
    return Token(i, logprob, ((i if best is None else best, logprob), (9, -1.5)))


def said(*ids, text="x", speed=1.0):
    pieces = tuple(Piece(text, (token(i),), (0,)) for i in ids)
    return Reply(text * len(ids), pieces, (1, 2), len(ids), len(ids) / speed, True)


@pytest.mark.parametrize(
    ("left", "right", "at"),
    [
        pytest.param(said(7, 8), said(7, 8), None, id="equal"),
        pytest.param(said(7, 8), said(7), None, id="one begins the other"),
        pytest.param(said(7, 8, 9), said(7, 10, 9), 1, id="in the middle"),
        pytest.param(said(7), said(8), 0, id="at once"),
        pytest.param(said(), said(8), None, id="nothing yet"),
    ],
)
def test_where_they_part(left, right, at):
    assert divergence(left.ids, right.ids) == divergence(right.ids, left.ids) == at


def test_marks(tokenizer):
    own, other = said(300, 301, 302, 303), said(300, 305, 302, 306)
    page = marked(tokenizer, own, other)
    assert re.findall(r'class="(\w*)"', page) == ["ab", "", "first", "", ""]
    assert "0.607" in page
    assert "0.223" in page
    scored = [token(300), token(301, best=7), token(302, -3.0, best=8), token(303)]
    page = marked(tokenizer, own, other, scored)
    assert re.findall(r'class="(\w*)"', page) == ["ab", "", "first", "differs", ""]
    assert "the other model: 0.050" in page


def test_agreement():
    found = agreement(
        [token(1), token(2), token(3, -1.0)],
        [token(1, -1.0), token(2, -1.5, best=4), token(3, -1.0)],
    )
    assert (found.same, found.tokens) == (2, 3)
    assert found.nats == pytest.approx((0.5 + 1.0 + 0.0) / 3)


@pytest.mark.parametrize(
    ("ours", "original", "sentence"),
    [
        pytest.param(
            said(300, 301), said(300, 302), "The first difference is at token 2", id="differ"
        ),
        pytest.param(said(300, 301), said(300, 301), "All 2 tokens are the same.", id="equal"),
        pytest.param(said(300), said(300, 301), "The same for 1 tokens", id="one ends"),
    ],
)
def test_verdict(tokenizer, ours, original, sentence):
    page = verdict(tokenizer, ours, original, None)
    assert sentence in page
    assert page.count('class="tile"') == 1
    found = agreement(original.ids, [token(t.id, -1.0) for t in original.ids])
    page = verdict(tokenizer, ours, original, found)
    assert "100%" in page
    assert "−0.500" in page


def test_speed_is_ours_by_the_originals(tokenizer):
    page = verdict(tokenizer, said(300, 301, speed=30.0), said(300, 301, speed=20.0), None)
    assert "1.50×" in page
    assert "30.0 against 20.0 tokens/s" in page


def test_nothing_becomes_html(tokenizer):
    page = marked(tokenizer, said(300, text='<script>alert("1")</script>'), said())
    assert "<script" not in page
    assert "&lt;script&gt;" in page


CARDS = [
    pytest.param("| model | ratio | KL nats | top-1 % |\n|---|---|---|---|\n| a \\| b | 1 | 0 | – |\n| c | 1.2 ±0.1 | 0.3 ±0.1 | 81.5 |",
                 "perplexity ×1.2, KL 0.3, same top token 81.5 %", id="all"),
    pytest.param("| model | perplexity |\n|---|---|\n| c | 12.3 |", None, id="no reference"),
    pytest.param("| model | ratio |\n|---|---|\n| c | – |", None, id="a dash"),
    pytest.param("Nothing was measured yet.", None, id="nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("table", "loss"), CARDS)
def test_the_loss_is_that_of_the_card(tmp_path, table, loss):
    """Of a folder that holds nothing but a card, the card is what is known."""
    text = f"# x\n<!-- llmquant:measured:start -->\n{table}\n<!-- llmquant:measured:end -->\n"
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    facts = facts_of(Named("<x>", "bfloat16 on cpu; because"), tmp_path)
    assert facts.rows == ({"loss": loss} if loss else {}) | {"runs in": "bfloat16 on cpu"}
    assert measured(tmp_path) == (table if table.startswith("|") else None)
    assert "<x>" not in facts.html


class Named:
    """What facts are taken from of a service."""

    def __init__(self, model, computing):
        self.model, self.computing = model, computing


def test_without_the_original_the_size_is_held_against_16_bits(packed, tmp_path):
    facts = facts_of(Named("tiny", "x"), packed)
    assert facts.rows["weights"] == "W4 g128 sym, RTN"
    assert facts.rows["size"].endswith("of 11.5 MB at 16 bits")
