"""Quantized folders with something beside the packed weights, or a label that does not fit: load,
convert, inspect and quantize say the same of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Run
from folder_kit import (
    EMBEDDINGS,
    HEAD,
    NORM,
    RTN,
    SINGLE,
    Case,
    Q,
    configure,
    put,
    unprefixed,
    write_case,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, OpenAIGPTConfig

from llmquant import load
from llmquant.errors import LlmquantError
from llmquant.models.rows.table import ARCHITECTURES

ATTENTION = "model.layers.0.self_attn"
ONES = torch.ones(1)
Tensors = dict[str, torch.Tensor]
KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def logits(folder: Path) -> torch.Tensor | None:
    try:
        model = load(folder, dtype="float32", kernel="reference")
    except LlmquantError:
        return None
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(8).unsqueeze(0)).logits
    return result


@pytest.fixture
def packed(tmp_path: Path, run: Run) -> Callable[..., tuple[Path, Tensors]]:
    """A quantized folder in some layout, and its tensors."""

    def make(layout: str = "compressed-tensors", **config: Any) -> tuple[Path, Tensors]:
        source = write_case(Case("", lambda f, t: None, config=config), tmp_path / "m")
        out = tmp_path / "q"
        assert run("quantize", source, "-o", out, *RTN, "--format", layout).code == 0
        for name in ("manifest.json", "README.md", "recipe.yaml"):  # as of another tool
            (out / name).unlink()
        return out, load_file(out / SINGLE)

    return make


def biases(tensors: Tensors, value: float) -> Tensors:
    """A bias for every packed linear, as AutoGPTQ writes it."""
    return {
        n.replace("qweight", "bias"): torch.full((t.shape[1],), value)
        for n, t in tensors.items()
        if n.endswith("qweight")
    }


BESIDE = {
    "zero biases": ("gptq", lambda t: biases(t, 0.0), "all zero"),
    "biases": ("gptq", lambda t: biases(t, 1.0), "not zero"),
    "KV-cache scales": ("compressed-tensors", lambda t: {f"{ATTENTION}.k_scale": ONES, f"{ATTENTION}.v_scale": ONES}, "KV cache"),
    "mtp": ("compressed-tensors", lambda t: {"mtp.fc.weight": torch.ones(32, 64)}, "mtp.fc.weight"),
    "an extra layer": ("awq", lambda t: {"model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)}, "layers.2"),
    "value head": ("gptq_v2", lambda t: {"v_head.weight": torch.ones(1, 32)}, "v_head.weight"),
    "rotary tables": ("gptq", lambda t: {f"{ATTENTION}.rotary_emb.inv_freq": ONES}, ""),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "more", "says"), BESIDE.values(), ids=list(BESIDE))
def test_what_lies_beside_packed_weights_is_kept_and_named(
    layout: str,
    more: Callable[[Tensors], Tensors],
    says: str,
    packed: Callable[..., tuple[Path, Tensors]],
    tmp_path: Path,
    run: Run,
) -> None:
    folder, tensors = packed(layout)
    before, beside = logits(folder), more(tensors)
    put(folder, {**tensors, **beside})
    after = logits(folder)
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)
    inspected = run("inspect", folder)
    assert (inspected.code, says in " ".join(inspected.out.split())) == (0, True)
    for target in ("compressed-tensors", "dense"):
        out = tmp_path / target
        converted = run("convert", folder, "--to", target, "-o", out)
        assert (converted.code, says in converted.err + converted.out) == (0, True), converted
        kept = load_file(out / SINGLE)
        assert all(torch.equal(kept[n], t) for n, t in beside.items())
        assert run("inspect", out, "--verify").code == 0
        made = logits(out)
        assert made is not None
        assert torch.allclose(made, before, atol=1e-4)


def test_a_kv_cache_scheme_is_kept_where_the_layout_can_say_it(
    packed: Callable[..., tuple[Path, Tensors]], tmp_path: Path, run: Run
) -> None:
    folder, tensors = packed()
    put(folder, {**tensors, f"{ATTENTION}.k_scale": ONES, f"{ATTENTION}.v_scale": ONES})
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    configure(folder, quantization_config={**config, "kv_cache_scheme": KV})
    assert run("inspect", folder).code == 0
    assert logits(folder) is not None
    out = tmp_path / "ct"
    assert run("convert", folder, "--to", "compressed-tensors", "-o", out).code == 0
    assert (
        json.loads((out / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
        == KV
    )
    assert f"{ATTENTION}.k_scale" in load_file(out / SINGLE)
    for target in ("gptq", "awq", "dense", "gguf"):
        ran = run("convert", folder, "--to", target, "-o", tmp_path / target)
        assert (ran.code, "kv_cache_scheme" in ran.err, (tmp_path / target).exists()) == (
            2,
            True,
            False,
        )


REFUSED = {
    "a norm lost": (lambda t: t.pop(NORM), {}, f"lacks {NORM}"),
    "a scale lost": (lambda t: t.pop(f"{Q}.weight_scale"), {}, "weight_scale"),
    "a linear lost": (lambda t: [t.pop(n) for n in list(t) if n.startswith(f"{Q}.")], {}, f"lacks {Q}.weight"),
    "packed and dense": (lambda t: t.update({f"{Q}.weight": torch.ones(32, 32)}), {}, "remove one"),
    "another width": (lambda t: None, {"intermediate_size": 64}, "the config wants [32, 64]"),
    "fewer layers, packed": (lambda t: None, {"num_hidden_layers": 1}, "does not have"),
    "more layers": (lambda t: None, {"num_hidden_layers": 3}, "lacks model.layers.2"),
    "no label": (lambda t: None, {"quantization_config": None}, "no quantization_config that says which"),
    "an empty label": (lambda t: None, {"quantization_config": {}}, "no quantization_config that says which"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "config", "words"), REFUSED.values(), ids=list(REFUSED))
def test_what_does_not_load_is_not_inspected_or_converted(
    change: Callable[[Tensors], object],
    config: Mapping[str, object],
    words: str,
    packed: Callable[..., tuple[Path, Tensors]],
    tmp_path: Path,
    run: Run,
) -> None:
    folder, tensors = packed()
    change(tensors)
    put(folder, tensors)
    configure(folder, **config)
    assert logits(folder) is None
    for command in (("inspect", folder), ("convert", folder, "--to", "gptq", "-o", tmp_path / "o")):
        ran = run(*command)
        assert (ran.code, words in ran.err) == (1, True), ran
    assert not (tmp_path / "o").exists()


def test_packed_weights_without_the_prefix(
    packed: Callable[..., tuple[Path, Tensors]], tmp_path: Path, run: Run
) -> None:
    folder, tensors = packed("gptq")
    before = logits(folder)
    put(folder, unprefixed(tensors))
    after = logits(folder)
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)
    out = tmp_path / "c"
    assert run("convert", folder, "--to", "compressed-tensors", "-o", out).code == 0
    made = logits(out)
    assert made is not None
    assert torch.allclose(made, before, atol=1e-4)


def test_a_packed_folder_of_a_tied_model_that_stores_the_head_alone(
    packed: Callable[..., tuple[Path, Tensors]], run: Run
) -> None:
    folder, tensors = packed(tie_word_embeddings=True)
    before = logits(folder)
    put(folder, {n.replace(EMBEDDINGS, HEAD): t for n, t in tensors.items()})
    after = logits(folder)
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)
    assert run("inspect", folder).code == 0


def test_what_no_reader_takes_is_not_written(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(ARCHITECTURES, "openai-gpt")  # which says that its matrices are transposed
    config = OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "m")
    for command in (
        ("quantize", tmp_path / "m", "-o", tmp_path / "q", *RTN),
        ("plan", tmp_path / "m", *RTN),
    ):
        ran = run(*command)
        assert (ran.code, "Conv1D" in ran.err) == (2, True), ran
    assert not (tmp_path / "q").exists()
    assert logits(tmp_path / "m") is not None
    assert run("inspect", tmp_path / "m").code == 0


LAYOUTS: dict[str, tuple[str, dict[str, object], str]] = {
    "AWQ for another kernel": ("awq", {"version": "gemv"}, "uses another packing"),
    "AWQ of 3 bits": ("awq", {"bits": 3}, "is not one llmquant reads"),
    "GPTQ of floats": ("gptq", {"bits": 4, "data_type": "fp"}, "cannot read fp weights"),
    "AutoRound's own": ("gptq", {"quant_method": "auto-round", "packing_format": "x"}, "is not one llmquant reads"),
    "HQQ": ("gptq", {"quant_method": "hqq"}, "is not one llmquant reads"),
    "AutoRound's activations": ("gptq", {"quant_method": "auto-round", "act_bits": 8}, "are not something llmquant"),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "change", "words"), LAYOUTS.values(), ids=list(LAYOUTS))
def test_a_layout_that_nobody_reads_here_asks_for_another_folder(
    layout: str,
    change: dict[str, object],
    words: str,
    packed: Callable[..., tuple[Path, Tensors]],
    tmp_path: Path,
    run: Run,
) -> None:
    folder, _ = packed(layout)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    configure(folder, quantization_config={**config, **change})
    for command in (
        ("convert", folder, "--to", "dense", "-o", tmp_path / "c"),
        ("inspect", folder),
    ):
        ran = run(*command)
        assert (ran.code, words in ran.err) == (2, True), ran
        assert ran.said.count(str(folder)) == 1, ran
    assert not (tmp_path / "c").exists()
