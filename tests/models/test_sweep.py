"""docs/models.md is what the sweep finds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from small_kinds import KINDS
from sweep import (
    IDS,
    PAGE,
    VERSION,
    Outcome,
    built,
    logits,
    outcome_of,
    recipe,
    row,
    with_our_quantizer,
)
from transformers import __version__

from llmquant import load
from llmquant.quantization.run import quantize

pytestmark = pytest.mark.skipif(
    not __version__.startswith(f"{VERSION}."),
    reason=f"the page is about the model types of transformers {VERSION}",
)
# One of each habit: plain, fused and turned matrices, stacked experts, experts and names found by
# transformers' own table, states beside attention, experts without a gate, a type that is refused.
FEW = (
    "gptj",
    "gpt2",
    "openai-gpt",
    "gemma3n_text",
    "granitemoe",
    "hy_v3",
    "qwen3_next",
    "nemotron_h",
    "rwkv",
)


def listed() -> list[str]:
    """The page's rows of model types."""
    return re.findall(r"^\| `.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def kind_of(line: str) -> str:
    return line.split("`")[1]


def check(outcome: Outcome) -> None:
    """Nothing is silently wrong, and the page has the row that this outcome makes."""
    assert outcome.wrong == ()
    assert row(outcome) in listed()


def test_every_kind_is_listed_once() -> None:
    assert sorted(map(kind_of, listed())) == sorted(KINDS)


def test_nothing_on_the_page_is_wrong() -> None:
    assert "## Outside the limit" not in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", FEW)
def test_the_page_says_what_the_sweep_finds(kind: str) -> None:
    check(outcome_of(kind))


@pytest.mark.parametrize("kind", ["olmo", "nanochat", "mamba", "jamba"])
def test_embeddings_and_head_too(kind: str, tmp_path: Path) -> None:
    """Of OLMo and nanochat, whose norms have no weights, no parameter is left, and Mamba's own code
    asks its head for a weight."""
    assert built(kind, tmp_path / "source") is None
    packed = tmp_path / "packed"
    quantize(tmp_path / "source", packed, recipe({"method": "rtn", "embeddings": {"bits": 8}}))
    model = load(packed, dtype="float32", kernel="reference")
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert torch.equal(with_our_quantizer(packed), logits(model))
    longer = model.generate(IDS[:1], max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert longer.shape[1] == IDS.shape[1] + 2


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_is_silently_wrong(kind: str) -> None:
    check(outcome_of(kind))
