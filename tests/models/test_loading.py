"""load: the packed model is the dense model with its weights rounded, and every folder that is not
right says so."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from packing import TINY, pack_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from llmquant.checkpoint.hub import resolve
from llmquant.errors import ArchitectureError, CheckpointError, FormatError, UsageError
from llmquant.kernels.int4 import cpu_layout
from llmquant.kernels.packed_linear import PackedLinear, describe
from llmquant.models.load import load
from llmquant.runtime.devices import parse_dtype
from llmquant.spec import QuantSpec

BF16 = torch.bfloat16
GOLDEN = Path(__file__).parents[1] / "golden"
needs_int4 = pytest.mark.skipif(
    cpu_layout.block_rows() is None, reason="torch's int4 layout is not known on this CPU"
)
IDS = torch.randint(6, 4096, (2, 48), generator=torch.Generator().manual_seed(0))
Q_PROJ = "model.layers.2.self_attn.q_proj"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "tiny-w4"
    return folder, pack_folder(TINY, folder, QuantSpec(4, 128, False))


def dense_twin(weights, dtype):
    """tiny-llama as transformers loads it, its linears holding the dequantized numbers."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype).eval().requires_grad_(False)
    for name, weight in weights.items():
        model.get_submodule(name).weight.data = weight.dequantize(dtype)
    return model


def copy_of(folder: Path, tmp_path: Path, edit=None, config=None) -> Path:
    """A copy of a one-shard folder with edited tensors and config entries."""
    target = tmp_path / "copy"
    shutil.copytree(folder, target)
    if edit is not None:
        tensors = load_file(target / "model.safetensors")
        edit(tensors)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        path = target / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_reference_gives_the_logits_and_the_text_of_the_dense_twin(packed, dtype):
    folder, weights = packed
    model, twin = load(folder, dtype=dtype, kernel="reference"), dense_twin(weights, dtype)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(IDS).logits, twin(IDS).logits)
    text, expected = (
        m.generate(
            IDS[:1, :8],
            attention_mask=torch.ones_like(IDS[:1, :8]),
            max_new_tokens=32,
            do_sample=False,
            pad_token_id=5,
        )
        for m in (model, twin)
    )
    assert torch.equal(text, expected)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kernel", ["cpu", pytest.param("cpu_int4", marks=needs_int4)])
def test_packed_logits_are_as_near_the_exact_ones_as_a_dense_bf16_model(packed, rows, kernel):
    folder, weights = packed
    ids = IDS[:1, :12] if rows == 1 else IDS
    exact = dense_twin(weights, torch.float32)(ids).logits.log_softmax(-1)

    def error(model: nn.Module) -> float:
        return float((model(ids).logits.float().log_softmax(-1) - exact).square().mean().sqrt())

    model = load(folder, dtype=BF16, kernel=kernel)
    assert describe(model).kernels == {kernel: 42}
    # Both round every activation to bf16; measured ratio 0.80 to 1.04 over specs and lengths.
    assert error(model) <= 1.25 * error(dense_twin(weights, BF16))


@needs_int4
def test_generate_works_with_sampling_batches_and_cache(packed):
    model = load(packed[0], dtype=BF16)
    torch.manual_seed(0)
    out = model.generate(
        IDS[:, :8],
        attention_mask=torch.ones(2, 8, dtype=torch.long),
        max_new_tokens=8,
        do_sample=True,
    )
    assert out.shape[0] == 2
    assert 8 < out.shape[1] <= 16


def test_nothing_dense_is_left_in_memory(packed):
    folder, weights = packed
    model = load(folder, dtype=BF16)
    told = describe(model)
    elements = sum(w.codes.numel() for w in weights.values())
    assert told.packed_weights == elements
    # 4 bits, and per group of 128 a scale (2 bytes) and, where the grid is asymmetric, a zero-point
    # (1).
    assert (
        elements // 2 + elements // 128 * 2
        <= told.packed_bytes
        <= elements // 2 + elements // 128 * 3
    )
    kept = {n: t for n, t in model.named_parameters() if not n.endswith("_proj.weight")}
    assert set(kept) == set(dict(model.named_parameters()))
    rotary = sum(b.numel() * b.element_size() for n, b in model.named_buffers() if "inv_freq" in n)
    assert told.other_bytes == sum(t.numel() * 2 for t in kept.values()) + rotary
    assert not any(isinstance(m, nn.Linear) for n, m in model.named_modules() if n != "lm_head")


def test_tied_embeddings_stay_one_tensor_and_generation_config_is_read(packed):
    model = load(packed[0], dtype=BF16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    halved = load(packed[0], dtype=torch.float32)
    assert halved.lm_head.words is halved.model.embed_tokens.words
    assert describe(halved).other_bytes < 1.1 * describe(model).other_bytes
    assert (
        model.generation_config.eos_token_id
        == json.loads((TINY / "generation_config.json").read_text())["eos_token_id"]
    )
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", None),
        ("bf16", BF16),
        ("float16", torch.float16),
        (torch.float32, torch.float32),
    ],
    ids=str,
)
def test_dtype_is_as_asked_and_the_processors_by_default(packed, dtype, expected):
    # "auto" may be measured, and every process that collects this must give it the same name
    expected = expected or parse_dtype("auto").dtype
    for folder in (packed[0], TINY):
        model = load(folder, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {expected}
        assert model.config.dtype == expected
        assert model(IDS[:1, :4]).logits.dtype == expected


def test_an_unquantized_folder_is_what_transformers_loads():
    model = load(TINY, dtype="float16")
    expected = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float16)
    assert describe(model).kernels == {}
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize(
    "name",
    [
        "w4-sym",
        "w4-asym",
        "w4-channel",
        "w4-channel-asym",
        "w4-actorder-static",
        "w8-sym",
        "w8-asym",
    ],
)
def test_folders_of_llm_compressor_load_with_their_own_numbers(name):
    folder = GOLDEN / f"llmcompressor-{name}"
    model = load(folder, dtype="float16")
    with safe_open(folder / "expected.safetensors", framework="pt") as expected:
        linears = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
        assert {f"{n}.weight" for n in linears} == set(expected.keys())
        for module, linear in linears.items():
            assert torch.equal(
                linear.dequantize(torch.float16), expected.get_tensor(f"{module}.weight")
            )
    assert bool(torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all())


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (drop("model.norm.weight"), CheckpointError, r"lacks model\.norm\.weight"),
        (drop(f"{Q_PROJ}.weight_packed"), CheckpointError, rf"lacks {Q_PROJ}\.weight"),
        (drop(f"{Q_PROJ}.weight_scale"), FormatError, rf"{Q_PROJ}: weight_scale missing"),
        (
            put("model.norm.weight", torch.ones(2)),
            CheckpointError,
            r"norm\.weight is \[2\], the config wants \[256\]",
        ),
        (put(f"{Q_PROJ}.weight_shape", torch.tensor([256, 512])), FormatError, Q_PROJ),
    ],
    ids=["missing", "half packed", "no scale", "shape", "packed shape"],
)
def test_a_folder_that_does_not_fit_its_config_names_the_tensor(
    packed, tmp_path, edit, error, words
):
    with pytest.raises(error, match=words):
        load(copy_of(packed[0], tmp_path, edit))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (put("model.layers.9.x.weight", torch.ones(2)), r"layers\.9\.x\.weight: no place"),
        (put(f"{Q_PROJ}.bias", torch.ones(256)), rf"{Q_PROJ}\.bias: not zero"),
        (put(f"{Q_PROJ}.bias", torch.zeros(256)), rf"{Q_PROJ}\.bias: all zero"),
        (put("lm_head.weight", torch.ones(4096, 256)), r"ties lm_head\.weight .* the two differ"),
    ],
    ids=["extra", "bias", "zero bias", "untied"],
)
def test_what_transformers_leaves_out_is_left_out_aloud(packed, tmp_path, caplog, edit, words):
    with caplog.at_level(logging.WARNING, "llmquant.models.load"):
        load(copy_of(packed[0], tmp_path, edit))
    assert re.search(words, caplog.text)


def test_an_unquantized_folder_that_lacks_a_tensor_names_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"lacks model\.norm\.weight"):
        load(copy_of(TINY, tmp_path, drop("model.norm.weight")))


def test_a_packed_module_of_the_wrong_size_is_refused(packed, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"down_proj is \[256, 768\], the config wants \[256, 512\]"
    ):
        load(copy_of(packed[0], tmp_path, config={"intermediate_size": 512}))


def test_tables_that_the_model_computes_are_ignored_aloud(packed, tmp_path, caplog):
    folder = copy_of(
        packed[0], tmp_path, put("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(32))
    )
    with caplog.at_level(logging.INFO, "llmquant.models.tensor_check"):
        load(folder)
    assert "rotary_emb.inv_freq" in caplog.text


def test_a_stored_copy_of_a_tied_tensor_is_accepted(packed, tmp_path):
    def duplicate(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    model = load(copy_of(packed[0], tmp_path, duplicate), dtype=BF16)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"model_type": "never-heard-of"}, ArchitectureError, "never-heard-of"),
        ({"quantization_config": {"quant_method": "magic"}}, FormatError, "magic"),
        ({"model_type": "t5", "num_layers": 1}, ArchitectureError, "not a causal language model"),
    ],
    ids=["model type", "quant method", "no causal model"],
)
def test_a_config_that_cannot_be_loaded_says_why(packed, tmp_path, config, error, words):
    with pytest.raises(error, match=words):
        load(copy_of(packed[0], tmp_path, config=config))


def test_a_config_that_announces_what_is_not_there_is_refused(packed, tmp_path):
    announced = json.loads((packed[0] / "config.json").read_text())["quantization_config"]
    with pytest.raises(CheckpointError, match="no tensor is packed"):
        load(copy_of(TINY, tmp_path, config={"quantization_config": announced}))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": "int8"}, "choose auto, bfloat16"),
        ({"dtype": torch.int8}, "not a floating-point type"),
        ({"device": "abacus"}, "device abacus"),
        ({"kernel": "fast"}, "kernel 'fast' does not exist"),
        ({"kernel": "cpu_int4", "dtype": "float32"}, r"q_proj|k_proj|down_proj"),
    ],
    ids=["dtype name", "dtype", "device", "kernel", "kernel refuses"],
)
def test_arguments_that_cannot_be_are_usage_errors(packed, arguments, words):
    with pytest.raises(UsageError, match=words):
        load(packed[0], **arguments)


def test_resolve_takes_a_folder_first_then_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve(tmp_path) == tmp_path
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(UsageError, match="is a file"):
        resolve(file)
    with pytest.raises(UsageError, match="neither a folder nor a hub name"):
        resolve(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="neither a folder nor a hub name"):
        resolve("./nowhere")


def test_a_hub_name_that_cannot_be_fetched_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="not in the local cache"):
        resolve("nobody/no-such-model")
