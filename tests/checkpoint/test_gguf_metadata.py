"""What a GGUF file's metadata says is what the imported model computes, or the import says why not:
zeros that mean "none", rotary scaling, numbers that are no numbers, keys that nobody reads."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf_kit
import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, random_model
from transformers import AutoModelForCausalLM, GPT2Config

from llmquant.checkpoint.gguf.folder import FolderOptions, ImportResult, write_folder
from llmquant.conversion.gguf.importing import ImportOptions, import_gguf
from llmquant.errors import CheckpointError, LayoutError, LlmquantError

_OWN = {"vocab_size": gguf_kit.VOCAB, "bos_token_id": None, "eos_token_id": gguf_kit.EOS, "pad_token_id": None}  # fmt: skip
_IDS = torch.tensor([[5, 70, 200, 33, 9, 41, 41, 7, 100, 3, 250, 64, 12, 44, 99, 120, 7, 8]])
_FP32 = FolderOptions(dtype="float32")
_LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
_SAID_YARN = {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0, "llama__rope__scaling__original_context_length": 16}  # fmt: skip
_GLOBAL = {"rope_type": "default", "rope_theta": 1e6}
_S, _F = "sliding_attention", "full_attention"
_LOCAL = {"gemma3__rope__freq_base_swa": 500.0}
_GEMMA = {
    "num_hidden_layers": 6,
    "tie_word_embeddings": True,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "sliding_window": 4,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        "full_attention": _GLOBAL,
    },
}

# name: kind of tiny model, llama.cpp's architecture, the model's config, what the file says
SAME: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "window of 0": ("phi3", "phi3", {"sliding_window": None}, {"phi3__attention__sliding_window": 0}),
    "soft caps of 0": ("gemma2", "gemma2", {"tie_word_embeddings": True, "attn_logit_softcapping": None, "final_logit_softcapping": None}, {"gemma2__attn_logit_softcapping": 0.0, "gemma2__final_logit_softcapping": 0.0}),
    "factor without a type": ("llama", "llama", _LINEAR, {"llama__rope__scaling__factor": 4.0}),
    "old name of a factor": ("llama", "llama", _LINEAR, {"llama__rope__scale_linear": 4.0}),
    "factor of type none": ("llama", "llama", {}, {"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 4.0}),
    "yarn": ("llama", "llama", {"rope_parameters": _YARN}, _SAID_YARN),
    "yarn_attn_factor": ("llama", "llama", {"rope_parameters": {**_YARN, "attention_factor": 0.7}}, {**_SAID_YARN, "llama__rope__scaling__yarn_attn_factor": 0.7}),
    "attn_factor multiplies": ("llama", "llama", {"rope_parameters": {**_YARN, "attention_factor": 0.5 * (0.1 * np.log(4.0) + 1)}}, {**_SAID_YARN, "llama__rope__scaling__attn_factor": 0.5}),
    "no base": ("mixtral", "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {"llama__rope__freq_base": None}),
    "no head_count_kv": ("qwen3", "qwen3", {"num_key_value_heads": 4}, {"qwen3__attention__head_count_kv": None}),
    "each third layer sees everything": ("gemma3_text", "gemma3", {**_GEMMA, "layer_types": [_S, _S, _F] * 2}, {**_LOCAL, "gemma3__attention__sliding_window_pattern": 3}),
    "windows layer by layer": ("gemma3_text", "gemma3", {**_GEMMA, "layer_types": [_F, _S, _S, _F, _S, _F]}, {**_LOCAL, "gemma3__attention__sliding_window_pattern": [False, True, True, False, True, False]}),
    "a pattern of 1": ("gemma3_text", "gemma3", {**_GEMMA, "layer_types": [_F] * 6}, {**_LOCAL, "gemma3__attention__sliding_window_pattern": 1}),
    "no window": ("gemma3_text", "gemma3", {**_GEMMA, "layer_types": [_F] * 6}, {"gemma3__attention__sliding_window": None}),
    "no window, but a pattern": ("gemma3_text", "gemma3", {**_GEMMA, "layer_types": [_F] * 6}, {"gemma3__attention__sliding_window": 0, "gemma3__attention__sliding_window_pattern": 3}),
    "pattern of Gemma 2": ("gemma2", "gemma2", {"num_hidden_layers": 3, "tie_word_embeddings": True, "layer_types": [_S, _S, _F], "sliding_window": 4}, {"gemma2__attention__sliding_window_pattern": 3}),
    "factors of 1": ("llama", "llama", {}, {"llama__expert_weights_scale": 1.0, "llama__attention__scale": 0.0, "llama__attention__causal": True, "llama__expert_gating_func": 1}),
    "base of sliding layers": ("gemma3_text", "gemma3", _GEMMA, {"gemma3__rope__freq_base_swa": 500.0}),
}  # fmt: skip


def imported(tmp_path: Path, kind: str, arch: str, changes: dict[str, Any], **said: Any) -> tuple[Any, ImportResult]:  # fmt: skip
    model = random_model(kind, **{**_OWN, **changes}).eval()
    path = gguf_kit.file_of(tmp_path / "m.gguf", model, arch, **said)
    return model, write_folder(path, tmp_path / "m", _FP32)


@pytest.mark.parametrize("name", SAME)
def test_the_model_is_what_the_metadata_says(tmp_path: Path, name: str) -> None:
    kind, arch, changes, said = SAME[name]
    original, result = imported(tmp_path, kind, arch, changes, **said)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    with torch.no_grad():
        expected, found = original(_IDS).logits, ours(_IDS).logits
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert result.notes == ()


def test_none_is_written_where_the_class_has_a_number(tmp_path: Path) -> None:
    kind, arch, changes, said = SAME["soft caps of 0"]
    imported(tmp_path, kind, arch, changes, **said)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert [config[f"{k}_logit_softcapping"] for k in ("attn", "final")] == [None, None]


def test_keys_that_nobody_read_are_named(tmp_path: Path) -> None:
    more = {"llama__pooling_type": 0, "llama__something": 3}
    _, result = imported(tmp_path, "llama", "llama", {"rope_parameters": _YARN}, **_SAID_YARN, **more)  # fmt: skip
    (note,) = result.notes
    assert note.endswith("left out: pooling_type, something")


WRONG: dict[str, tuple[dict[str, Any], type[LlmquantError], str]] = {
    "no heads": ({"llama__attention__head_count": 0}, CheckpointError, "llama.attention.head_count is 0, not a positive whole number"),
    "heads as text": ({"llama__attention__head_count": "x"}, CheckpointError, "head_count is 'x'"),
    "width as text": ({"llama__embedding_length": "x"}, CheckpointError, "embedding_length is 'x'"),
    "another width": ({"llama__embedding_length": 48}, CheckpointError, "token_embd.weight is [268, 32], the metadata makes it 48 wide"),
    "more layers than tensors": ({"llama__block_count": 4294967295}, CheckpointError, "more than any tensor of the file has"),
    "no context": ({"llama__context_length": None}, CheckpointError, "lacks metadata that a config needs: llama.context_length"),
    "no epsilon": ({"llama__attention__layer_norm_rms_epsilon": None}, CheckpointError, "lacks metadata that a config needs: llama.attention.layer_norm_rms_epsilon"),
    "negative epsilon": ({"llama__attention__layer_norm_rms_epsilon": -1.5}, CheckpointError, "is -1.5, not a positive number"),
    "base as a flag": ({"llama__rope__freq_base": True}, CheckpointError, "rope.freq_base is True"),
    "factor as text": ({"llama__rope__scaling__factor": "x"}, CheckpointError, "rope.scaling.factor is 'x'"),
    "list of ids": ({"tokenizer__ggml__eos_token_id": [1, 2]}, CheckpointError, "tokenizer.ggml.eos_token_id is [1, 2], not a whole number"),
    "half a head": ({"llama__attention__key_length": 8, "llama__rope__dimension_count": 4}, LayoutError, "rope.dimension_count is 4 of heads that are 8 wide"),
    "a scale": ({"llama__logit_scale": 0.25}, LayoutError, "llama.logit_scale is 0.25, which changes what the model computes"),
    "scale of attention": ({"llama__attention__scale": 1.0}, LayoutError, "llama.attention.scale is 1.0"),
    "scale of experts": ({"llama__expert_weights_scale": 2.5}, LayoutError, "llama.expert_weights_scale is 2.5"),
    "clamped": ({"llama__attention__clamp_kqv": 8.0}, LayoutError, "llama.attention.clamp_kqv is 8.0"),
    "a pattern": ({"llama__attention__sliding_window_pattern": [True, False]}, LayoutError, "sliding_window_pattern is [True, False]"),
    "not causal": ({"llama__attention__causal": False}, LayoutError, "llama.attention.causal is False"),
    "sigmoid experts": ({"llama__expert_gating_func": 2}, LayoutError, "llama.expert_gating_func is 2"),
    "attention factor": ({"llama__rope__scaling__attn_factor": 0.5}, LayoutError, "llama.rope.scaling.attn_factor is 0.5"),
    "YaRN's multiplier": ({**_SAID_YARN, "llama__rope__scaling__yarn_log_multiplier": 0.1}, LayoutError, "yarn_log_multiplier is 0.1"),
    "rules as a list": ({"tokenizer__ggml__pre": ["a"]}, CheckpointError, "tokenizer.ggml.pre is ['a'], not a text"),
    "template as a number": ({"tokenizer__chat_template": 1}, CheckpointError, "tokenizer.chat_template is 1, not a text"),
    "named template as a list": ({"tokenizer__chat_template__tool_use": ["a"]}, CheckpointError, "tokenizer.chat_template.tool_use is ['a'], not a text"),
    "flag as a text": ({"tokenizer__ggml__add_bos_token": "false"}, CheckpointError, "add_bos_token is 'false', not true or false"),
    "count of shards as a text": ({"split__count": "x"}, CheckpointError, "split.count is 'x', not a whole number"),
    "no alignment": ({"general__alignment": 24}, CheckpointError, "general.alignment is 24, not a power of two"),
    "temperature as a list": ({"general__sampling__temp": [1]}, CheckpointError, "general.sampling.temp is [1], not a number"),
    "other extrapolation": ({**_SAID_YARN, "llama__rope__scaling__yarn_ext_factor": 0.5}, LayoutError, "yarn_ext_factor is 0.5"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_metadata_that_makes_no_model(tmp_path: Path, name: str) -> None:
    said, error, message = WRONG[name]
    with pytest.raises(error) as told:
        imported(tmp_path, "llama", "llama", {}, **said)
    assert message in str(told.value)
    assert "m.gguf" in str(told.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]


SAMPLING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as it is": ({"temp": 0.6, "top_k": 20, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}),
    "the likeliest": ({"temp": 0.0, "top_k": 20}, {"do_sample": False}),
    "all tokens": ({"top_k": 0, "top_p": 2.0}, {"do_sample": True, "top_k": 0, "top_p": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLING)
def test_how_to_sample_is_what_transformers_takes(tmp_path: Path, name: str) -> None:
    said, expected = SAMPLING[name]
    imported(tmp_path, "llama", "llama", {}, **{f"general__sampling__{k}": v for k, v in said.items()})  # fmt: skip
    found = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert {k: v for k, v in found.items() if not k.endswith("_token_id")} == expected
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert model.generate(_IDS, max_new_tokens=2).shape[1] > _IDS.shape[1]


@pytest.mark.parametrize("pattern", [[True, False], "x", [1, 2, 1, 1, 1, 0], 2.0])
def test_a_pattern_that_fits_no_layers(tmp_path: Path, pattern: Any) -> None:
    with pytest.raises(CheckpointError, match="neither a number nor 0 or 1 for each of 6 layers"):
        imported(tmp_path, "gemma3_text", "gemma3", _GEMMA, gemma3__attention__sliding_window_pattern=pattern)  # fmt: skip


@pytest.mark.parametrize("scaled", [False, True], ids=["alone", "beside linear scaling"])
def test_frequencies_divided_by_1_are_not_scaled(tmp_path: Path, scaled: bool) -> None:
    changes = _LINEAR if scaled else {}
    original = random_model("llama", **{**_OWN, **changes}).eval()
    said = {**gguf_kit.metadata(original, "llama"), **gguf_kit.tokenizer()}
    said |= {"llama.rope.scaling.factor": 4.0} if scaled else {}
    stored = {**gguf_kit.tensors(original, "llama"), "rope_freqs.weight": np.ones(4, np.float32)}
    write_folder(gguf_kit.write(tmp_path / "m.gguf", stored, said, "llama"), tmp_path / "m", _FP32)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    with torch.no_grad():
        expected, found = original(_IDS).logits, ours(_IDS).logits
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_a_config_that_cannot_run_is_found(tmp_path: Path) -> None:
    """A Gemma whose sliding layers have no window can be built, and fails at its first token."""
    with pytest.raises(LayoutError, match="makes a gemma2 model that does not run"):
        imported(tmp_path, "gemma2", "gemma2", {"tie_word_embeddings": True}, gemma2__attention__sliding_window=0)  # fmt: skip


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_a_transposed_matrix_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, packed: bool
) -> None:
    monkeypatch.setitem(CONFIGS, "gpt2", GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64))
    model = random_model(arch, **{**_OWN, **({"tie_word_embeddings": True} if arch == "gpt2" else {})})  # fmt: skip
    stored = gguf_kit.tensors(model, arch)
    stored["blk.0.ffn_up.weight"] = np.ascontiguousarray(stored["blk.0.ffn_up.weight"].T)
    said = {**gguf_kit.metadata(model, arch), **gguf_kit.tokenizer()}
    path = gguf_kit.write(tmp_path / "m.gguf", stored, said, arch, "Q8_0")
    with pytest.raises(LlmquantError, match="blk.0.ffn_up.weight is" if not packed or arch == "llama" else "Conv1D"):  # fmt: skip
        import_gguf(path, tmp_path / "m", ImportOptions(packed=packed))
    assert not (tmp_path / "m").exists()


def header(*pairs: bytes) -> bytes:
    """A file of metadata alone."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


_LIST = struct.pack("<IQ", 9, 1)  # of one element, whose type follows
DAMAGED = {
    "lists in lists": (header(text("a") + struct.pack("<I", 9) + _LIST * 5000), "a list of lists in its metadata"),
    "a key twice": (header(*[text("a") + struct.pack("<IB", 7, 1)] * 2), "it says a twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_header(tmp_path: Path, name: str) -> None:
    raw, message = DAMAGED[name]
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        write_folder(tmp_path / "m.gguf", tmp_path / "m")


@pytest.mark.parametrize("moved", [-32, 8, 32])
def test_a_damaged_offset(tmp_path: Path, moved: int) -> None:
    """Other numbers of the right size would be read there."""
    path = gguf_kit.file_of(tmp_path / "m.gguf", random_model("llama", **_OWN), "llama", "Q8_0")
    raw, name = bytearray(path.read_bytes()), b"blk.0.attn_k.weight"
    at = raw.index(name) + len(name) + 4 + 2 * 8 + 4  # behind dimensions, two sizes and the type
    (offset,) = struct.unpack_from("<Q", raw, at)
    struct.pack_into("<Q", raw, at, offset + moved)
    path.write_bytes(raw)
    with pytest.raises(
        CheckpointError, match=r"is damaged: blk\.0\.attn_\w+\.weight begins at byte"
    ):
        write_folder(path, tmp_path / "m")
