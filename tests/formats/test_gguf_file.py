"""A whole GGUF file: transformers reads the same weights, logits and token ids out of it; what does
not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import llmquant
from llmquant.conversion.gguf.file import export_gguf, read_weights
from llmquant.conversion.gguf.metadata import read_tokenizer, rope_factors
from llmquant.errors import (
    CheckpointError,
    FormatError,
    LayoutError,
    LlmquantError,
    ProofError,
    UsageError,
)
from llmquant.recipe import Recipe

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
GOLDEN = Path(__file__).parent.parent / "golden"


def quantized(folder: Path, bits: int, group_size: int, symmetric: bool) -> Path:
    weights = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    llmquant.quantize(
        TINY,
        folder,
        Recipe.model_validate({"method": "rtn", "weights": weights, "scales": {"steps": 0}}),
    )
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("tiny") / "w4", 4, 32, True)


@pytest.fixture(scope="module")
def written(packed: Path) -> Path:
    return export_gguf(packed, packed.parent / "tiny.gguf").path


def test_transformers_reads_the_same_model(packed: Path, written: Path) -> None:
    ours = llmquant.load(packed, dtype="float32", kernel="reference")
    theirs = AutoModelForCausalLM.from_pretrained(
        written.parent, gguf_file=written.name, dtype=torch.float32
    )
    ids = torch.tensor(
        [
            AutoTokenizer.from_pretrained(packed)("The quick brown fox jumps over the lazy dog")[
                "input_ids"
            ]
        ]
    )
    with torch.no_grad():
        a, b = ours(ids).logits, theirs(ids).logits
    for name, module in ours.named_modules():
        if type(module).__name__ == "PackedLinear":
            assert torch.equal(
                module.dequantize(torch.float32), theirs.get_submodule(name).weight
            ), name
    assert (a - b).abs().max() <= 1e-4 * b.abs().max()  # the same weights, in other matrix products


def test_transformers_reads_the_same_tokenizer(packed: Path, written: Path) -> None:
    ours = AutoTokenizer.from_pretrained(packed)
    theirs = AutoTokenizer.from_pretrained(written.parent, gguf_file=written.name)
    text = (TINY / "heldout.txt").read_text()[:4000] + " 12345 don't \n\n  naïve 東京 <|eot_id|>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_what_the_header_says(written: Path) -> None:
    fields = gguf.GGUFReader(written).fields
    value = {k: f.contents() for k, f in fields.items()}
    config = json.loads((TINY / "config.json").read_text())
    assert value["general.architecture"] == "llama"
    assert value["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert value["llama.block_count"] == config["num_hidden_layers"]
    assert value["llama.attention.head_count_kv"] == config["num_key_value_heads"]
    assert value["llama.vocab_size"] == config["vocab_size"] == len(value["tokenizer.ggml.tokens"])
    assert value["tokenizer.ggml.pre"] == "smaug-bpe"
    assert (value["tokenizer.ggml.bos_token_id"], value["tokenizer.ggml.add_bos_token"]) == (
        0,
        True,
    )
    assert value["tokenizer.chat_template"] == (TINY / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "kinds"),
    [(4, 128, False, {"Q4_1", "Q8_0"}), (8, -1, True, {"Q8_0"}), (3, 64, True, {"Q4_0"})],
    ids=["asym", "8 bits", "3 bits"],
)
def test_types(
    tmp_path: Path, bits: int, group_size: int, symmetric: bool, kinds: set[str]
) -> None:
    folder = quantized(tmp_path / "q", bits, group_size, symmetric)
    result = export_gguf(folder, tmp_path / "m.gguf")
    linears = {n: k for n, k in result.types.items() if k.startswith("Q")}
    assert len(linears) == 42
    assert set(linears.values()) <= kinds
    assert result.nbytes == result.path.stat().st_size
    weights = dict(read_weights(result.path))
    assert weights.keys() == linears.keys()
    reader = llmquant.load(folder, dtype="float32", kernel="reference")
    down = reader.get_submodule("model.layers.3.mlp.down_proj").dequantize(torch.float32)
    assert torch.equal(weights["blk.3.ffn_down.weight"].dequantize(), down)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("gptqmodel-w4-v2-desc_act-asym", "no g_idx"),
        ("llmcompressor-w8a8", "quantized activations"),
        ("autoround-auto_round-model-free-asym", "tokenizer.json is missing"),
    ],
    ids=["g_idx", "activations", "tokenizer"],
)
def test_refusals(tmp_path: Path, folder: str, message: str) -> None:
    """Golden folders come without a tokenizer; they get tiny-llama's, but for the last."""
    shutil.copytree(GOLDEN / folder, tmp_path / "m")
    if "tokenizer" not in message:
        shutil.copy(TINY / "tokenizer.json", tmp_path / "m")
    with pytest.raises(llmquant.errors.LlmquantError, match=message):
        export_gguf(tmp_path / "m", tmp_path / "m.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def edited(packed: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a folder with other tensors."""
    shutil.copytree(packed, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def relabelled(folder: Path, **labels: object) -> Path:
    """With other words in the quantization's config, and without the record of the run."""
    for name in ("config.json", "quantize_config.json"):
        if not (folder / name).exists():
            continue
        config = json.loads((folder / name).read_text())
        config.get("quantization_config", config).update(labels)
        (folder / name).write_text(json.dumps(config))
    (folder / "manifest.json").unlink()
    return folder


def test_what_other_conversions_refuse_is_refused(packed: Path, tmp_path: Path) -> None:
    """Numbers that the manifest does not know, and zero-points that are off by one."""
    word = "model.layers.0.mlp.up_proj.weight_packed"
    damaged = edited(packed, tmp_path / "damaged", lambda t: t[word][0].add_(1))
    with pytest.raises(ProofError, match=r"not hold the numbers that manifest\.json records"):
        export_gguf(damaged, tmp_path / "m.gguf")
    norm = edited(packed, tmp_path / "norm", lambda t: t["model.norm.weight"].mul_(2))
    with pytest.raises(ProofError, match=r"not the file that was written"):
        export_gguf(norm, tmp_path / "m.gguf")
    asymmetric = {"bits": 4, "group_size": 32, "symmetric": False}
    recipe = {"method": "rtn", "format": "gptq_v2", "weights": asymmetric, "scales": {"steps": 0}}
    llmquant.quantize(TINY, tmp_path / "v2", Recipe.model_validate(recipe))
    relabelled(tmp_path / "v2", checkpoint_format="gptq")
    with pytest.raises(FormatError, match="so the label is wrong"):
        export_gguf(tmp_path / "v2", tmp_path / "m.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged", "norm", "v2"]


def test_a_dense_copy_that_was_changed_is_refused(packed: Path, tmp_path: Path) -> None:
    llmquant.convert(packed, "dense", tmp_path / "dense")
    export_gguf(tmp_path / "dense", tmp_path / "whole.gguf")
    change = edited(tmp_path / "dense", tmp_path / "a", lambda t: t["model.norm.weight"].mul_(2))
    with pytest.raises(ProofError, match=r"not the file that was written"):
        export_gguf(change, tmp_path / "m.gguf")


def test_what_a_file_has_no_place_for_is_refused(packed: Path, tmp_path: Path) -> None:
    """How engines round keys and values, and a norm in 64 bits."""
    shutil.copytree(packed, tmp_path / "kv")
    relabelled(tmp_path / "kv", kv_cache_scheme={"num_bits": 8, "type": "float"})
    with pytest.raises(LayoutError, match="kv_cache_scheme changes what engines compute"):
        export_gguf(tmp_path / "kv", tmp_path / "m.gguf")
    norm = "model.norm.weight"
    wide = edited(packed, tmp_path / "wide", lambda t: t.update({norm: t[norm].double() + 1e-12}))
    relabelled(wide)
    with pytest.raises(LayoutError, match=r"is torch\.float64, which is not a weight GGUF holds"):
        export_gguf(wide, tmp_path / "m.gguf")


def test_numbers_that_no_type_holds_want_another_layout(tmp_path: Path) -> None:
    """Eight bits with zero-points: steps from -190 to 178."""
    folder = quantized(tmp_path / "q", 8, 32, False)
    with pytest.raises(LayoutError, match=r"Q8_0 holds -128 … 127 steps of a scale"):
        export_gguf(folder, tmp_path / "m.gguf")


def test_a_g_idx_that_says_nothing_is_none(packed: Path, written: Path, tmp_path: Path) -> None:
    """desc_act with one group a row, or with groups in their order."""
    llmquant.convert(packed, "gptq", tmp_path / "gptq")
    relabelled(tmp_path / "gptq", desc_act=True)
    result = export_gguf(tmp_path / "gptq", tmp_path / "m.gguf")
    same = dict(read_weights(written))
    found = dict(read_weights(result.path))
    assert found.keys() == same.keys()
    assert all(torch.equal(found[n].dequantize(), w.dequantize()) for n, w in same.items())


def test_an_existing_file_is_kept(packed: Path, written: Path) -> None:
    before = written.read_bytes()
    with pytest.raises(UsageError, match="exists"):
        export_gguf(packed, written)
    assert written.read_bytes() == before
    assert export_gguf(packed, written, overwrite=True).path.read_bytes() == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_no_file(packed: Path, tmp_path: Path, overwrite: bool) -> None:
    """Said before the work, and not by the operating system after it."""
    with pytest.raises(UsageError, match=r"is a folder; name a file in it, such as .*model\.gguf"):
        export_gguf(packed, tmp_path, overwrite=overwrite)
    assert not list(tmp_path.iterdir())


def test_a_file_of_the_model_is_not_replaced(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "m"))
    (tmp_path / "link.gguf").symlink_to(folder / "model.safetensors")
    for name in ("m/model.safetensors", "m/tokenizer.json", "link.gguf"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(UsageError, match="belongs to the model"):
            export_gguf(folder, tmp_path / name, overwrite=True)
        assert (tmp_path / name).read_bytes() == before


def test_a_scale_that_is_no_number_is_named(written: Path, tmp_path: Path) -> None:
    tensor = next(t for t in gguf.GGUFReader(written).tensors if t.tensor_type.name == "Q4_0")
    raw = bytearray(written.read_bytes())
    raw[tensor.data_offset : tensor.data_offset + 2] = b"\x00\x7e"
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"m.gguf is damaged: {tensor.name} holds numbers"):
        list(read_weights(tmp_path / "m.gguf"))


def test_no_gguf_file_is_refused() -> None:
    with pytest.raises(FormatError, match="cannot be read as GGUF"):
        list(read_weights(TINY / "config.json"))


ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_llama3_frequencies_are_transformers_own() -> None:
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, rope_parameters={**ROPE, "rope_theta": 500000.0}
    )
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    factors = rope_factors(ROPE, 500000.0, 128)
    assert factors is not None
    assert {float(f) for f in factors} >= {1.0, 8.0}
    plain = 1.0 / 500000.0 ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128)
    torch.testing.assert_close(plain / factors, theirs, rtol=1e-6, atol=0)


def test_rotary_factors_are_written(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "m")
    config = json.loads((packed / "config.json").read_text())
    config["rope_parameters"] = {
        **ROPE,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 256,
    }
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    path = export_gguf(tmp_path / "m", tmp_path / "m.gguf").path
    (stored,) = [t.data for t in gguf.GGUFReader(path).tensors if t.name == "rope_freqs.weight"]
    assert torch.equal(
        torch.from_numpy(stored.copy()), rope_factors(config["rope_parameters"], 10000.0, 64)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3"}, "qwen3 models cannot"),
        ({"sliding_window": 4096}, "sliding window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn'"),
        ({"num_hidden_layers": None}, "lacks what a GGUF"),
        ({"vocab_size": 100}, r"is \[4096, 256\], the config wants \[100, 256\]"),
    ],
    ids=["architecture", "window", "rotary", "layers", "vocabulary"],
)
def test_models_that_are_refused(
    packed: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    shutil.copytree(packed, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(
        json.dumps({**json.loads((packed / "config.json").read_text()), **change})
    )
    with pytest.raises(LlmquantError, match=message):
        export_gguf(tmp_path / "m", tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"].update(byte_fallback=True), "byte-level BPE"),
        (lambda t: t.update(normalizer={"type": "NFC"}), "byte-level BPE"),
        (
            lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="x"),
            "rules that llama.cpp does not have",
        ),
        (
            lambda t: t.update(pre_tokenizer={"type": "Whitespace"}),
            "rules that llama.cpp does not have",
        ),
    ],
    ids=["sentencepiece", "normalizer", "expression", "other splitter"],
)
def test_tokenizers_that_are_refused(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    data = json.loads((TINY / "tokenizer.json").read_text())
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(FormatError, match=message):
        read_tokenizer(tmp_path)
