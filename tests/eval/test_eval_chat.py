"""``ppl/chat`` scores the answers in chats and nothing else.

What it should score is asked of transformers: its mask of a template's ``generation`` blocks, and
one forward pass over each whole chat.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import llmquant
from llmquant.errors import SourceError
from llmquant_eval.run.evaluate import evaluate
from llmquant_eval.run.request import Request
from llmquant_eval.scoring.protocols import RollingProtocol, parse_protocol
from llmquant_eval.scoring.token_stream import make_stream

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
CHATS: list[list[dict[str, str]]] = [
    [
        {"role": "user", "content": "Who lived in the old castle?"},
        {"role": "assistant", "content": "A king, and after him his two sons."},
    ],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Is it far?"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "And by ship, in the winter?"},
        {"role": "assistant", "content": "Yes, for the sea is then full of ice."},
    ],
]


@pytest.fixture(scope="module")
def chatty(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-llama with a chat template."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(tiny_llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rounded(chatty: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("rounded") / "model"
    llmquant.quantize(chatty, output, llmquant.Recipe(method="rtn"))
    return output


def written(folder: Path, rows: list[Any], name: str = "chats.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    return f"jsonl:{path}#messages"


def answers_alone(model: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Per chat the logits ``[scored, vocabulary]`` and targets of its answers, by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = llmquant.load(model, dtype=torch.float32, kernel="dense")
    logits, targets = [], []
    for chat in CHATS:
        found = tokenizer.apply_chat_template(
            chat, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        ids, scored = found["input_ids"][0], found["assistant_masks"][0].bool()
        assert 0 < int(scored.sum()) < len(ids)
        with torch.inference_mode():
            out = loaded(input_ids=ids[None], use_cache=False).logits[0]
        logits.append(out[:-1][scored[1:]])
        targets.append(ids[1:][scored[1:]])
    return logits, targets


@pytest.mark.filterwarnings("ignore")
def test_it_is_the_loss_of_the_answers_and_of_nothing_else(
    chatty: Path, rounded: Path, tmp_path: Path
) -> None:
    request = Request(
        candidates=(str(rounded),), reference=str(chatty), text=written(tmp_path, CHATS),
        protocol="ppl/chat-256", dtype="float32", kernel="dense", cost=False, noise_floor=False,
    )  # fmt: skip
    report = evaluate(request)
    base, own = (next(m for m in report.models if m.role == r) for r in ("reference", "candidate"))
    (p, targets), (q, _) = answers_alone(chatty), answers_alone(rounded)
    right = torch.cat(targets)
    log_p, log_q = (torch.log_softmax(torch.cat(x).double(), dim=-1) for x in (p, q))
    for model, log in ((base, log_p), (own, log_q)):
        loss = -log.gather(1, right[:, None]).mean()
        assert model.metrics["perplexity"].value == pytest.approx(math.exp(loss), rel=1e-5)
        assert model.metrics["perplexity"].tokens == len(right)
        assert model.metrics["perplexity"].protocol == "ppl/chat-256"
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert own.metrics["kl_mean"].value == pytest.approx(float(kl), rel=1e-4)
    assert own.metrics["kl_mean"].protocol == "kl/top-chat-256"
    assert report.passes[0].windows == 3  # an answer each


@given(st.integers(2, 20), st.integers(0, 40), st.integers(0, 60))
def test_every_token_of_an_answer_is_scored_once_after_what_fits(
    window: int, start: int, length: int
) -> None:
    end = start + length
    windows = RollingProtocol("chat", window).between(start, end)
    scored = [t for w in windows for t in range(w.scored, w.end)]
    assert scored == list(range(max(1, start), end))
    for w in windows:
        assert 0 <= w.begin < w.scored
        assert w.fed <= window
        assert w.begin == 0 or w.fed == window  # no context is given up that would fit


def test_ids_of_the_protocol() -> None:
    assert parse_protocol("ppl/chat", 512).perplexity_id == "ppl/chat-512"
    assert parse_protocol("ppl/chat-64-bos", 512).divergence_id == "kl/top-chat-64-bos"


def test_rows_without_an_answer_are_counted(chatty: Path, tmp_path: Path) -> None:
    rows = [*CHATS, [{"role": "user", "content": "Nobody answers."}]]
    request = Request(
        candidates=(str(chatty),), text=written(tmp_path, rows), protocol="ppl/chat-256",
        dtype="float32", cost=False,
    )  # fmt: skip
    counted = evaluate(request).text
    assert counted is not None
    assert (counted.rows.read, counted.rows.used) == (3, 2)
    assert counted.rows.dropped == {"chats without an answer that can be told from the rest": 1}


def test_an_answer_that_the_template_changes_later_is_counted(chatty: Path, tmp_path: Path) -> None:
    """Templates of models that think cut what an earlier turn thought, so that turn's answer is not
    what the model was asked for."""
    folder = tmp_path / "thinking"
    shutil.copytree(chatty, folder)
    (folder / "chat_template.jinja").write_text(
        TEMPLATE.replace(
            "{{ m.content }}{{ eos_token }}", "{{ m.content if loop.last else 'cut' }}"
        )
    )
    request = Request(
        candidates=(str(folder),), text=written(tmp_path, CHATS), protocol="ppl/chat-256",
        dtype="float32", cost=False,
    )  # fmt: skip
    report = evaluate(request)
    assert report.text is not None
    left_out = "chats of which the chat template leaves out a turn"
    assert report.text.rows.partly == {"answers that cannot be told from the rest": 1, left_out: 1}
    assert report.passes[0].windows == 2
    assert str(report.text.lost()).endswith(
        f"2 of 2 rows used; left out of these: 1 {left_out}, 1 answers that cannot be told from the rest"
    )


def test_each_window_can_begin_with_bos(chatty: Path, tmp_path: Path) -> None:
    """Where it is the beginning of a chat, whose template wrote one, there is not a second."""
    documents = llmquant.read_documents(written(tmp_path, CHATS))
    tokenizer = llmquant.load_tokenizer(chatty)
    plain, with_bos = (
        make_stream(parse_protocol(name, 12), tokenizer, documents, "chats", None)
        for name in ("ppl/chat-12", "ppl/chat-12-bos")
    )
    assert len(with_bos.windows) == len(plain.windows)
    assert with_bos.chats == plain.chats
    for window, same in zip(with_bos.windows, plain.windows, strict=True):
        fed = with_bos.ids[window.begin : window.end - 1].tolist()
        assert fed[0] == tokenizer.bos_token_id
        assert fed[1:2] != [tokenizer.bos_token_id]
        scored = [s.ids[w.scored : w.end].tolist() for s, w in ((with_bos, window), (plain, same))]
        assert scored[0] == scored[1]


@pytest.mark.parametrize(
    ("rows", "protocol", "message"),
    [
        ([*CHATS, "plain"], "ppl/chat-64", "1 of 3 rows are plain text, not chats, and ppl/chat-64"),
        (CHATS, "ppl/gptq-64", "2 of 2 rows are chats, .* --protocol ppl/chat"),
        (CHATS, "ppl/word-64", "2 of 2 rows are chats, .* --protocol ppl/chat"),
        (
            [[{"role": "user", "content": "Nobody answers."}]],
            "ppl/chat-64",
            r"no answer of an assistant to score \(1 chats without an answer",
        ),
    ],
    ids=["plain row", "gptq on chats", "word on chats", "no answer"],
)  # fmt: skip
def test_a_text_that_does_not_fit_is_refused(
    rows: list[Any], protocol: str, message: str, chatty: Path, tmp_path: Path
) -> None:
    documents = llmquant.read_documents(written(tmp_path, rows))
    tokenizer = llmquant.load_tokenizer(chatty)
    with pytest.raises(SourceError, match=message):
        make_stream(parse_protocol(protocol, 64), tokenizer, documents, "chats", None)


def test_a_window_of_one_token_is_refused() -> None:
    with pytest.raises(llmquant.UsageError, match="a window of 1 tokens"):
        parse_protocol("ppl/chat-1", 512)
