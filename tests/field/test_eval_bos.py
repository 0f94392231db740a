"""``--bos each-window``: a BOS before every window, by every protocol, from a folder and from a
server, equal to a plain loop over the windows, and never ranked with figures without it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_kit import llmquant_command
from fake_server import serving
from tiny_models import EXAMPLE
from transformers import AutoModelForCausalLM, AutoTokenizer

N = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rows, one longer than a window and one shorter."""
    path = tmp_path_factory.mktemp("bos") / "rows.jsonl"
    whole = (EXAMPLE / "heldout.txt").read_text(encoding="utf-8")
    rows = [whole[:700], whole[700:760]]
    path.write_text("".join(json.dumps({"text": r}) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EXAMPLE)


def losses(model: Any, bos: int, context: list[int], targets: list[int]) -> float:
    """Sum of the losses of ``targets`` after BOS and ``context``."""
    fed = [bos, *context, *targets[:-1]]
    assert len(fed) <= N
    with torch.no_grad():
        log_p = model(torch.tensor([fed])).logits[0].double().log_softmax(-1)
    return -sum(float(log_p[len(context) + i, token]) for i, token in enumerate(targets))


def gptq_loop(model: Any, tokenizer: Any, rows: list[str]) -> float:
    ids = tokenizer("\n\n".join(rows), add_special_tokens=False)["input_ids"]
    parts = [ids[i : i + N] for i in range(0, len(ids) - N + 1, N)]
    total = sum(losses(model, tokenizer.bos_token_id, p[:1], p[1:]) for p in parts)
    return math.exp(total / (len(parts) * (N - 1)))


def strided_loop(model: Any, tokenizer: Any, rows: list[str]) -> float:
    ids = tokenizer("\n\n".join(rows), add_special_tokens=False)["input_ids"]
    total, scored = 0.0, 1
    for begin in range(0, len(ids), N // 2):
        end = min(begin + N, len(ids))
        if end > scored:
            total += losses(model, tokenizer.bos_token_id, ids[begin:scored], ids[scored:end])
            scored = end
    return math.exp(total / (len(ids) - 1))


def word_loop(model: Any, tokenizer: Any, rows: list[str]) -> float:
    total, words = 0.0, 0
    for row in rows:
        ids = tokenizer(row, add_special_tokens=False)["input_ids"]
        words += len(row.split())
        for done in range(0, len(ids), N):
            targets = ids[done : done + N]
            room = N - len(targets)
            context = ids[max(0, done - room) : done]
            total += losses(model, tokenizer.bos_token_id, context, targets)
    return math.exp(total / words)


def report(*arguments: object, output: Path) -> Any:
    ran = llmquant_command(
        "eval", *arguments, "--dtype", "float32", "--no-cost", "--quiet", "--output", output
    )
    assert ran.code == 0, ran.err
    return json.loads(output.read_text())


@pytest.mark.parametrize(
    ("family", "name", "loop"),
    [
        pytest.param("ppl/gptq", f"ppl/gptq-{N}-bos", gptq_loop, id="gptq"),
        pytest.param("ppl/strided", f"ppl/strided-{N}-{N // 2}-bos", strided_loop, id="strided"),
        pytest.param("ppl/word", f"ppl/word-{N}-bos", word_loop, id="word"),
    ],
)
def test_each_window_begins_with_bos(
    family: str, name: str, loop: Any, model: Any, tokenizer: Any, text: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    options = ["--text", f"jsonl:{text}"]
    asked = report(
        EXAMPLE, *options, "--protocol", family, "--window", N, "--bos", "each-window",
        output=tmp_path / "a.json",
    )  # fmt: skip
    assert asked["protocols"] == [name]
    assert "--bos each-window" in asked["command"]
    metric = next(iter(asked["models"][0]["metrics"].values()))
    assert metric["value"] == pytest.approx(loop(model, tokenizer, rows), rel=1e-5)

    by_id = report(EXAMPLE, *options, "--protocol", name, output=tmp_path / "b.json")
    assert by_id["models"][0]["metrics"] == asked["models"][0]["metrics"]

    plain = report(
        EXAMPLE, *options, "--protocol", family, "--window", N, output=tmp_path / "c.json"
    )
    assert plain["protocols"] == [name.removesuffix("-bos")]
    assert next(iter(plain["models"][0]["metrics"].values()))["value"] != metric["value"]


def test_a_server_is_given_the_same_windows(text: Path, tokenizer: Any, tmp_path: Path) -> None:
    with serving(EXAMPLE) as fake:
        both = report(
            fake.url, "--reference", EXAMPLE, "--text", f"jsonl:{text}", "--window", N,
            "--bos", "each-window", output=tmp_path / "r.json",
        )  # fmt: skip
    local, remote = (m["metrics"]["perplexity"]["value"] for m in both["models"])
    assert remote == pytest.approx(local, rel=2e-5)
    starts = [body["prompt"][:2] for body in fake.requests]
    assert all(first == tokenizer.bos_token_id != second for first, second in starts)


def test_divergence_has_it_in_its_id_too(text: Path, make_model: Any, tmp_path: Path) -> None:
    pair = report(
        make_model(max_position_embeddings=N), "--reference", EXAMPLE, "--text", f"jsonl:{text}",
        "--window", N, "--bos", "each-window", "--no-noise-floor", output=tmp_path / "r.json",
    )  # fmt: skip
    assert pair["protocols"] == [f"ppl/gptq-{N}-bos", f"kl/top-{N}-bos"]
    assert pair["models"][1]["metrics"]["kl_mean"]["protocol"] == f"kl/top-{N}-bos"


@pytest.mark.parametrize(
    ("bos", "words"),
    [
        pytest.param("each-window", "no BOS token; leave out --bos", id="no BOS"),
        pytest.param("often", "each-window", id="another word"),
    ],
)
def test_misuse(bos: str, words: str, text: Path, make_model: Any) -> None:
    model = make_model()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (model / name).exists():
            values = json.loads((model / name).read_text())
            (model / name).write_text(json.dumps({**values, "bos_token": None}))
    ran = llmquant_command(
        "eval", model, "--text", f"jsonl:{text}", "--window", N, "--bos", bos, "--no-cost"
    )
    assert ran.code == 2
    assert words in ran.said
