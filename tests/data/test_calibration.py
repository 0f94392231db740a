"""Calibration windows against slow twins: which tokens, how many, and what was left out."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from llmquant.data.calibration import MIN_TOKENS, Calibration, calibrate
from llmquant.data.chats import Chat, Message
from llmquant.data.overlap import SHINGLE, shingles
from llmquant.data.sources import Documents, read_documents
from llmquant.data.tokenize import encode_text
from llmquant.errors import SourceError, UsageError

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
WIKITEXT_ROWS = Path(__file__).parents[1] / "data" / "wikitext2_test_rows_0_200.json"
BOS = 0  # <|begin_of_text|> of tiny-llama
WORDS = (
    "the",
    "river",
    "ran",
    "over",
    "old",
    "stones",
    "while",
    "seven",
    "small",
    "boats",
    "wait",
    "for",
    "a",
    "wind",
)
CHATS = tuple(
    Chat(
        (
            Message("user", f"What is {i} and {i}?"),
            Message("assistant", f"It is {2 * i}, I believe."),
        )
    )
    for i in range(12)
)


def sentence(seed: int, words: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, words))


TEXTS = tuple(sentence(i, 9 + 7 * i) for i in range(16))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny-llama")


def documents(*rows: Any, dropped: dict[str, int] | None = None) -> Documents:
    return Documents.of(rows, "memory", dropped)


def token_lists(rows: Any, tokenizer: Any) -> list[list[int]]:
    """The twin: one row at a time, the way transformers does it by itself."""
    return [
        tokenizer(row, verbose=False)["input_ids"]
        if isinstance(row, str)
        else tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in row.messages], tokenize=True
        )["input_ids"]
        for row in rows
    ]


# ---------------------------------------------------------------- concat


def test_concat_draws_different_windows_of_the_grid(tokenizer: Any) -> None:
    stream = list(chain.from_iterable(token_lists(TEXTS, tokenizer)))
    grid = [stream[i : i + 32] for i in range(0, len(stream) - 31, 32)]
    calibration = calibrate(documents(*TEXTS), tokenizer, nsamples=len(grid), seqlen=32, seed=3)
    drawn = [window.tolist() for window in calibration.windows]
    assert sorted(drawn) == sorted(grid)
    assert drawn != grid  # in an order of the seed's
    assert all(
        window.dtype == torch.int64 and window.shape == (32,) for window in calibration.windows
    )
    assert (calibration.summary.windows_available, calibration.summary.tokens_total) == (
        len(grid),
        len(stream),
    )
    fewer = calibrate(documents(*TEXTS), tokenizer, nsamples=4, seqlen=32, seed=3)
    assert [window.tolist() for window in fewer.windows] == drawn[:4]


@pytest.mark.parametrize("seed", range(4))
def test_concat_counts_rows_and_cut_tokens(tokenizer: Any, seed: int) -> None:
    """Twin: mark every token that lies in a drawn window, then count row by row."""
    calibration = calibrate(documents(*TEXTS), tokenizer, nsamples=5, seqlen=48, seed=seed)
    owner = [i for i, ids in enumerate(token_lists(TEXTS, tokenizer)) for _ in ids]
    keys = np.random.PCG64(seed).random_raw(len(owner) // 48)
    drawn = sorted(range(len(keys)), key=lambda i: int(keys[i]))[:5]
    inside = [any(start * 48 <= t < (start + 1) * 48 for start in drawn) for t in range(len(owner))]
    used = {row for row, hit in zip(owner, inside, strict=True) if hit}
    outside = [row for row, hit in zip(owner, inside, strict=True) if not hit and row in used]
    s = calibration.summary
    assert (s.rows_used, s.rows_truncated, s.tokens_truncated) == (
        len(used),
        len(set(outside)),
        len(outside),
    )
    assert (s.tokens_used, s.rows_not_drawn) == (5 * 48, len(TEXTS) - len(used))


def test_concat_of_one_long_document_has_one_bos(tokenizer: Any) -> None:
    text = sentence(0, 3000)
    windows = len(encode_text(text, tokenizer)) // 256
    calibration = calibrate(documents(text), tokenizer, nsamples=windows, seqlen=256, seed=0)
    assert sum(int((window == BOS).sum()) for window in calibration.windows) == 1
    assert calibration.summary.rows_used == 1


# ---------------------------------------------------------------- sample


def test_sample_is_one_row_a_window_cut_and_never_padded(tokenizer: Any) -> None:
    rows = ("short", *TEXTS, "", TEXTS[4])
    calibration = calibrate(
        documents(*rows), tokenizer, nsamples=17, seqlen=40, seed=1, packing="sample"
    )
    expected = [ids for ids in token_lists(rows, tokenizer) if len(ids) >= MIN_TOKENS]
    assert sorted(w.tolist() for w in calibration.windows) == sorted(ids[:40] for ids in expected)
    s = calibration.summary
    long = [len(ids) - 40 for ids in expected if len(ids) > 40]
    assert (s.rows_truncated, s.tokens_truncated) == (len(long), sum(long))
    assert s.dropped == {"empty": 1, f"shorter than {MIN_TOKENS} tokens": 1}
    assert s.duplicates == 1
    assert len({len(w) for w in calibration.windows}) > 1


# ---------------------------------------------------------------- both packings


@pytest.mark.parametrize("packing", ["concat", "sample"])
@pytest.mark.parametrize("rows", [pytest.param(TEXTS, id="texts"), pytest.param(CHATS, id="chats")])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_row_is_accounted_for(tokenizer: Any, packing: Any, rows: Any, seed: int) -> None:
    given = documents(*rows, "", "a", dropped={"null": 3})
    s = calibrate(given, tokenizer, nsamples=3, seqlen=32, seed=seed, packing=packing).summary
    assert s.rows_read == s.rows_used + s.rows_not_drawn + sum(s.dropped.values()) == len(rows) + 5
    assert s.dropped["null"] == 3
    assert s.windows == 3


def same(one: Calibration, other: Calibration) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.windows, other.windows, strict=True))


@pytest.mark.parametrize("packing", ["concat", "sample"])
def test_same_seed_same_windows(tokenizer: Any, packing: Any) -> None:
    def run(seed: int) -> Calibration:
        return calibrate(
            documents(*TEXTS), tokenizer, nsamples=4, seqlen=32, seed=seed, packing=packing
        )

    assert same(run(7), run(7))
    assert run(7).sha256 == run(7).sha256
    assert run(7).sha256 != run(8).sha256


def test_golden_sha256(tokenizer: Any) -> None:
    """Literal: the windows of a seed are the same on every machine and with every version."""
    calibration = calibrate(
        documents("One two three four five six seven eight nine ten. " * 9),
        tokenizer,
        nsamples=3,
        seqlen=16,
        seed=5,
    )
    written = b"".join(np.array([16, *w.tolist()], "<i8").tobytes() for w in calibration.windows)
    assert hashlib.sha256(written).hexdigest() == calibration.sha256
    assert calibration.sha256 == "ea4cc7e1d56dc5e8a92506a77ef24aa7c299a78dcfe1535292081ade6ed65c47"


def test_the_whole_origin_is_recorded(tokenizer: Any) -> None:
    given = documents(*TEXTS)
    c = calibrate(given, tokenizer, nsamples=2, seqlen=16, seed=9, packing="sample")
    assert (c.source, c.source_sha256, c.seed, c.seqlen, c.packing) == (
        "memory",
        given.sha256,
        9,
        16,
        "sample",
    )


# ---------------------------------------------------------------- BOS and chats


@pytest.mark.parametrize("rows", [pytest.param(TEXTS, id="texts"), pytest.param(CHATS, id="chats")])
def test_one_bos_a_row(tokenizer: Any, rows: Any) -> None:
    calibration = calibrate(
        documents(*rows), tokenizer, nsamples=len(rows) - 1, seqlen=4096, seed=0, packing="sample"
    )
    for window in calibration.windows:
        assert (window == BOS).nonzero().flatten().tolist() == [0]


def test_chats_are_what_the_template_gives(tokenizer: Any) -> None:
    calibration = calibrate(
        documents(*CHATS), tokenizer, nsamples=12, seqlen=512, seed=0, packing="sample"
    )
    assert sorted(w.tolist() for w in calibration.windows) == sorted(token_lists(CHATS, tokenizer))


def test_texts_and_chats_may_be_mixed_and_keep_their_order(tokenizer: Any) -> None:
    rows = [TEXTS[3], CHATS[0], TEXTS[4], CHATS[1]]
    stream = list(chain.from_iterable(token_lists(rows, tokenizer)))
    calibration = calibrate(documents(*rows), tokenizer, nsamples=1, seqlen=len(stream), seed=0)
    assert calibration.windows[0].tolist() == stream


def test_rows_the_template_refuses_are_counted(tokenizer: Any) -> None:
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{{ bos_token }}{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    rows = [*CHATS, Chat((Message("system", "Be kind."),))]
    s = calibrate(documents(*rows), strict, nsamples=4, seqlen=64, seed=0, packing="sample").summary
    assert s.dropped == {"refused by the chat template: user first": 1}


@pytest.mark.parametrize("packing", ["concat", "sample"])
def test_long_texts_bring_no_warning(packing: Any, caplog: pytest.LogCaptureFixture) -> None:
    fresh = AutoTokenizer.from_pretrained(
        ROOT / "examples" / "tiny-llama"
    )  # a tokenizer warns only once
    logging.getLogger("transformers").propagate = True
    try:
        text = sentence(1, 4000)
        assert len(encode_text(text, fresh)) > fresh.model_max_length
        calibrate(documents(text), fresh, nsamples=1, seqlen=2500, seed=0, packing=packing)
        assert caplog.records == []
        fresh(text)
        assert "longer than the specified maximum" in caplog.text  # it was there to be heard
    finally:
        logging.getLogger("transformers").propagate = False


# ---------------------------------------------------------------- errors

ENOUGH = {"nsamples": 2, "seqlen": 16, "seed": 0}


@pytest.mark.parametrize(
    ("rows", "change", "error", "message"),
    [
        pytest.param(
            TEXTS,
            {"nsamples": 0},
            UsageError,
            "nsamples=0, seqlen=16, seed=0 are not possible",
            id="no samples",
        ),
        pytest.param(
            TEXTS, {"seqlen": 7}, UsageError, "seqlen=7.*give at least 1, 8 and 0", id="no length"
        ),
        pytest.param(TEXTS, {"seed": -1}, UsageError, "seed=-1", id="negative seed"),
        pytest.param(
            TEXTS,
            {"packing": "pad"},
            UsageError,
            "packing='pad' is unknown; choose concat or sample",
            id="packing",
        ),
        pytest.param(
            TEXTS,
            {"max_positions": 15},
            UsageError,
            "more than the model's 15 positions; give 15",
            id="positions",
        ),
        pytest.param(
            TEXTS,
            {"vocab_size": 300},
            SourceError,
            "token id .* has 300 rows; .*another model",
            id="vocabulary",
        ),
        pytest.param(
            ["", " "],
            {},
            SourceError,
            r"memory: none of its 2 rows can be used \(2 empty\); name another field or source$",
            id="nothing",
        ),
        pytest.param(
            ["a b"],
            {},
            SourceError,
            "too little for 2 windows of 16 tokens; give more text$",
            id="tiny",
        ),
    ],
)
def test_refused(
    tokenizer: Any, rows: Any, change: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        calibrate(documents(*rows), tokenizer, **(ENOUGH | change))


@pytest.mark.parametrize(
    ("packing", "nsamples", "seqlen", "offers"),
    [
        pytest.param("concat", 40, 64, ["nsamples", "seqlen"], id="concat"),
        pytest.param("concat", 2, 2048, ["seqlen"], id="not one window"),
        pytest.param("concat", 1000, 16, ["nsamples"], id="too many windows for any length"),
        pytest.param("sample", 40, 64, ["nsamples"], id="sample"),
    ],
)
def test_too_little_says_what_would_work_and_it_does(
    tokenizer: Any, packing: Any, nsamples: int, seqlen: int, offers: list[str]
) -> None:
    asked = {"nsamples": nsamples, "seqlen": seqlen, "seed": 0, "packing": packing}
    total = sum(map(len, token_lists(TEXTS, tokenizer)))
    has = "16 rows of 8 tokens or more" if packing == "sample" else f"{total:,} tokens in 16 rows"
    with pytest.raises(
        SourceError, match=f"memory gives {has}, too little for {nsamples:,} windows"
    ) as caught:
        calibrate(documents(*TEXTS), tokenizer, **asked)
    offered = re.findall(r"--(nsamples|seqlen) (\d+)", str(caught.value))
    assert [name for name, _ in offered] == offers
    for name, value in offered:
        settings = asked | {name: int(value)}
        assert (
            len(calibrate(documents(*TEXTS), tokenizer, **settings).windows) == settings["nsamples"]
        )
        with pytest.raises(SourceError):  # and it is the most that would
            calibrate(documents(*TEXTS), tokenizer, **(settings | {name: int(value) + 1}))


def test_the_last_id_of_the_vocabulary_is_allowed(tokenizer: Any) -> None:
    given = calibrate(documents(*TEXTS), tokenizer, **ENOUGH)
    highest = max(int(window.max()) for window in given.windows)
    assert same(calibrate(documents(*TEXTS), tokenizer, vocab_size=highest + 1, **ENOUGH), given)
    with pytest.raises(
        SourceError, match=f"token id {highest}, but the model's embedding has {highest} rows"
    ):
        calibrate(documents(*TEXTS), tokenizer, vocab_size=highest, **ENOUGH)


@pytest.mark.parametrize("template", [None, {"tool_use": "x"}], ids=["none", "no default"])
def test_chats_need_a_template(tokenizer: Any, template: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = template
    with pytest.raises(SourceError, match="memory holds chats, but the tokenizer"):
        calibrate(documents(*CHATS), bare, **ENOUGH)


# ---------------------------------------------------------------- overlap


def test_shingles_are_equal_exactly_where_the_tokens_are() -> None:
    ids = np.random.default_rng(0).integers(0, 2, 4000)  # two symbols, so that shingles recur
    hashed = shingles(ids).tolist()
    true = [tuple(ids[i : i + SHINGLE].tolist()) for i in range(len(ids) - SHINGLE + 1)]
    assert len(set(true)) < len(true)
    assert len(set(hashed)) == len(set(true)) == len(set(zip(hashed, true, strict=True)))


@pytest.mark.parametrize("length", [0, 1, SHINGLE - 1], ids=["none", "one", "one short"])
def test_no_shingle_in_fewer_tokens(length: int) -> None:
    assert len(shingles(np.arange(length))) == 0


def test_overlap_equals_its_definition(tokenizer: Any) -> None:
    """Twin: sets of tuples. A third of the evaluation text is planted in the calibration text."""
    evaluation = documents(sentence(100, 90), sentence(101, 90), sentence(102, 90), "tiny")
    rows = [*TEXTS[8:], f"{sentence(50, 60)} {evaluation.rows[1]} {sentence(51, 60)}"]
    calibration = calibrate(
        documents(*rows), tokenizer, nsamples=12, seqlen=64, seed=0, evaluation=evaluation
    )
    plain = [tokenizer(row, add_special_tokens=False)["input_ids"] for row in evaluation.rows]
    known = {tuple(ids[i : i + SHINGLE]) for ids in plain for i in range(len(ids) - SHINGLE + 1)}
    hits = [[tuple(w[i : i + SHINGLE]) in known for i in range(64 - SHINGLE + 1)]
            for w in (window.tolist() for window in calibration.windows)]  # fmt: skip
    overlap = calibration.summary.overlap
    assert overlap is not None
    assert overlap.fraction == sum(map(sum, hits)) / sum(map(len, hits)) > 0.02
    assert overlap.windows == sum(sum(hit) / len(hit) > 0.1 for hit in hits) >= 1
    assert overlap.evaluation == "memory"


@pytest.mark.parametrize(
    ("evaluation", "fraction", "windows"),
    [
        pytest.param(lambda: documents(*TEXTS), 1.0, 4, id="the same text"),
        pytest.param(lambda: read_documents(str(WIKITEXT_ROWS)), 0.0, 0, id="another text"),
        pytest.param(lambda: documents("too short"), 0.0, 0, id="no shingle at all"),
    ],
)
def test_overlap_at_both_ends(
    tokenizer: Any, evaluation: Any, fraction: float, windows: int
) -> None:
    rows = [row for row in TEXTS if len(row.split()) > 100]
    given = calibrate(documents(*rows), tokenizer, nsamples=1, seqlen=64, seed=0, packing="sample")
    assert given.summary.overlap is None
    s = calibrate(
        documents(*TEXTS[-4:]),
        tokenizer,
        nsamples=4,
        seqlen=64,
        seed=0,
        packing="sample",
        evaluation=evaluation(),
    )
    assert s.summary.overlap is not None
    # The BOS before each row is not in the evaluation text, so one shingle of 52 is its own.
    assert s.summary.overlap.fraction == pytest.approx(fraction * 51 / 52, abs=0)
    assert s.summary.overlap.windows == windows


def test_every_shingle_of_the_evaluation_text_is_found(tokenizer: Any) -> None:
    text = sentence(7, 200)
    length = len(encode_text(text, tokenizer))
    s = calibrate(
        documents(text),
        tokenizer,
        nsamples=1,
        seqlen=length,
        seed=0,
        packing="sample",
        evaluation=documents(text),
    ).summary
    assert s.overlap is not None
    shingle_count = length - SHINGLE + 1
    assert s.overlap.fraction == (shingle_count - 1) / shingle_count  # all but the one with the BOS


# ---------------------------------------------------------------- the summary


def test_summary_for_people_and_for_the_manifest(tokenizer: Any) -> None:
    given = documents(*TEXTS, "", dropped={"null": 2})
    s = calibrate(
        given,
        tokenizer,
        nsamples=4,
        seqlen=64,
        seed=0,
        packing="sample",
        evaluation=documents(*TEXTS),
    ).summary
    assert json.loads(json.dumps(s.as_dict()))["dropped"] == {"empty": 1, "null": 2}
    text = "\n".join(s.lines())
    for fact in (
        "4 of 16 available",
        "used of 19 read",
        "1 empty, 2 null",
        "13-token shingles stand in memory",
    ):
        assert fact in text


# ---------------------------------------------------------------- the papers' protocol


def test_wikitext_rows_by_tiny_llama(tokenizer: Any) -> None:
    """The first 200 rows of WikiText-2's test split, joined and tokenized once: a literal count,
    with one BOS."""
    ids = encode_text(read_documents(str(WIKITEXT_ROWS)).text(), tokenizer)
    assert len(ids) == 17_464
    assert (np.flatnonzero(ids == BOS) == [0]).all()


def test_wikitext_test_split_by_llama_2_has_341469_tokens() -> None:
    rows = SHARED / "data" / "wikitext-2-raw" / "wikitext2_test_hf_rows.json"
    model = SHARED / "models" / "llama2-tokenizer-32k"
    if not (rows.is_file() and model.is_dir()):
        pytest.skip(
            f"PROTOCOL NOT CHECKED: WikiText-2's 341,469 tokens need {rows} and {model}, which are not here"
        )
    assert (
        len(
            encode_text(read_documents(f"json:{rows}").text(), AutoTokenizer.from_pretrained(model))
        )
        == 341_469
    )
