"""Mixtures whose experts have another scheme than other linears: transformers finds it, or is said
to refuse the folder."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_kinds import small
from tiny_models import EXAMPLE, TOKENIZER
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmquant
from llmquant import Recipe, inspect

IDS = torch.randint(10, 4000, (2, 12), generator=torch.Generator().manual_seed(1))
# A first block without experts, a shared expert, neither.
KINDS = ("glm4_moe", "deepseek_v3", "qwen2_moe", "qwen3_moe")
FOUR, EIGHT = {"bits": 4, "group_size": 32}, {"bits": 8, "group_size": 32}
ATTENTION, EXPERTS = "*.self_attn.*", "*.experts.*"


def folder_of(kind: str, recipe: dict[str, Any], path: Path) -> Path:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        small(kind, moe_intermediate_size=32), dtype=torch.float32
    )
    model.half().save_pretrained(path / "source")
    for name in TOKENIZER:
        shutil.copyfile(EXAMPLE / name, path / "source" / name)
    llmquant.quantize(path / "source", path / "packed", Recipe.model_validate(recipe))
    return path / "packed"


def difference(folder: Path) -> float:
    """KL from what llmquant computes to what transformers does."""
    with torch.no_grad():
        ours = llmquant.load(folder, dtype="float32", kernel="reference")(IDS).logits
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits
    p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param((EIGHT, ATTENTION, FOUR), id="attention 4, experts 8"),
        pytest.param((FOUR, ATTENTION, EIGHT), id="attention 8, experts 4"),
        pytest.param((EIGHT, "model.layers.0.mlp.*", FOUR), id="first MLP 4, the rest 8"),
        pytest.param((FOUR, EXPERTS, {"group_size": 16}), id="experts of other groups"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_finds_the_experts_scheme(
    kind: str, recipe: tuple[dict[str, Any], str, dict[str, Any]], tmp_path: Path
) -> None:
    weights, match, change = recipe
    if match == "model.layers.0.mlp.*" and kind in ("qwen2_moe", "qwen3_moe"):
        match = "model.layers.*.mlp.shared_expert.*" if kind == "qwen2_moe" else ATTENTION
    made = {"method": "rtn", "weights": weights, "overrides": [{"match": match, **change}]}
    packed = folder_of(kind, made, tmp_path)
    assert inspect(packed).engines["transformers"] == ()
    assert difference(packed) < 1e-4


def test_groups_that_fit_some_linears_only(tmp_path: Path) -> None:
    """128 divides the experts' width and not the dense MLP's, as in DeepSeek-V2-Lite."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 192}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        small("glm4_moe", **sizes), dtype=torch.float32
    )
    model.half().save_pretrained(tmp_path / "source")
    for name in TOKENIZER:
        shutil.copyfile(EXAMPLE / name, tmp_path / "source" / name)
    packed = tmp_path / "packed"
    llmquant.quantize(tmp_path / "source", packed, llmquant.load_recipe("rtn-w4g128"))
    assert len({m.scheme for m in inspect(packed).modules}) == 2
    assert inspect(packed).engines["transformers"] == ()
    assert difference(packed) < 1e-4


def test_experts_of_several_schemes_are_refused_there(tmp_path: Path) -> None:
    change = {"match": "model.layers.0.mlp.experts.*", **EIGHT}
    packed = folder_of(
        "qwen3_moe", {"method": "rtn", "weights": FOUR, "overrides": [change]}, tmp_path
    )
    (reason,) = inspect(packed).engines["transformers"]
    assert "by one scheme" in reason
    try:
        found = difference(packed)
    except RuntimeError:  # of other shapes than it expects
        found = math.inf
    assert found > 1e-2
