"""Models that also see, whose own class does otherwise than the text part's or is built of other
names than the checkpoint's."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Run
from safetensors.torch import load_file, save_file
from small_kinds import small
from small_wholes import small_whole
from test_towers import IDS, QWEN_EYE, SIGLIP, TEXT, differences
from tiny_models import EXAMPLE, TOKENIZER
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from llmquant import load
from llmquant.models.naming.causal_class import causal_class, reading_as
from llmquant.models.reading.tower import Tower

RTN = ("--method", "rtn", "--bits", "8", "--group-size", "16")


def write(kind: str, folder: Path, **parts: Any) -> PreTrainedModel:
    config: PreTrainedConfig = CONFIG_MAPPING[kind](**parts, bos_token_id=1, eos_token_id=2)
    config.dtype = torch.float16
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.half().save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copyfile(EXAMPLE / name, folder / name)
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


CLIP = SIGLIP | {"model_type": "clip_vision_model"}
GEMMA = {"model_type": "gemma2", "sliding_window": 8, "final_logit_softcapping": 0.5}
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere2": ("aya_vision", {"model_type": "cohere2", "logit_scale": 0.25}),
    "granite": ("llava_next", {"model_type": "granite", "logits_scaling": 8.0}),
    "gemma2": ("llava", GEMMA),
    "gemma2 in a model that caps too": ("paligemma", GEMMA),
    "falcon_h1": (
        "llava",
        {
            "model_type": "falcon_h1",
            "lm_head_multiplier": 3.0,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
        },
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_logits_are_those_of_the_whole_model(name: str, tmp_path: Path, run: Run) -> None:
    """A text model's causal class may scale or cap its logits; the whole model's class does as its
    own code says."""
    kind, text = HEADS[name]
    source, packed = tmp_path / "source", tmp_path / "packed"
    whole = write(kind, source, text_config=TEXT | text, vision_config=CLIP)
    with torch.no_grad():
        wanted = whole(input_ids=IDS).logits
        found = load(source, dtype="float32")(IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    made = run("quantize", source, "-o", packed, *RTN)
    assert made.code == 0, made
    difference, largest = differences(packed)
    assert difference < 1e-4 * largest


def test_blocks_that_run_beside_an_image_alone_are_carried_over(tmp_path: Path, run: Run) -> None:
    """Llama 3.2's vision models: text passes every fifth block by. With an image transformers runs
    them all, and the packed folder gives what the original does."""
    source, packed = tmp_path / "source", tmp_path / "packed"
    eye = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 4,
        "image_size": 28,
        "vision_output_dim": 96,
        "intermediate_layers_indices": [0, 1],
    }
    blocks = {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    text = TEXT | blocks | rope | {"num_attention_heads": 4, "pad_token_id": 0}
    whole = write("mllama", source, text_config=text, vision_config=eye, image_token_index=5)
    weights = load_file(source / "model.safetensors")
    for name in weights:
        if name.endswith("attn_gate") or name.endswith("mlp_gate"):
            weights[name].fill_(0.7)  # 0 in a new model, which closes these blocks
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    whole = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    tiles = torch.ones(1, 1, 4, dtype=torch.long)
    image = {
        "pixel_values": torch.randn(1, 1, 4, 3, 28, 28, generator=torch.Generator().manual_seed(0)),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": tiles,
        "cross_attention_mask": torch.ones(1, IDS.shape[1], 1, 4, dtype=torch.long),
    }
    with torch.no_grad():
        alone, seen = whole(IDS[:1]).logits, whole(IDS[:1], **image).logits
    assert (alone - seen).abs().max() > 0.05 * alone.abs().max()
    torch.testing.assert_close(load(source, dtype="float32")(IDS[:1]).logits, alone)

    made = run("quantize", source, "-o", packed, *RTN)
    assert made.code == 0, made
    assert "text does not reach 2 of the blocks" in " ".join(made.err.split())
    kept = load_file(packed / "model.safetensors")
    passed = [n for n in weights if re.search(r"layers\.[13]\.|vision_model", n)]
    assert passed
    assert all(torch.equal(kept[n], weights[n]) for n in passed)
    other = AutoModelForImageTextToText.from_pretrained(packed, dtype=torch.float32).eval()
    text_alone = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).eval()
    assert type(text_alone).__name__ == "MllamaForCausalLM"  # which calls its blocks otherwise
    with torch.no_grad():
        for model, wanted, given in (
            (other, alone, {}),
            (other, seen, image),
            (text_alone, alone, {}),
        ):
            found = model(IDS[:1], **given).logits
            assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_what_transformers_renames_outside_the_text_part_stays_as_it_is(
    tmp_path: Path, run: Run
) -> None:
    """A linear by itself: ``model.vision_projector`` in the file, ``model.projector`` in memory."""
    source, packed = tmp_path / "source", tmp_path / "packed"
    text = TEXT | {"model_type": "hyperclovax"}
    eye = QWEN_EYE | {"fullatt_block_indexes": [0]}
    write("hyperclovax_vision_v2", source, text_config=text, vision_config=eye)
    name = "model.vision_projector.weight"
    made = run("quantize", source, "-o", packed, *RTN)
    assert made.code == 0, made
    before = load_file(source / "model.safetensors")[name]
    assert torch.equal(load_file(packed / "model.safetensors")[name], before)
    whole, info = AutoModelForImageTextToText.from_pretrained(packed, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(whole.get_parameter("model.projector.weight"), before)


def test_a_linear_by_itself_is_not_the_end_of_another_name() -> None:
    tower = Tower(CONFIG_MAPPING["llama"](), "llama", "model.language_model", "lm_head")
    (pattern,) = tower.patterns(["model.proj"])
    matches = re.compile(pattern.removeprefix("re:")).match
    assert matches("model.proj")
    assert matches("proj")
    assert not matches("model.language_model.layers.0.self_attn.q_proj")


def test_a_config_of_a_text_part_and_nothing_else(tmp_path: Path, run: Run) -> None:
    """Its numbers are one level down, as of a model that sees, and there are no eyes."""
    source, packed = tmp_path / "source", tmp_path / "packed"
    text = TEXT | {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "initializer_range": 0.1,
    }
    whole = write("gemma4_unified", source, text_config=text)
    made = run(
        *(
            "quantize",
            source,
            "-o",
            packed,
            "--method",
            "gptq",
            "--bits",
            "8",
            "--group-size",
            "16",
        ),
        *("--nsamples", "4", "--seqlen", "24"),
        *("--calibration", f"file:{EXAMPLE / 'calibration.txt'}"),
    )
    assert made.code == 0, made
    with torch.no_grad():
        p = whole(input_ids=IDS).logits.log_softmax(-1)
        q = load(packed, dtype="float32", kernel="reference")(IDS).logits.log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 1e-3
    difference, largest = differences(packed)
    assert difference < 1e-4 * largest


def test_gemma3n_without_eyes_and_ears(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its eyes are timm's, which is not installed; a layer stands in their place."""
    from transformers.models.gemma3n import modeling_gemma3n

    text = small("gemma3n_text").to_dict() | {"num_kv_shared_layers": 1}
    built = modeling_gemma3n.AutoModel.from_config

    def without_senses(config: PreTrainedConfig) -> torch.nn.Module:
        reads = config.model_type == "gemma3n_text"
        return built(config) if reads else torch.nn.Linear(4, 4)

    monkeypatch.setattr(modeling_gemma3n.AutoModel, "from_config", without_senses)
    source, packed = tmp_path / "source", tmp_path / "packed"
    whole = write("gemma3n", source, text_config=text)
    assert run("quantize", source, "-o", packed, *RTN).code == 0
    with torch.no_grad():
        p = whole(input_ids=IDS).logits.log_softmax(-1)
        q = load(packed, dtype="float32", kernel="reference")(IDS).logits.log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 1e-3
    kept, before = (load_file(f / "model.safetensors") for f in (packed, source))
    senses = [name for name in before if "vision" in name or "audio" in name]
    assert senses
    for name in senses:
        assert torch.equal(kept[name], before[name])


def test_a_step_that_the_whole_may_leave_out_is_not_guessed() -> None:
    config = small_whole("muse_glimmer")
    found: Any = causal_class(config)
    cap = "final_logit_softcapping"
    assert found.steps == (("*", "output_multiplier"), ("/", cap), ("tanh", ""), ("*", cap))
    vars(config.get_text_config())[cap] = None  # as an earlier transformers would read it
    assert causal_class(config) is None


def test_conversions_of_the_whole_are_its_text_parts_where_a_tensor_calls_for_them() -> None:
    config = small_whole("minimax_m3_vl")
    plain: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.get_text_config())]
    block = "model.layers.1"
    names = [f"{block}.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"]
    assert reading_as(plain, config, names) is plain
    names.append(f"{block}.block_sparse_moe.gate.weight")
    first: Any = reading_as(plain, config, names)
    assert issubclass(first, plain)
    assert reading_as(plain, config, names) is first
    packed = [*names, f"{block}.block_sparse_moe.experts.3.w2.weight_packed"]
    model = first._from_config(config.get_text_config())
    assert len(get_model_conversion_mapping(model, add_legacy=False)) == 1
    model = reading_as(plain, config, packed)._from_config(config.get_text_config())
    assert len(get_model_conversion_mapping(model, add_legacy=False)) == 2
    assert get_model_conversion_mapping(plain._from_config(model.config), add_legacy=False) == []
