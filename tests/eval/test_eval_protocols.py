"""Windows, literally; and the guards around the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmquant import Documents, load_tokenizer
from llmquant.errors import CheckpointError, SourceError, UsageError
from llmquant_eval.scoring.protocols import (
    GptqProtocol,
    RollingProtocol,
    StridedProtocol,
    TokenWindow,
    WindowProtocol,
    default_window,
    has_window,
    parse_protocol,
)
from llmquant_eval.scoring.token_stream import TokenStream, make_stream, prefix_token
from llmquant_eval.texts.tokens import check_same_tokens, encode, tokenizer_sha256


@pytest.mark.parametrize(
    ("window", "tokens", "expected"),
    [
        pytest.param(4, 12, [(0, 4, 1), (4, 8, 5), (8, 12, 9)], id="exact multiple"),
        pytest.param(4, 11, [(0, 4, 1), (4, 8, 5)], id="tail of window-1 dropped"),
        pytest.param(4, 9, [(0, 4, 1), (4, 8, 5)], id="tail of 1 dropped"),
        pytest.param(4, 4, [(0, 4, 1)], id="one window"),
        pytest.param(4, 3, [], id="shorter than a window"),
        pytest.param(4, 0, [], id="empty"),
        pytest.param(2, 5, [(0, 2, 1), (2, 4, 3)], id="smallest window"),
    ],
)
def test_gptq_windows(window: int, tokens: int, expected: list[tuple[int, int, int]]) -> None:
    assert GptqProtocol(window).windows(tokens) == [TokenWindow(*w) for w in expected]


def test_wikitext_with_the_llama2_tokenizer_has_166_windows() -> None:
    windows = GptqProtocol(2048).windows(341_469)
    assert len(windows) == 166
    assert windows[-1] == TokenWindow(337_920, 339_968, 337_921)


@pytest.mark.parametrize(
    ("window", "stride", "tokens", "expected"),
    [
        pytest.param(4, 2, 8, [(0, 4, 1), (2, 6, 4), (4, 8, 6)], id="exact multiple"),
        pytest.param(4, 2, 9, [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 9, 8)], id="tail of one"),
        pytest.param(4, 3, 8, [(0, 4, 1), (3, 7, 4), (6, 8, 7)], id="stride of three"),
        pytest.param(4, 1, 6, [(0, 4, 1), (1, 5, 4), (2, 6, 5)], id="one token at a time"),
        pytest.param(4, 2, 3, [(0, 3, 1)], id="shorter than a window"),
        pytest.param(4, 2, 1, [], id="nothing to predict"),
        pytest.param(4, 2, 0, [], id="empty"),
    ],
)
def test_strided_windows(
    window: int, stride: int, tokens: int, expected: list[tuple[int, int, int]]
) -> None:
    assert StridedProtocol(window, stride).windows(tokens) == [TokenWindow(*w) for w in expected]


@pytest.mark.parametrize(
    ("window", "tokens", "expected"),
    [
        # Positions count the prefix at 0: document token i stands at i + 1.
        pytest.param(4, 8, [(0, 5, 1), (4, 9, 5)], id="exact multiple"),
        pytest.param(
            4, 9, [(0, 5, 1), (4, 9, 5), (5, 10, 9)], id="tail of one, filled up with context"
        ),
        pytest.param(4, 7, [(0, 5, 1), (3, 8, 5)], id="tail of three"),
        pytest.param(4, 3, [(0, 4, 1)], id="short document"),
        pytest.param(4, 1, [(0, 2, 1)], id="one token after its prefix"),
        pytest.param(4, 0, [], id="empty"),
    ],
)
def test_word_windows(window: int, tokens: int, expected: list[tuple[int, int, int]]) -> None:
    assert RollingProtocol("word", window).windows(tokens) == [TokenWindow(*w) for w in expected]


@pytest.mark.parametrize(
    ("protocol", "first"),
    [(StridedProtocol(16, 5), 1), (StridedProtocol(16, 15), 1), (RollingProtocol("word", 16), 1)],
    ids=["strided", "longest stride", "word"],
)
@pytest.mark.parametrize("tokens", [15, 16, 17, 160, 161, 997])
def test_each_token_is_scored_once(protocol: WindowProtocol, first: int, tokens: int) -> None:
    windows = protocol.windows(tokens)
    scored = [i for w in windows for i in range(w.scored, w.end)]
    assert scored == list(
        range(first, tokens + (1 if isinstance(protocol, RollingProtocol) else 0))
    )
    assert all(0 <= w.begin < w.scored and w.fed <= 16 for w in windows)


def test_strided_windows_are_those_of_the_hugging_face_page() -> None:
    """The loop of transformers' "Perplexity of fixed-length models", written as it stands there."""
    seq_len, max_length, stride = 1037, 128, 48
    expected, prev_end_loc = [], 0
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        labels = list(range(begin_loc, end_loc))
        labels[:-trg_len] = [-100] * (end_loc - begin_loc - trg_len)
        expected.append(
            (begin_loc, end_loc, [t for t in labels[1:] if t != -100])
        )  # the loss shifts the first away
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    windows = StridedProtocol(max_length, stride).windows(seq_len)
    assert [(w.begin, w.end, list(range(w.scored, w.end))) for w in windows] == expected


@pytest.mark.parametrize(
    ("text", "perplexity", "divergence"),
    [
        ("ppl/gptq-512", "ppl/gptq-512", "kl/top-512"),
        ("ppl/gptq", "ppl/gptq-300", "kl/top-300"),
        ("ppl/strided-512-128", "ppl/strided-512-128", "kl/top-strided-512-128"),
        ("ppl/strided-512", "ppl/strided-512-256", "kl/top-strided-512-256"),
        ("ppl/strided", "ppl/strided-300-150", "kl/top-strided-300-150"),
        ("ppl/word-64", "ppl/word-64", "kl/top-word-64"),
        ("ppl/word", "ppl/word-300", "kl/top-word-300"),
        ("ppl/word-wikitext-64", "ppl/word-wikitext-64", "kl/top-word-wikitext-64"),
    ],
)
def test_ids_carry_the_window(text: str, perplexity: str, divergence: str) -> None:
    protocol = parse_protocol(text, window=300)
    assert (protocol.perplexity_id, protocol.divergence_id) == (perplexity, divergence)
    assert parse_protocol(perplexity, window=7) == protocol
    assert has_window(text) == (text[-1].isdigit())


@pytest.mark.parametrize(
    "text",
    [
        "ppl/gptq-0",
        "gptq-512",
        "ppl/gptq-512 ",
        "",
        "ppl/gptq-8-4",
        "ppl/word-8-4",
        "ppl/words",
        "kl/top-512",
    ],
)
def test_unknown_protocols_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="ppl/gptq-N"):
        parse_protocol(text, window=64)


@pytest.mark.parametrize("text", ["ppl/strided-8-8", "ppl/strided-8-9"])
def test_a_stride_that_skips_tokens_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="shorter than the window"):
        parse_protocol(text, window=64)


@pytest.mark.parametrize(
    ("positions", "window"), [(None, 2048), (256, 256), (2048, 2048), (131072, 2048)]
)
def test_default_window(positions: int | None, window: int) -> None:
    assert default_window(positions) == window


@pytest.mark.parametrize("text", ["ppl/gptq-1", "ppl/strided-1", "ppl/word-1"])
def test_a_window_of_one_predicts_nothing(text: str) -> None:
    with pytest.raises(UsageError, match="choose 2 or more"):
        parse_protocol(text, window=64)


def test_the_text_is_tokenized_once_with_one_bos(tiny_llama) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    ids = encode(tokenizer, "one\n\ntwo", "file:x")
    assert ids.dtype == torch.int64
    assert ids.tolist() == tokenizer("one\n\ntwo")["input_ids"]
    assert (ids == tokenizer.bos_token_id).nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("text", ["", " \n\n\t"], ids=["empty", "white space"])
def test_text_without_text(text: str, base_model) -> None:
    with pytest.raises(SourceError, match="file:x has no text"):
        encode(load_tokenizer(base_model), text, "file:x")


def stream(
    base_model, protocol: WindowProtocol, words: int, limit: int | None = None
) -> TokenStream:
    """The stream of one document of ``words`` words, each a token of the base model."""
    documents = Documents.of([" ".join(["w5"] * words)], "file:x")
    return make_stream(protocol, load_tokenizer(base_model), documents, "file:x", limit)


def test_text_shorter_than_a_window_names_what_fits(base_model) -> None:
    with pytest.raises(SourceError, match=r"file:x has 99 tokens.*--window 99 or less"):
        stream(base_model, GptqProtocol(100), 99)


@pytest.mark.parametrize(
    ("limit", "count"), [(None, 5), (2, 2), (9, 5)], ids=["all", "fewer", "more than there are"]
)
def test_window_limit(limit: int | None, count: int, base_model) -> None:
    found = stream(base_model, GptqProtocol(20), 119, limit)
    assert list(found.windows) == list(GptqProtocol(20).windows(119))[:count]
    assert (found.available, found.words) == (5, None)


def test_a_window_limit_of_zero_is_refused(base_model) -> None:
    with pytest.raises(UsageError, match="--max-windows 0"):
        stream(base_model, GptqProtocol(20), 100, 0)


def test_documents_stand_alone_and_share_out_their_words(tiny_llama) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    rows = [
        "One two  three.",
        "",
        "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich " * 4,
    ]
    found = make_stream(RollingProtocol("word", 16), tokenizer, Documents.of(rows, "x"), "x", None)
    tokens = [tokenizer(row)["input_ids"] for row in rows]
    bos = tokenizer.bos_token_id
    assert found.ids.tolist() == [t for document in tokens for t in [bos, *document]]
    assert tokens[1] == [bos]  # this tokenizer adds its own
    assert found.words is not None
    assert found.bytes_ is not None
    assert found.words.sum() == pytest.approx(3 + 1 + 41, rel=1e-12)
    assert found.bytes_.sum() == pytest.approx(sum(len(r.encode()) for r in rows), rel=1e-12)
    assert len(found.words) == found.layout.tokens == sum(map(len, tokens))
    half = found.first(2)
    assert half.words is not None
    assert len(half.words) == half.layout.tokens < len(found.words)


def few_words() -> Any:
    """A tokenizer that drops what it does not know."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    known = Tokenizer(models.BPE(vocab={"w": 0, "</s>": 1}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=known, eos_token="</s>")


@pytest.mark.parametrize(
    "protocol", [RollingProtocol("word", 8), GptqProtocol(8)], ids=["word", "gptq"]
)
def test_a_text_of_no_tokens_is_refused(protocol: Any) -> None:
    with pytest.raises(SourceError, match=r"no token|has 0 tokens") as caught:
        make_stream(protocol, few_words(), Documents.of(["日本"], "file:x"), "file:x", None)
    assert "--window" not in str(caught.value)


def test_an_empty_row_still_counts_its_word(base_model) -> None:
    found = make_stream(
        RollingProtocol("word", 16),
        load_tokenizer(base_model),
        Documents.of(["w5 w6", ""], "x"),
        "x",
        None,
    )
    assert found.words is not None
    assert len(found.ids) == 3  # this tokenizer adds nothing, so the empty row has no tokens
    assert found.words.sum() == pytest.approx(2 + 1)


def test_a_document_that_begins_with_the_prefix_gets_no_second(tiny_llama) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    found = make_stream(
        RollingProtocol("word", 16),
        tokenizer,
        Documents.of([tokenizer.bos_token + "one"], "x"),
        "x",
        None,
    )
    assert (
        found.ids.tolist()
        == [tokenizer.bos_token_id] * 2 + tokenizer("one", add_special_tokens=False)["input_ids"]
    )


def test_a_tokenizer_without_a_prefix_is_refused() -> None:
    class Bare:
        bos_token_id = eos_token_id = None

    with pytest.raises(CheckpointError, match="neither a BOS nor an EOS"):
        prefix_token(Bare())


@pytest.mark.parametrize(
    ("got", "position"),
    [([1, 2, 9], 2), ([1, 2], 2), ([1, 2, 3, 4], 3)],
    ids=["another id", "shorter", "longer"],
)
def test_other_tokens_are_refused_with_their_place(got: list[int], position: int) -> None:
    with pytest.raises(
        UsageError, match=rf"B does not tokenize the text as A.*at position {position}"
    ):
        check_same_tokens(torch.tensor([1, 2, 3]), torch.tensor(got), "A", "B")


def test_the_tokenizer_hash_is_the_vocabulary_s(base_model, tiny_llama) -> None:
    one, other = load_tokenizer(base_model), load_tokenizer(tiny_llama)
    assert tokenizer_sha256(one) == tokenizer_sha256(load_tokenizer(base_model))
    assert tokenizer_sha256(one) != tokenizer_sha256(other)
    one.add_tokens(["<new>"])
    assert tokenizer_sha256(one) != tokenizer_sha256(load_tokenizer(base_model))


@pytest.mark.parametrize(("tokens", "windows"), [(1, 2), (32, 2), (33, 3), (48, 3), (10_000, 5)])
def test_as_many_windows_as_hold_so_many_tokens(base_model, tokens: int, windows: int) -> None:
    text = Documents.of([" ".join(f"w{i % 50}" for i in range(80))], "x")
    found = make_stream(GptqProtocol(16), load_tokenizer(base_model), text, "x", None)
    assert len(found.windows) == 5
    assert found.reaching(tokens) == windows
