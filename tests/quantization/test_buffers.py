"""What a checkpoint keeps in buffers and in float32: calibration, the written folder and the
loaded model have it as it is. A router's correction bias is the example that matters, since
without it, or with 16 bits of it, tokens go to other experts.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import EXAMPLE, TOKENIZER
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from walk_plans import plan_of

import llmquant
from llmquant import Recipe
from llmquant.models.architectures import blocks_of
from llmquant.models.precision import stored_buffers
from llmquant.quantization.blocks.materialize import materialized, outer_names
from llmquant.quantization.blocks.whole_model import whole

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from small_kinds import small

# A buffer in the router, beside it, in the block, and a parameter in its place.
KINDS = ("glm4_moe", "deepseek_v3", "minimax_m2", "lfm2_moe", "gemma4_text", "ernie4_5_moe")
IDS = torch.randint(10, 4000, (2, 12), generator=torch.Generator().manual_seed(1))
RTN = Recipe.model_validate({"method": "rtn", "weights": {"bits": 8, "group_size": 16}})


def written(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A small model whose buffers are not what its class makes them; biases lie close together."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(small(kind), dtype=torch.float32)
    kept = ("moe_statics", "expert_bias", "layernorm")
    own = [p for n, p in model.named_parameters() if any(part in n for part in kept)]
    with torch.no_grad():
        for tensor in (*(b for _, b in stored_buffers(model)), *own):
            tensor.copy_(7 + 0.02 * torch.randn(tensor.shape))
    model.config.dtype = dtype
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    stored = load_file(path)
    stored |= {n: t.to(dtype) for n, t in stored.items() if not n.endswith("correction_bias")}
    save_file(stored, path, metadata={"format": "pt"})
    for name in TOKENIZER:
        shutil.copyfile(EXAMPLE / name, folder / name)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_walk_computes_with_the_checkpoints_buffers(kind: str, tmp_path: Path) -> None:
    wanted = written(kind, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    plan = plan_of(tmp_path, RTN)
    with torch.no_grad(), whole(plan):
        torch.testing.assert_close(plan.model(IDS).logits, wanted(IDS).logits)
    seen: set[str] = set()

    def note(module: nn.Module, prefix: str) -> None:
        for name, tensor in stored_buffers(module):
            if f"{prefix}{name}" in stored and not tensor.is_meta:
                assert torch.equal(tensor, stored[f"{prefix}{name}"])
                seen.add(f"{prefix}{name}")

    before = {n: b.clone() for n, b in stored_buffers(plan.model)}
    for index, block in enumerate(blocks_of(plan.model, plan.architecture)):
        prefix = f"{plan.architecture.blocks}.{index}."
        with materialized(plan, block, prefix):
            note(block, prefix)
    with materialized(plan, plan.model, "", outer_names(plan)):
        pass
    assert seen == {n for n in before if n in stored and n.startswith(plan.architecture.blocks)}
    assert seen or kind == "ernie4_5_moe"
    assert all(torch.equal(before[n], b) for n, b in stored_buffers(plan.model))


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe", "ernie4_5_moe"])
def test_sixteen_bits_send_tokens_where_transformers_sends_them(kind: str, tmp_path: Path) -> None:
    """It keeps these routers' biases in float32, and so do the folder and the loaded model."""
    source, packed = tmp_path / "source", tmp_path / "packed"
    written(kind, source, torch.bfloat16)
    llmquant.quantize(source, packed, RTN)
    biases = {n: t for n, t in load_file(source / "model.safetensors").items() if "correction" in n}
    after = load_file(packed / "model.safetensors")
    assert biases
    assert all(torch.equal(after[n], t) and t.dtype == torch.float32 for n, t in biases.items())
    model = llmquant.load(packed, dtype="bfloat16", kernel="reference")
    tensors: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    assert all(torch.equal(tensors[n], t) for n, t in biases.items())
    model(IDS)


@pytest.mark.parametrize("kind", ["lfm2_moe", "afmoe", "gpt_oss"])
def test_what_a_router_adds_is_stored_in_full(kind: str, tmp_path: Path) -> None:
    """Of a float32 checkpoint the rest is stored in bfloat16."""
    source, packed = tmp_path / "source", tmp_path / "packed"
    written(kind, source)
    llmquant.quantize(source, packed, RTN, llmquant.QuantizeOptions(store_dtype="auto"))
    before, after = (load_file(f / "model.safetensors") for f in (source, packed))
    assert json.loads((packed / "config.json").read_text())["dtype"] == "bfloat16"
    wide = [n for n in before if n.endswith("expert_bias") or "layernorm" in n]
    wide = wide if kind == "gpt_oss" else [n for n in wide if n.endswith("expert_bias")]
    assert wide
    assert all(torch.equal(after[n], before[n]) for n in wide)
    assert after["model.embed_tokens.weight"].dtype == torch.bfloat16
