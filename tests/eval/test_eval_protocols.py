"""Windows, literally; and the guards around the text."""

from __future__ import annotations

import pytest
import torch

from llmquant.errors import SourceError, UsageError
from llmquant_eval.protocols import GptqProtocol, Window, default_window, parse_protocol
from llmquant_eval.text import check_same_tokens, encode, load_tokenizer, select_windows, tokenizer_sha256


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
    assert GptqProtocol(window).windows(tokens) == [Window(*w) for w in expected]


def test_wikitext_with_the_llama2_tokenizer_has_166_windows() -> None:
    windows = GptqProtocol(2048).windows(341_469)
    assert len(windows) == 166
    assert windows[-1] == Window(337_920, 339_968, 337_921)


def test_ids_carry_the_window() -> None:
    protocol = parse_protocol("ppl/gptq-512")
    assert (protocol.window, protocol.perplexity_id, protocol.divergence_id) == (512, "ppl/gptq-512", "kl/top-512")


@pytest.mark.parametrize("text", ["ppl/gptq", "ppl/gptq-0", "ppl/strided-512", "gptq-512", "ppl/gptq-512 ", ""])
def test_unknown_protocols_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="ppl/gptq-N"):
        parse_protocol(text)


@pytest.mark.parametrize(("positions", "window"), [(None, 2048), (256, 256), (2048, 2048), (131072, 2048)])
def test_default_window(positions: int | None, window: int) -> None:
    assert default_window(positions) == window


def test_a_window_of_one_predicts_nothing() -> None:
    with pytest.raises(UsageError, match="nothing to predict"):
        GptqProtocol(1)


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


def test_text_shorter_than_a_window_names_what_fits() -> None:
    with pytest.raises(SourceError, match=r"file:x has 99 tokens.*--window 99 or less"):
        select_windows(GptqProtocol(100), 99, None, "file:x")


@pytest.mark.parametrize(("limit", "count"), [(None, 5), (2, 2), (9, 5)], ids=["all", "fewer", "more than there are"])
def test_window_limit(limit: int | None, count: int) -> None:
    assert select_windows(GptqProtocol(20), 119, limit, "file:x") == GptqProtocol(20).windows(119)[:count]


def test_a_window_limit_of_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="--max-windows 0"):
        select_windows(GptqProtocol(20), 100, 0, "file:x")


@pytest.mark.parametrize(
    ("got", "position"), [([1, 2, 9], 2), ([1, 2], 2), ([1, 2, 3, 4], 3)], ids=["another id", "shorter", "longer"]
)
def test_other_tokens_are_refused_with_their_place(got: list[int], position: int) -> None:
    with pytest.raises(UsageError, match=rf"B does not tokenize the text as A.*at position {position}"):
        check_same_tokens(torch.tensor([1, 2, 3]), torch.tensor(got), "A", "B")


def test_the_tokenizer_hash_is_the_vocabulary_s(base_model, tiny_llama) -> None:
    one, other = load_tokenizer(base_model), load_tokenizer(tiny_llama)
    assert tokenizer_sha256(one) == tokenizer_sha256(load_tokenizer(base_model))
    assert tokenizer_sha256(one) != tokenizer_sha256(other)
    one.add_tokens(["<new>"])
    assert tokenizer_sha256(one) != tokenizer_sha256(load_tokenizer(base_model))
