"""register_with_transformers: ``from_pretrained`` gives what ``llmquant.load`` gives; no packed
model is saved by mistake."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CompressedTensorsConfig,
    PreTrainedModel,
)
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    AutoQuantizationConfig,
)

from llmquant import register_with_transformers, unregister_from_transformers
from llmquant.errors import (
    ArchitectureError,
    CheckpointError,
    FormatError,
    LlmquantError,
    UsageError,
)
from llmquant.kernels.int4 import cpu_layout
from llmquant.kernels.packed_linear import PackedLinear, describe
from llmquant.models.load import load
from llmquant.models.transformers import TAKEN_OVER, PackedConfig
from llmquant.quantization.options import QuantizeOptions
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
Q_PROJ = "model.layers.0.self_attn.q_proj"
IDS = torch.randint(6, 60, (2, 12), generator=torch.Generator().manual_seed(0))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
needs_int4 = pytest.mark.skipif(
    cpu_layout.block_rows() is None, reason="torch's int4 layout is not known on this CPU"
)
FOLDERS = sorted(
    p.parent.name
    for p in GOLDEN.glob("*/expected.safetensors")
    if "model-free" not in p.parent.name
)  # that one's label is wrong


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = dict(AUTO_QUANTIZATION_CONFIG_MAPPING), dict(AUTO_QUANTIZER_MAPPING)
    register_with_transformers()
    yield
    unregister_from_transformers()
    assert before == (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING)


def from_pretrained(folder: Path, **arguments: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    return model


def quantized(path: Path, **changes: Any) -> Path:
    """``examples/tiny-llama`` rounded to W4 g128: tied embeddings, a real tokenizer."""
    made = Recipe.model_validate({"method": "rtn", "scales": {"steps": 0}, **changes})
    return quantize(TINY, path, made, QuantizeOptions(max_shard_size=1_000_000)).path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("tiny") / "w4")


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_tools_folder_gives_the_logits_of_load(folder: str, dtype: torch.dtype) -> None:
    ours, theirs = load(GOLDEN / folder, dtype=dtype), from_pretrained(GOLDEN / folder, dtype=dtype)
    assert torch.equal(theirs(IDS).logits, ours(IDS).logits)
    packed = {n: str(m) for n, m in theirs.named_modules() if isinstance(m, PackedLinear)}
    assert packed == {n: str(m) for n, m in ours.named_modules() if isinstance(m, PackedLinear)}
    assert len(packed) == 7
    assert describe(theirs) == describe(ours)
    assert not any(isinstance(m, nn.Linear) for n, m in theirs.named_modules() if n != "lm_head")


@needs_int4
def test_linears_stay_packed_and_small_and_generate_as_loads_do(tiny: Path) -> None:
    model, ours = from_pretrained(tiny, dtype=BF16), load(tiny, dtype=BF16)
    assert len(list(tiny.glob("*.safetensors"))) > 1
    told = describe(model)
    assert told == describe(ours)
    assert told.kernels == {"cpu": 42}
    assert told.packed_bits_per_weight < 5
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    arguments: dict[str, Any] = {
        "attention_mask": torch.ones_like(IDS),
        "max_new_tokens": 16,
        "pad_token_id": 5,
    }
    for _ in range(2):
        texts = [m.generate(IDS, do_sample=False, **arguments) for m in (model, ours)]
        assert torch.equal(*texts)
    assert describe(model) == told
    assert model.generation_config.eos_token_id == ours.generation_config.eos_token_id


def test_the_dtype_is_transformers_to_choose(tiny: Path) -> None:
    assert from_pretrained(tiny).dtype == FP16
    assert from_pretrained(tiny, dtype=torch.float32)(IDS).logits.dtype == torch.float32


def test_a_packed_head_is_untied_and_packed(tmp_path: Path) -> None:
    made = Recipe.model_validate({"method": "rtn", "weights": {"group_size": 32}, "ignore": []})
    folder = quantize(GOLDEN / "base", tmp_path / "head", made).path
    config = json.loads((folder / "config.json").read_text())
    for tied in (False, True):
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
        model = from_pretrained(folder, dtype=BF16)
        assert isinstance(model.lm_head, PackedLinear)
        assert torch.equal(model(IDS).logits, load(folder, dtype=BF16)(IDS).logits)


def test_the_kernel_is_chosen_when_registering(tiny: Path) -> None:
    register_with_transformers(kernel="reference")
    model = from_pretrained(tiny, dtype=BF16)
    assert describe(model).kernels == {"reference": 42}
    assert torch.equal(model(IDS).logits, load(tiny, dtype=BF16, kernel="reference")(IDS).logits)
    register_with_transformers(kernel="cpu_int4")
    with pytest.raises(UsageError, match=r"model\.layers\.0\..*_proj: kernel cpu_int4 cannot take"):
        from_pretrained(tiny, dtype=torch.float32)
    with pytest.raises(UsageError, match="kernel 'fast' does not exist; choose auto"):
        register_with_transformers(kernel="fast")


def test_registering_twice_is_registering_once_and_it_can_be_undone() -> None:
    ours = {m: AUTO_QUANTIZATION_CONFIG_MAPPING[m] for m in TAKEN_OVER}
    register_with_transformers()
    unregister_from_transformers()
    unregister_from_transformers()
    for method, dispatcher in ours.items():
        assert AUTO_QUANTIZATION_CONFIG_MAPPING[method] is dispatcher.before
        assert AUTO_QUANTIZATION_CONFIG_MAPPING[method].__module__.startswith("transformers.")
    assert "llmquant" not in AUTO_QUANTIZER_MAPPING


FP8 = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "format": "float-quantized",
}


def test_what_llmquant_does_not_read_goes_where_it_went_before() -> None:
    told = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": FP8},
    }
    config = AutoQuantizationConfig.from_dict(told)
    assert type(config) is CompressedTensorsConfig
    assert type(AutoHfQuantizer.from_config(config)).__name__ == "CompressedTensorsHfQuantizer"
    marlin = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "checkpoint_format": "marlin",
    }
    assert not isinstance(AutoQuantizationConfig.from_dict(marlin), PackedConfig)


def test_the_config_stays_word_for_word(tiny: Path) -> None:
    told = json.loads((tiny / "config.json").read_text())["quantization_config"]
    model = from_pretrained(tiny, dtype=BF16)
    assert model.config.to_dict()["quantization_config"] == told
    assert json.loads(model.config.to_json_string())["quantization_config"] == told


LOADERS: dict[str, Callable[[Path], PreTrainedModel]] = {
    "load": load,
    "from_pretrained": lambda folder: from_pretrained(folder, dtype=BF16),
}


@pytest.mark.parametrize("how", LOADERS)
def test_a_packed_model_is_never_saved_by_mistake(how: str, tmp_path: Path) -> None:
    folder = GOLDEN / "llmcompressor-w4-sym"
    model = LOADERS[how](folder)
    target = tmp_path / "saved"
    for part in (model, model.model):
        for method in (part.save_pretrained, part.push_to_hub):
            with pytest.raises(
                UsageError,
                match=r"packed in memory.*copy .*llmcompressor-w4-sym instead.*llmquant convert",
            ):
                method(target)
    assert not target.exists()


def test_a_dense_model_is_saved_as_ever(tmp_path: Path) -> None:
    model = load(GOLDEN / "base", dtype=FP16)
    model.save_pretrained(tmp_path / "saved")
    saved, original = (
        load_file(tmp_path / "saved" / "model.safetensors"),
        load_file(GOLDEN / "base" / "model.safetensors"),
    )
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[n], original[n]) for n in saved)


def edited(tmp_path: Path, edit: Callable[[dict[str, Tensor]], Any], **config: Any) -> Path:
    """A copy of a W4 asymmetric folder with other tensors and config entries."""
    folder = shutil.copytree(GOLDEN / "llmcompressor-w4-asym", tmp_path / "copy")
    (folder / "expected.safetensors").unlink()
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    whole = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**whole, **config}))
    return folder


def unpack_all(tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if "proj.weight_" in n]:
        del tensors[name]


@pytest.mark.parametrize(
    ("edit", "config", "error", "words"),
    [
        pytest.param(
            lambda t: t.pop(f"{Q_PROJ}.weight_scale"),
            {},
            FormatError,
            rf"{Q_PROJ}: weight_scale missing",
            id="no scale",
        ),
        pytest.param(
            lambda t: t.update({f"{Q_PROJ}.weight_scale": torch.ones(64, 3)}),
            {},
            FormatError,
            Q_PROJ,
            id="scale shape",
        ),
        pytest.param(
            lambda t: None,
            {"intermediate_size": 64},
            CheckpointError,
            "the config wants",
            id="config shape",
        ),
        pytest.param(
            lambda t: t.update(
                {
                    n.replace("layers.0", "layers.7"): v.clone()
                    for n, v in t.items()
                    if "proj.weight_" in n
                }
            ),
            {},
            CheckpointError,
            r"packed weights for model\.layers\.7\..*, which LlamaForCausalLM does not have",
            id="no such layer",
        ),
        pytest.param(
            lambda t: t.update(
                {
                    f"model.norm.{n.rpartition('.')[2]}": v.clone()
                    for n, v in t.items()
                    if Q_PROJ in n
                }
            ),
            {},
            ArchitectureError,
            r"model\.norm is packed but is a LlamaRMSNorm",
            id="no linear",
        ),
        pytest.param(
            lambda t: t.pop("model.norm.weight"),
            {},
            CheckpointError,
            r"copy lacks model\.norm\.weight; the folder is incomplete",
            id="no norm",
        ),
        pytest.param(
            unpack_all,
            {},
            CheckpointError,
            "announces compressed-tensors weights but no tensor is packed",
            id="dense",
        ),
    ],
)
def test_a_folder_that_is_not_right_is_refused(
    edit: Callable[[dict[str, Tensor]], Any],
    config: dict[str, Any],
    error: type[LlmquantError],
    words: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=words):
        from_pretrained(edited(tmp_path, edit, **config), dtype=BF16)


def test_zero_points_are_judged_here_too() -> None:
    with pytest.raises(FormatError, match="the label is wrong"):
        from_pretrained(GOLDEN / "autoround-auto_round-model-free-asym", dtype=BF16)


def test_one_device_only() -> None:
    with pytest.raises(UsageError, match="must be on one device"):
        from_pretrained(
            GOLDEN / "llmcompressor-w4-sym", device_map={"model": "cpu", "lm_head": "disk"}
        )
    model = from_pretrained(GOLDEN / "llmcompressor-w4-sym", device_map="cpu", dtype=BF16)
    assert torch.equal(
        model(IDS).logits, load(GOLDEN / "llmcompressor-w4-sym", dtype=BF16)(IDS).logits
    )


def test_a_head_that_classifies_is_new() -> None:
    """transformers makes it up and says so; the packed blocks below it compute."""
    folder = GOLDEN / "llmcompressor-w4-sym"
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=FP32, output_loading_info=True
    )
    assert info["missing_keys"] == {"score.weight"}
    hidden = load(folder, dtype=FP32).model(IDS[:1]).last_hidden_state
    assert torch.equal(model(IDS[:1]).logits, model.score(hidden)[:, -1])
