"""Packed embeddings serve a tied head under whatever name the checkpoint has for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_model, save
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

import llmquant
import llmquant.models.load as loading
from llmquant.conversion import ConvertOptions, convert
from llmquant.errors import ProofError
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe

IDS = torch.tensor([[7, 30, 63, 0, 12], [5, 5, 41, 16, 15]])
_TEXT: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "sliding_window": 8, "query_pre_attn_scalar": 16, "initializer_range": 0.06}  # fmt: skip
_EYE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip


def _neox(folder: Path) -> Path:
    return save("gpt_neox", folder, hidden_size=64, tie_word_embeddings=True)


def _gemma(folder: Path) -> Path:
    config = CONFIG_MAPPING["gemma3"](text_config=_TEXT, vision_config=_EYE, mm_tokens_per_image=4, image_token_index=63)  # fmt: skip
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


# The folder's maker, and the head's name there.
KINDS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "gpt_neox": (_neox, "embed_out"),
    "gemma3": (_gemma, "language_model.lm_head"),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_what_loads_computes_what_a_dense_copy_does(
    kind: str, bits: int, rtn: Recipe, tmp_path: Path
) -> None:
    make, head = KINDS[kind]
    source = make(tmp_path / "source")
    out = quantize(source, tmp_path / "out", rtn.updated({"embeddings": {"bits": bits}})).path
    convert(out, "dense", tmp_path / "dense", ConvertOptions(dtype="float32"))
    ours = llmquant.load(out, dtype="float32", kernel="reference")
    dense = llmquant.load(tmp_path / "dense", dtype="float32")
    assert ours.get_submodule(head) is ours.get_output_embeddings()
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)


def test_transformers_with_our_quantizer_loads_the_same(rtn: Recipe, tmp_path: Path) -> None:
    recipe = rtn.updated({"embeddings": {"bits": 8}})
    out = quantize(_neox(tmp_path / "source"), tmp_path / "out", recipe).path
    llmquant.register_with_transformers(kernel="reference")
    try:
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    finally:
        llmquant.unregister_from_transformers()
    ours = llmquant.load(out, dtype="float32", kernel="reference")
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, ours(IDS).logits)


def test_the_proof_finds_a_head_without_values(
    rtn: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader that puts the head where transformers' own setter does leaves the real one empty."""

    def beside(model: PreTrainedModel, module: Any) -> None:
        model.set_output_embeddings(module)

    monkeypatch.setattr(loading, "put_head", beside)
    recipe = rtn.updated({"embeddings": {"bits": 8}})
    with pytest.raises(ProofError, match=r"leaves embed_out\.weight of GPTNeoX"):
        quantize(_neox(tmp_path / "source"), tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_a_halved_head_is_the_head(rtn: Recipe, tmp_path: Path) -> None:
    model = random_model("gpt_neox", hidden_size=64)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    out = quantize(tmp_path / "source", tmp_path / "out", rtn).path
    loaded = llmquant.load(out, dtype="float32")
    heads = [n for n, _ in loaded.named_modules() if n in ("lm_head", "embed_out")]
    assert (heads, loaded.get_submodule("embed_out")) == (["embed_out"], loaded.get_output_embeddings())  # fmt: skip
