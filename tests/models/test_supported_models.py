"""Every kind of row of the architecture table, end to end: a tiny random checkpoint is quantized,
proved, loaded and run.

The packed model must equal the original with its quantized weights written back as dense numbers,
on whatever the architecture adds around its linears: biases, fused matrices, soft-capping,
alternating windows.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, EXAMPLE, EXPERTS, STAGES, TOKENIZER, save
from transformers import AutoModelForCausalLM

from llmquant.checkpoint.manifest import read_manifest
from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import SINGLE, CheckpointReader
from llmquant.models.architectures import ARCHITECTURES
from llmquant.models.load import load
from llmquant.models.naming.names import as_in_checkpoint
from llmquant.planning.preview import make_plan
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe

IDS = torch.randint(6, 4096, (2, 16), generator=torch.Generator().manual_seed(1))
METHODS = ("rtn", "gptq")
# What stays in its original precision inside a block.
ROUTERS = {
    **dict.fromkeys(("mixtral", "phimoe"), ("block_sparse_moe.gate",)),
    **dict.fromkeys(("qwen3_moe", "deepseek_v3"), ("mlp.gate",)),
    "qwen2_moe": ("mlp.gate", "mlp.shared_expert_gate"),
    "granitemoe": ("block_sparse_moe.router.layer",),
    "gpt_oss": ("mlp.router",),
    "llama4_text": ("feed_forward.router",),
}


def checkpoint(kind: str, folder: Path, **changes: object) -> Path:
    """A random model of the kind, fp32, with tiny-llama's tokenizer; a tied head where that is the
    family's habit."""
    tied = kind.startswith(("gemma", "opt", "starcoder"))
    save(kind, folder, vocab_size=4096, tie_word_embeddings=tied, bos_token_id=0, **changes)
    for name in TOKENIZER:
        shutil.copyfile(EXAMPLE / name, folder / name)
    return folder


def recipe(method: str) -> Recipe:
    calibration = {
        "source": f"file:{EXAMPLE / 'calibration.txt'}",
        "nsamples": 4,
        "seqlen": 32,
        "batch_size": 2,
    }
    return Recipe.model_validate(
        {
            "method": method,
            "weights": {"bits": 4, "group_size": 16},
            "calibration": calibration if method == "gptq" else {},
        }
    )


def stack(tensors: dict[str, torch.Tensor], kind: str) -> None:
    """Put experts back as the kind's checkpoints stack them: a plain loop, the other way round than
    the code under test."""

    def take(path: str) -> list[torch.Tensor]:
        return [tensors.pop(path.replace("*", str(e))) for e in range(EXPERTS)]

    for name in [n for n in tensors if kind == "gpt2" and ".c_" in n and n.endswith("weight")]:
        tensors[name] = tensors[name].t().contiguous()
    for i in range(2):
        if kind == "granitemoe":
            mixture = f"model.layers.{i}.block_sparse_moe"
            gates, ups, downs = (take(f"{mixture}.experts.*.w{n}.weight") for n in (1, 3, 2))
            both = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
            tensors[f"{mixture}.input_linear.weight"] = torch.stack(both)
            tensors[f"{mixture}.output_linear.weight"] = torch.stack(downs)
        elif kind in ("gpt_oss", "llama4_text"):
            experts = f"model.layers.{i}.{'mlp' if kind == 'gpt_oss' else 'feed_forward'}.experts"
            names = (f"{experts}.*.{name}_proj.weight" for name in ("gate", "up", "down"))
            gates, ups, downs = (torch.stack(take(name)).transpose(1, 2) for name in names)
            gate_up = torch.cat((gates, ups), -1)
            if kind == "gpt_oss":
                gate_up[..., ::2], gate_up[..., 1::2] = gates, ups
            tensors[f"{experts}.gate_up_proj"] = gate_up
            tensors[f"{experts}.down_proj"] = downs.contiguous()


def with_dense_weights(source: Path, packed: Path, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the original whose quantized weights were replaced by dequantized ones:
    transformers' own, with its kernels for experts, and those of the same model with the
    checkpoint's names, one linear per expert."""
    dense = source.parent / "dense"
    shutil.copytree(source, dense)
    tensors = load_file(dense / SINGLE)
    stored = PackedCheckpoint(CheckpointReader(packed))
    for name in stored.schemes:
        tensors[f"{name}.weight"] = stored.weight(name).dequantize(torch.float32)
    stack(tensors, kind)
    save_file(tensors, dense / SINGLE, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    stacked = model(IDS).logits
    as_in_checkpoint(model, kind)
    return stacked, model(IDS).logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", STAGES)
def test_every_linear_is_packed_and_the_logits_are_the_dense_ones(kind, method, tmp_path):
    source, packed = checkpoint(kind, tmp_path / "source"), tmp_path / "packed"
    quantize(source, packed, recipe(method))
    linears = {name for stage in STAGES[kind] for name in stage}
    expected = {
        f"{ARCHITECTURES[kind].blocks}.{i}.{n}"
        for i in range(CONFIGS[kind].num_hidden_layers)
        for n in linears
    }
    manifest = read_manifest(packed)
    assert set(manifest.modules) == expected
    routers = {
        f"{ARCHITECTURES[kind].blocks}.{i}.{router}"
        for i in range(2)
        for router in ROUTERS.get(kind, ())
    }
    assert set(manifest.skipped) == {ARCHITECTURES[kind].head} | routers
    with torch.no_grad():
        stacked, wanted = with_dense_weights(source, packed, kind)
        got = load(packed, dtype="float32", kernel="reference")(IDS).logits
    if kind in ROUTERS:  # sums of a few rows take another order by where the weight lies in memory
        assert torch.allclose(got, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
    else:
        assert torch.equal(got, wanted)
        assert torch.equal(wanted, stacked)
    assert json.loads((packed / "config.json").read_text())["model_type"] == kind


@pytest.mark.parametrize("method", METHODS)
def test_an_opt_of_narrower_embeddings(method, tmp_path):
    source, packed = (
        checkpoint("opt", tmp_path / "source", word_embed_proj_dim=16),
        tmp_path / "packed",
    )
    result = quantize(source, packed, recipe(method))
    projections = {
        f"model.decoder.project_{side}": "outside the decoder blocks" for side in ("in", "out")
    }
    assert result.skipped == projections | {"lm_head": "ignore pattern lm_head"}
    assert make_plan(source, recipe(method)).skipped == result.skipped
    with torch.no_grad():
        _, wanted = with_dense_weights(source, packed, "opt")
        assert torch.equal(load(packed, dtype="float32", kernel="reference")(IDS).logits, wanted)
