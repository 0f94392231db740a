"""Models that also see: the text part is quantized, the rest is carried over byte for byte, and the
folder is one that transformers loads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Run
from safetensors.torch import load_file, save_file
from test_supported_models import checkpoint
from tiny_models import EXAMPLE, TOKENIZER
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from llmquant import inspect, load, register_with_transformers, unregister_from_transformers
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.errors import ArchitectureError
from llmquant.kernels.packed_linear import PackedLinear
from llmquant.models.reading.tower import Tower

IDS = torch.randint(10, 4000, (2, 10), generator=torch.Generator().manual_seed(1))
TEXT: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.06,
    "pad_token_id": 0,
}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_EYE = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT | {"sliding_window": 8, "query_pre_attn_scalar": 16},
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
    },
    "qwen2_5_vl": {
        "text_config": TEXT | {"rope_parameters": ROPE},
        "vision_config": QWEN_EYE | {"fullatt_block_indexes": [0]},
    },
    "qwen3_vl": {
        "text_config": TEXT | {"rope_parameters": ROPE},
        "vision_config": QWEN_EYE
        | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "qwen3_vl_moe": {
        "text_config": TEXT
        | {
            "rope_parameters": ROPE,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
        },
        "vision_config": QWEN_EYE
        | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "qwen3_5": {
        "text_config": TEXT
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "rope_parameters": ROPE | {"partial_rotary_factor": 1.0},
        },
        "vision_config": QWEN_EYE | {"num_position_embeddings": 16},
    },
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": SIGLIP | {"model_type": "pixtral", "head_dim": 16},
        "tie_word_embeddings": False,
    },
    "smolvlm": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": SIGLIP,
    },
    "llama4": {
        "text_config": TEXT
        | {"intermediate_size_mlp": 96, "num_local_experts": 4, "interleave_moe_layer_step": 2},
        "vision_config": SIGLIP
        | {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
    },
}


UNREAD = ("qwen3_vl_moe",)
"""transformers reads their experts only unquantized."""


def write(kind: str, folder: Path) -> PreTrainedModel:
    config = CONFIG_MAPPING[kind](**FAMILIES[kind], bos_token_id=1, eos_token_id=2)
    config.dtype = torch.float16
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or parameter.ndim == 1:
                parameter.add_(0.03 * torch.randn(parameter.shape))
    model.half().save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copyfile(EXAMPLE / name, folder / name)
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_text_part_is_quantized_and_the_rest_is_as_it_was(
    kind: str, tmp_path: Path, run: Run
) -> None:
    source, packed = tmp_path / "source", tmp_path / "packed"
    whole = write(kind, source)
    with torch.no_grad():
        wanted = whole(input_ids=IDS).logits
        text = load(source, dtype="float32")(IDS).logits
    torch.testing.assert_close(text, wanted, rtol=1e-4, atol=1e-4)
    planned = run("plan", source, "--method", "rtn", "--group-size", "16")
    assert planned.code == 0, planned
    assert "carried over byte for byte" in " ".join((planned.out + planned.err).split())
    method = ("--method", "gptq", "--bits", "8", "--group-size", "16", "--nsamples", "4")
    made = run(
        *("quantize", source, "-o", packed, *method, "--seqlen", "24"),
        *("--calibration", f"file:{EXAMPLE / 'calibration.txt'}"),
    )
    assert made.code == 0, made
    before, after = (load_file(f / "model.safetensors") for f in (source, packed))
    eyes = [n for n in before if "vis" in n or "projector" in n or "connector" in n]
    assert eyes
    assert all(torch.equal(before[n], after[n]) for n in eyes)
    blocks = [n for n in before if ".layers.0.self_attn.q_proj.weight" in n and n not in eyes]
    assert not set(blocks) & after.keys()
    config = json.loads((packed / "config.json").read_text())
    assert config["model_type"] == kind
    assert (
        config["vision_config"] == json.loads((source / "config.json").read_text())["vision_config"]
    )
    with torch.no_grad():
        ours = load(packed, dtype="float32", kernel="reference")(IDS).logits
        if kind not in UNREAD:
            theirs = AutoModelForImageTextToText.from_pretrained(packed, dtype=torch.float32).eval()
            torch.testing.assert_close(theirs(input_ids=IDS).logits, ours, rtol=1e-3, atol=1e-3)
    assert bool(inspect(packed).engines["transformers"]) == (kind in UNREAD)
    p, q = wanted.log_softmax(-1), ours.log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 1e-3
    assert run("inspect", packed).code == 0
    verified = run("verify", packed)
    assert verified.code == 0, verified


def test_experts_are_read_whichever_way_they_are_stacked(tmp_path: Path) -> None:
    """Qwen's own checkpoints keep each expert's matrices transposed, transformers writes them as it
    has them, and reads both."""
    wanted = write("qwen3_vl_moe", tmp_path)(input_ids=IDS).logits
    tensors = load_file(tmp_path / "model.safetensors")
    experts = [n for n in tensors if ".experts." in n]
    assert {tuple(tensors[n].shape) for n in experts} == {(4, 96, 64), (4, 64, 48)}
    tensors |= {n: tensors[n].transpose(1, 2).contiguous() for n in experts}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        whole = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
        torch.testing.assert_close(whole(input_ids=IDS).logits, wanted)
        text = load(tmp_path, dtype="float32")(IDS).logits
    torch.testing.assert_close(text, wanted, rtol=1e-4, atol=1e-4)


def test_a_pattern_for_shared_experts_is_none_for_experts() -> None:
    """transformers takes the first group with "experts" in a pattern for that of all experts."""
    tower = Tower(CONFIG_MAPPING["deepseek_v3"](), "deepseek_v3", "language_model.model", "head")
    name = "language_model.model.layers.0.mlp.shared_experts.gate_proj"
    pattern = tower.pattern(name)
    assert pattern is not None
    assert "experts" not in pattern
    assert re.match(pattern.removeprefix("re:"), name)


def differences(packed: Path) -> tuple[float, float]:
    """What transformers computes of a folder and what we do: the largest difference, and the
    largest number."""
    whole = AutoModelForImageTextToText.from_pretrained(packed, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = whole(input_ids=IDS).logits
        ours = load(packed, dtype="float32", kernel="reference")(IDS).logits
    return float((theirs - ours).abs().max()), float(ours.abs().max())


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in UNREAD])
def test_linears_of_several_schemes_are_found_by_their_names(
    kind: str, tmp_path: Path, run: Run
) -> None:
    """The config names them by the checkpoint's names; transformers looks for others."""
    source, packed, again = (tmp_path / name for name in ("source", "packed", "again"))
    write(kind, source)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "method: rtn\nweights: {bits: 8, group_size: 16}\n"
        "overrides: [{match: '*.self_attn.*', bits: 4}]\n"
    )
    made = run("quantize", source, "-o", packed, "--recipe", recipe)
    assert made.code == 0, made
    difference, largest = differences(packed)
    assert difference < 1e-4 * largest
    refused = run("convert", packed, "--to", "gptq", "-o", again)
    assert (refused.code, "write it as compressed-tensors" in refused.err) == (2, True), refused


@pytest.mark.parametrize("more", [(), ("--embeddings", "8")], ids=["linears", "embeddings too"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_transformers_keeps_the_text_part_packed(
    kind: str, more: tuple[str, ...], tmp_path: Path, run: Run
) -> None:
    source, packed = tmp_path / "source", tmp_path / "packed"
    dense = write(kind, source)
    rtn = ("--method", "rtn", "--group-size", "16", *more)
    assert run("quantize", source, "-o", packed, *rtn).code == 0
    register_with_transformers(kernel="reference")
    try:
        if kind in ("llama4", *UNREAD):
            with pytest.raises(ArchitectureError, match=r"llmquant\.load loads its text part"):
                AutoModelForImageTextToText.from_pretrained(packed, dtype=torch.float32)
            return
        whole = AutoModelForImageTextToText.from_pretrained(packed, dtype=torch.float32).eval()
    finally:
        unregister_from_transformers()
    with torch.no_grad():
        ours = load(packed, dtype="float32", kernel="reference")(IDS).logits
        assert torch.equal(whole(input_ids=IDS).logits, ours)
    assert sum(isinstance(m, PackedLinear) for m in whole.modules()) >= 13
    theirs = dict(whole.named_parameters()) | dict(whole.named_buffers())
    kept = [
        (name, tensor)
        for name, tensor in (*dense.named_parameters(), *dense.named_buffers())
        if "language_model" not in name and "text_model" not in name and "lm_head" not in name
    ]
    assert kept
    assert all(torch.equal(theirs[name], tensor) for name, tensor in kept)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3"])
def test_a_conversion_says_what_is_not_quantized(kind: str, tmp_path: Path, run: Run) -> None:
    source, packed, again = (tmp_path / name for name in ("source", "packed", "again"))
    write(kind, source)
    rtn = ("--method", "rtn", "--group-size", "16", "--format", "gptq")
    assert run("quantize", source, "-o", packed, *rtn).code == 0
    converted = run("convert", packed, "--to", "compressed-tensors", "-o", again)
    assert converted.code == 0, converted
    difference, largest = differences(again)
    assert difference < 1e-4 * largest
    dynamic = json.loads((packed / "config.json").read_text())["quantization_config"]["dynamic"]
    eye = "model.visual.blocks.0.attn.qkv" if kind == "qwen2_5_vl" else "vision_tower.x.q_proj"
    (pattern,) = dynamic
    assert re.match(pattern.removeprefix("-:"), eye)


def test_a_further_prediction_head_is_carried_over(tmp_path: Path, run: Run) -> None:
    """DeepSeek-V3 keeps one behind its last block, which transformers does not build."""
    source, packed = checkpoint("deepseek_v3", tmp_path / "source"), tmp_path / "packed"
    tensors = load_file(source / "model.safetensors")
    block = {n: t for n, t in tensors.items() if n.startswith("model.layers.1.")}
    ahead = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in block.items()}
    ahead["model.layers.2.eh_proj.weight"] = torch.randn(32, 64)
    save_file({**tensors, **ahead}, source / "model.safetensors", metadata={"format": "pt"})
    made = run("quantize", source, "-o", packed, "--method", "rtn", "--group-size", "16")
    assert made.code == 0, made
    after = load_file(packed / "model.safetensors")
    assert all(torch.equal(after[n], t) for n, t in ahead.items())
    assert "model.layers.1.self_attn.q_a_proj.weight" not in after
    ignored = json.loads((packed / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.2.eh_proj" in ignored
    assert inspect(packed).engines["transformers"] == ()  # its experts are not packed, nor built
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).eval()
        ours = load(packed, dtype="float32", kernel="reference")
        p, q = (m(IDS).logits.log_softmax(-1) for m in (ours, model))
    # transformers rounds its dequantized weights to the scales' bfloat16.
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 1e-3


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["image_newline", "model.image_newline"])
def test_a_tensor_beside_the_modules_is_carried_over(name: str, tmp_path: Path, run: Run) -> None:
    """As LLaVA-NeXT has one: it is in no module that engines could be told to leave alone."""
    source, packed = tmp_path / "source", tmp_path / "packed"
    write("gemma3", source)
    edit(source, lambda tensors: tensors.update({name: torch.ones(32)}))
    made = run("quantize", source, "-o", packed, "--method", "rtn", "--group-size", "16")
    assert made.code == 0, made
    assert torch.equal(load_file(packed / "model.safetensors")[name], torch.ones(32))
    difference, largest = differences(packed)
    assert difference < 1e-4 * largest


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_recipe_is_chosen_by_the_head_that_is_stored(kind: str, tmp_path: Path, run: Run) -> None:
    """Configs of text parts say nothing of it, or something else."""
    write(kind, tmp_path / "source")
    tied = not any(
        n.endswith("lm_head.weight") for n in CheckpointReader(tmp_path / "source").tensors
    )
    explained = run("plan", tmp_path / "source", "--explain", "--json")
    assert explained.code == 0, explained
    why = json.loads(explained.out)["unfit"]["rotate-gptq-w4g32-asym"]
    assert ("shares the embeddings' weights" in why) == tied, why


@pytest.mark.parametrize("kind", FAMILIES)
def test_advice_counts_keys_and_values_of_the_text_part(
    kind: str, tmp_path: Path, run: Run
) -> None:
    whole = write(kind, tmp_path / "source")
    told = run("advise", tmp_path / "source", "--context", "10", "--no-measure", "--json")
    assert told.code == 0, told
    with torch.no_grad():
        cache = whole(input_ids=IDS[:1], use_cache=True).past_key_values
    held = [t for layer in cache.layers for t in vars(layer).values()]
    floats = sum(t.numel() for t in held if isinstance(t, torch.Tensor) and t.is_floating_point())
    found = json.loads(told.out)
    width = 2 if "16" in found["dtype"] else 4
    assert found["cache_bytes"] == floats * width


def test_a_text_part_alone_is_said(tmp_path: Path, run: Run) -> None:
    source = tmp_path / "source"
    write("gemma3", source)
    eyes = ("vision_tower", "multi_modal_projector")
    edit(source, lambda ts: [ts.pop(n) for n in list(ts) if any(eye in n for eye in eyes)])
    planned = run("plan", source, "--method", "rtn", "--group-size", "16")
    assert planned.code == 0, planned
    told = " ".join((planned.out + planned.err).split())
    assert "config.json has vision_config, and the folder has the text part alone" in told
    assert "byte for byte" not in told


def test_an_eye_in_fp8_is_stored_as_the_numbers_that_it_means(tmp_path: Path, run: Run) -> None:
    source, packed = tmp_path / "source", tmp_path / "packed"
    write("gemma3", source)
    meant: dict[str, torch.Tensor] = {}

    def in_fp8(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("q_proj.weight")]:
            tensors[name] = (tensors[name] * 100).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = torch.tensor(0.01)
            if "vision" in name:
                meant[name] = (tensors[name].float() * 0.01).half()

    edit(source, in_fp8)
    made = run("quantize", source, "-o", packed, "--method", "rtn", "--group-size", "16")
    assert made.code == 0, made
    (name,) = meant
    assert f"byte for byte, but {name} as the numbers that they mean" in " ".join(
        (made.out + made.err).split()
    )
    after = load_file(packed / "model.safetensors")
    assert torch.equal(after[name], meant[name])
    assert f"{name}_scale" not in after
