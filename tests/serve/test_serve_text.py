"""Ids to text in pieces: the pieces add up to the whole, characters are never torn, stop strings
are found across tokens."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import TINY

from llmquant_serve.engines.base import Sampling, Step, Token
from llmquant_serve.generation.detokenize import (
    Detokenizer,
    StopStrings,
    decode,
    token_bytes,
    token_text,
)
from llmquant_serve.generation.errors import TextError
from llmquant_serve.generation.pieces import write
from llmquant_serve.generation.text_model import TextModel

TEXTS = [
    "plain words, and more",
    "Grüße aus Köln",
    "日本語のテキスト",
    "🙂🙃 family 👨‍👩‍👧‍👦!",
    "naïve\n\n\tcafé — “quotes”",
    "a\u0301b",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_and_no_character_is_torn(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = Detokenizer(tokenizer)
    pieces = [stream.add(i) for i in ids]
    assert "".join(pieces) + stream.rest() == text
    assert not any("�" in piece for piece in pieces)


def test_bytes_that_are_no_text_come_out_as_the_whole_decodes(tokenizer):
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(6, 400) for _ in range(30)]
        stream = Detokenizer(tokenizer)
        text = "".join(stream.add(i) for i in ids) + stream.rest()
        assert text.replace("�", "") == decode(tokenizer, ids).replace("�", "")


def test_special_tokens_are_shown_only_when_wanted(tokenizer):
    ids = [*tokenizer.encode("yes", add_special_tokens=False), 4]
    hidden, shown = Detokenizer(tokenizer), Detokenizer(tokenizer, keep_special=True)
    assert "".join(map(hidden.add, ids)) == "yes"
    assert "".join(map(shown.add, ids)) == "yes" + token_text(tokenizer, 4)


@pytest.mark.parametrize("text", TEXTS)
def test_hidden_tokens_are_no_part_of_a_character(tokenizer, text):
    """As where a client ignores the end tokens."""
    ids = [4] * 9 + tokenizer.encode(text, add_special_tokens=False)
    stream = Detokenizer(tokenizer, tokenizer.encode("Hi", add_special_tokens=False))
    assert "".join(map(stream.add, ids)) + stream.rest() == text


def test_bytes_of_every_token_spell_the_text(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert bytes(b for i in ids for b in token_bytes(tokenizer, i)).decode() == text


def cut(text, stops):
    """The slow twin: the text before the first stop string; the earliest in the text, and of those
    the one that sorts first."""
    hits = [(text.index(s), s) for s in stops if s in text]
    return (text[: min(hits)[0]], min(hits)[1]) if hits else (text, None)


@settings(deadline=None, max_examples=200)
@given(
    pieces=st.lists(st.text(alphabet="ab\n", max_size=4), max_size=10),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_in_pieces(pieces, stops):
    """Text given out before the stop is a beginning of what the slow twin gives; where no two stops
    overlap it is equal to it."""
    stream, emitted = StopStrings(stops), ""
    for piece in pieces:
        emitted += stream.add(piece)
        if stream.matched is not None:
            break
    else:
        emitted += stream.rest()
    text = "".join(pieces)
    expected, hit = cut(text, stops)
    assert (stream.matched is None) == (hit is None)
    assert not any(s in emitted for s in stops)
    assert text.startswith(emitted)
    if len(stops) == 1:
        assert (emitted, stream.matched) == (expected, hit)


class Scripted:
    """An engine that yields the steps it was given."""

    def __init__(self, steps):
        self.steps, self.closed = steps, False

    async def generate(self, prompt, sampling):
        try:
            for step in self.steps:
                yield step
        finally:
            self.closed = True


def written(tokenizer, text, stops, per_step=1, min_tokens=0):
    ids = tokenizer.encode(text, add_special_tokens=False)
    groups = [ids[i : i + per_step] for i in range(0, len(ids), per_step)]
    steps = [Step(tuple(map(Token, g)), "length" if g is groups[-1] else None) for g in groups]
    engine = Scripted(steps)

    async def main():
        sampling = Sampling(min_tokens=min_tokens)
        return [piece async for piece in write(engine, tokenizer, [0], sampling, stops)]

    return asyncio.run(main()), engine, ids


@pytest.mark.parametrize("per_step", [1, 3], ids=["token by token", "three at a time"])
@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        pytest.param([], "one two three, four", id="none"),
        pytest.param(["two"], "one ", id="a word"),
        pytest.param(["o three"], "one tw", id="across tokens"),
        pytest.param(["zzz", "four"], "one two three, ", id="at the end"),
        pytest.param(["fourteen"], "one two three, four", id="begun, not finished"),
        pytest.param(["one"], "", id="at the beginning"),
    ],
)
def test_writing_ends_at_stop_strings(tokenizer, stops, expected, per_step):
    pieces, engine, ids = written(tokenizer, "one two three, four", stops, per_step)
    assert "".join(p.text for p in pieces) == expected
    stopped = any(s in "one two three, four" for s in stops)
    assert pieces[-1].finish == ("stop" if stopped else "length")
    assert (pieces[-1].stop in stops) == stopped
    assert [p.finish for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    made = [t.id for p in pieces for t in p.tokens]
    assert made == ids[: len(made)]
    assert pieces[-1].generated == len(made)
    assert engine.closed


@pytest.mark.parametrize("per_step", [1, 3], ids=["token by token", "three at a time"])
@pytest.mark.parametrize("stops", [["o"], ["two"], ["o ", "zz"], ["xone", "one"], [" three, five"]])
def test_a_stop_string_within_min_tokens_is_text(tokenizer, stops, per_step):
    """The slow twin: a stop string counts if its end came after so many tokens."""
    whole = "one two three, one two three"
    ids = tokenizer.encode(whole, add_special_tokens=False)
    for least in range(len(ids) + 1):
        pieces, _, _ = written(tokenizer, whole, stops, per_step, min_tokens=least)
        before = len(tokenizer.decode(ids[:least]))
        hits = [at for s in stops for at in range(len(whole))
                if whole.startswith(s, at) and at + len(s) > before]  # fmt: skip
        assert "".join(p.text for p in pieces) == whole[: min(hits, default=len(whole))]
        assert pieces[-1].finish == ("stop" if hits else "length")
        assert pieces[-1].generated >= min(least, len(ids))


@pytest.fixture(scope="module")
def text_model():
    return TextModel(TINY, 4096)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        pytest.param([], "no tokens", id="none"),
        pytest.param([3, 4096], "token id 4096", id="too large"),
        pytest.param([3, -1], "token id -1", id="negative"),
    ],
)
def test_ids_that_the_model_does_not_have(text_model, ids, message):
    with pytest.raises(TextError, match=message) as caught:
        text_model.checked(ids, "prompt")
    assert caught.value.parameter == "prompt"


def test_a_conversation_that_is_not_unicode_names_its_turn(text_model):
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "\ud800"}]
    with pytest.raises(TextError, match="not valid Unicode") as caught:
        asyncio.run(text_model.encode_chat(turns))
    assert caught.value.parameter == "messages.1.content"


def test_a_text_longer_than_the_context_is_refused_without_a_warning_of_transformers(text_model):
    """transformers says once per tokenizer that such a text "will result in indexing errors"."""
    long = "river " * (text_model.tokenizer.model_max_length + 1)
    ids = asyncio.run(text_model.encode(long, "prompt"))
    assert len(ids) > text_model.tokenizer.model_max_length
    assert not any(text_model.tokenizer.deprecation_warnings.values())
