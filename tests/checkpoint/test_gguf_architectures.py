"""Every architecture that is imported from GGUF computes what the original model computes, and,
where transformers reads the file itself, what it computes there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf_kit
import pytest
import torch
from tiny_models import CONFIGS, random_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    Qwen2MoeConfig,
    StableLmConfig,
)

from llmquant.checkpoint.gguf.config import MODEL_TYPES
from llmquant.checkpoint.gguf.folder import FolderOptions, write_folder
from llmquant.models.reading.check import check_loading

_OWN = {"vocab_size": gguf_kit.VOCAB, "bos_token_id": None, "eos_token_id": gguf_kit.EOS, "pad_token_id": None}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
_SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2}  # fmt: skip

# name: tiny model's kind, llama.cpp's architecture, changes of its config, what transformers'
# own loader cannot read or reads otherwise
CASES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama": ("llama", "llama", {}, ""),
    "llama tied": ("llama", "llama", {"tie_word_embeddings": True}, ""),
    "llama with biases": ("llama", "llama", {"attention_bias": True, "mlp_bias": True}, "drops biases"),
    "llama linear scaling": ("llama", "llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "drops scaling"),
    "llama 3 scaling": ("llama", "llama", {"rope_parameters": _LLAMA3}, "drops scaling"),
    "mistral": ("mistral", "llama", {"sliding_window": None}, ""),
    "qwen2": ("qwen2", "qwen2", {}, ""),
    "qwen3": ("qwen3", "qwen3", {}, "takes the default head_dim"),
    "gemma2": ("gemma2", "gemma2", {"tie_word_embeddings": True, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}, "takes the default scale"),
    "gemma3": ("gemma3_text", "gemma3", {"tie_word_embeddings": True, "layer_types": ["sliding_attention"] * 2}, "takes the default scale"),
    "phi3": ("phi3", "phi3", {}, ""),
    "starcoder2": ("starcoder2", "starcoder2", {"sliding_window": None, "tie_word_embeddings": True}, "takes the default theta"),
    "stablelm": ("stablelm", "stablelm", {}, "takes the default theta"),
    "gpt2": ("gpt2", "gpt2", {"tie_word_embeddings": True}, "in another order of sums"),
    "gpt2 of another width": ("gpt2", "gpt2", {"tie_word_embeddings": True, "n_inner": 80}, "takes the default width"),
    "mixtral": ("mixtral", "llama", {}, "knows no mixture"),
    "qwen3moe": ("qwen3_moe", "qwen3moe", {"norm_topk_prob": True}, "takes the default width"),
    "qwen2moe": ("qwen2_moe", "qwen2moe", {}, "takes the default width"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _more_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {**_SMALL, "vocab_size": 64, "num_key_value_heads": 4, "intermediate_size": 48}
    monkeypatch.setitem(CONFIGS, "stablelm", StableLmConfig(**base, rope_theta=500.0))
    monkeypatch.setitem(CONFIGS, "gpt2", GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2))  # fmt: skip
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}  # fmt: skip
    monkeypatch.setitem(CONFIGS, "qwen2_moe", Qwen2MoeConfig(**base, **moe))


def extra(name: str) -> dict[str, Any]:
    match name:
        case "llama linear scaling":
            return {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 2.0}
        case "gpt2 of another width":
            return {"gpt2__feed_forward_length": 80}
    return {}


@pytest.mark.parametrize("name", CASES)
def test_the_original_model_comes_back(tmp_path: Path, name: str) -> None:
    kind, arch, changes, _ = CASES[name]
    original = random_model(kind, **{**_OWN, **changes})
    for parameter in original.parameters():
        if parameter.ndim == 1:  # norms and biases are not all ones and zeros
            torch.nn.init.normal_(parameter, 0.5, 0.2)
    stored = gguf_kit.tensors(original, arch)
    if name == "llama 3 scaling":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](original.config, "cpu")
        plain = 1.0 / 10000.0 ** (torch.arange(0, 8, 2) / 8)
        stored["rope_freqs.weight"] = (plain / scaled).numpy()
    said = {**gguf_kit.metadata(original, arch), **gguf_kit.tokenizer()}
    said |= {k.replace("__", "."): v for k, v in extra(name).items()}
    path = gguf_kit.write(tmp_path / "m.gguf", stored, said, arch)
    write_folder(path, tmp_path / "m", FolderOptions(dtype="float32"))
    check_loading(tmp_path / "m")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    ids = torch.tensor([[5, 70, 200, 33, 9, 41, 41, 7, 100, 3, 250, 64]])
    with torch.no_grad():
        expected, found = original.eval()(ids).logits, ours.eval()(ids).logits
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("name", [n for n, (*_, why) in CASES.items() if not why])
def test_transformers_reads_the_same(tmp_path: Path, name: str) -> None:
    kind, arch, changes, _ = CASES[name]
    original = random_model(kind, **{**_OWN, **changes})
    path = gguf_kit.file_of(tmp_path / "m.gguf", original, arch, "Q8_0")
    write_folder(path, tmp_path / "m", FolderOptions(dtype="float32"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, expected[key]), key
    ids = torch.tensor([[5, 70, 200, 33, 9, 41]])
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    said = json.loads((tmp_path / "m" / "config.json").read_text())
    assert said["eos_token_id"] == gguf_kit.EOS
    assert AutoConfig.from_pretrained(tmp_path / "m").model_type == theirs.config.model_type


def test_every_architecture_has_a_case() -> None:
    assert {arch for _, arch, _, _ in CASES.values()} == set(MODEL_TYPES)
