"""docs/models.md is what the sweep finds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from small_kinds import KINDS
from small_wholes import WHOLES
from sweep import (
    ALL,
    IDS,
    TEXTS,
    VERSION,
    Family,
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
# transformers' own table, states beside attention, experts without a gate, a type that is refused,
# tensors that a file has in parts.
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
    "kimi_linear",
)
# One of each habit, in order: experts under a causal class made here; blocks that text does not
# reach; a prefix of its own; eyes beside the layers; a type with a talker beside it; a head inside
# the text part; logits that the whole divides; logits that it caps; names as published; names and
# joined linears that only the whole's conversions tell; no text part.
FEW_WHOLES = (
    "glm4v_moe",
    "mllama",
    "nemotron_h_omni",
    "unlimited_ocr",
    "qwen3_omni_moe_thinker",
    "hyperclovax_vision_v2",
    "granite_docling",
    "muse_glimmer",
    "kimi_k25",
    "minimax_m3_vl",
    "git",
)


def listed(family: Family) -> list[str]:
    """The page's rows of model types."""
    return re.findall(r"^\| `.*$", family.page.read_text(encoding="utf-8"), re.MULTILINE)


def kind_of(line: str) -> str:
    return line.split("`")[1]


def check(outcome: Outcome, family: Family) -> None:
    """Nothing is silently wrong, and the page has the row that this outcome makes."""
    assert outcome.wrong == ()
    assert row(outcome) in listed(family)


@pytest.mark.parametrize("family", [TEXTS, ALL], ids=["texts", "wholes"])
def test_every_kind_is_listed_once_and_nothing_is_wrong(family: Family) -> None:
    assert sorted(map(kind_of, listed(family))) == sorted(family.kinds)
    assert "## Outside the limit" not in family.page.read_text(encoding="utf-8")


def test_the_readme_counts_what_works() -> None:
    readme = (ALL.page.parents[1] / "README.md").read_text(encoding="utf-8")
    (line,) = [n for n in readme.splitlines() if n.endswith("numbers that it means) |")]
    named, (more,) = re.findall(r"`(\w+)`", line), re.findall(r"\[(\d+) more\]", line)
    works = ALL.page.read_text(encoding="utf-8").partition("## Works")[2].partition("## Refused")[0]
    found = set(map(kind_of, re.findall(r"^\| `.*$", works, re.MULTILINE)))
    assert set(named) <= found
    assert int(more) == len(found) - len(named)


@pytest.mark.parametrize("kind", FEW)
def test_the_page_says_what_the_sweep_finds(kind: str) -> None:
    check(outcome_of(kind), TEXTS)


@pytest.mark.parametrize("kind", FEW_WHOLES)
def test_the_page_says_what_the_sweep_finds_of_wholes(kind: str) -> None:
    check(outcome_of(kind, family=ALL), ALL)


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
    check(outcome_of(kind), TEXTS)


@pytest.mark.long
@pytest.mark.parametrize("kind", WHOLES)
def test_no_whole_is_silently_wrong(kind: str) -> None:
    check(outcome_of(kind, family=ALL), ALL)
