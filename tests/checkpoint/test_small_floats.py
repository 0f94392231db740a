"""FP8 and MXFP4 checkpoints are read as the numbers that they mean: those of transformers' own
dequantization, and of a plain loop in float64."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Run
from safetensors.torch import load_file, save_file
from tiny_models import EXAMPLE, TOKENIZER, save
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from llmquant import load
from llmquant.checkpoint.reader import SINGLE, CheckpointReader
from llmquant.checkpoint.sources.floats import as_floats
from llmquant.conversion.source import model_dtype
from llmquant.errors import LlmquantError

FP8 = torch.float8_e4m3fn
RTN = ("--method", "rtn", "--group-size", "32")
CT = {"quant_method": "compressed-tensors", "format": "float-quantized"}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [48, 32]}
# label, the scale's ending, how its grid is got of a weight's shape, what is stored beside it
KINDS: dict[str, tuple[dict[str, Any], str, Any, tuple[str, ...]]] = {
    "blocks": (BLOCKS, "_scale_inv", lambda o, i: (-(-o // 48), -(-i // 32)), ()),
    "blocks of the grid": (
        {"quant_method": "fp8"},
        "_scale_inv",
        lambda o, i: (-(-o // 32), -(-i // 32)),
        (),
    ),
    "one": ({"quant_method": "fp8"}, "_scale", lambda o, i: (), ("input_scale",)),
    "one, Mistral": (
        {"quant_method": "fp8"},
        "_scale_inv",
        lambda o, i: (1,),
        ("activation_scale",),
    ),
    "rows": (CT, "_scale", lambda o, i: (o, 1), ()),
    "rows, FBGEMM": (
        {"quant_method": "fbgemm_fp8"},
        "_scale",
        lambda o, i: (o, 1),
        ("input_scale_ub",),
    ),
    "no label": ({}, "_scale", lambda o, i: (), ()),
}


def plain(weight: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    """A loop over the blocks."""
    wide = weight.double().clone()
    grid = scale.double().reshape(scale.shape if scale.ndim == 2 else (1, 1))
    for r in range(0, weight.shape[0], rows):
        for c in range(0, weight.shape[1], columns):
            wide[r : r + rows, c : c + columns] *= grid[r // rows, c // columns]
    return wide


def in_fp8(folder: Path, kind: str) -> dict[str, Tensor]:
    """Turn a folder's linears into FP8; returns what they mean, rounded to the config's dtype."""
    label, ending, grid, beside = KINDS[kind]
    tensors, meant = load_file(folder / SINGLE), {}
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        out, columns = tensors[name].shape
        tensors[name] = (tensors[name].float() * 100).to(FP8)
        scale = torch.rand(grid(out, columns), generator=generator) * 0.01 + 0.005
        tensors[f"{name}{ending}"] = scale
        for leaf in beside:
            tensors[name.replace("weight", leaf)] = torch.ones(())
        rows = scale.shape[0] if scale.ndim == 2 else 1
        size = label.get("weight_block_size") or [
            out // rows,
            columns // (scale.shape[1] if scale.ndim == 2 else 1),
        ]
        meant[name] = plain(tensors[name], scale, *size).to(torch.float16)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if label:
        config["quantization_config"] = label
    (folder / "config.json").write_text(json.dumps(config))
    return meant


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        pytest.param({"dtype": "float16"}, torch.float16, id="a name"),
        pytest.param({"torch_dtype": "float16"}, torch.float16, id="the older key"),
        pytest.param({"text_config": {"dtype": "float16"}}, torch.float16, id="of the text part"),
        pytest.param({"dtype": {"text_config": "float16"}}, torch.bfloat16, id="one for each part"),
        pytest.param({"dtype": ["float16"]}, torch.bfloat16, id="a list"),
        pytest.param({"dtype": None}, torch.bfloat16, id="none"),
    ],
)
def test_the_dtype_of_what_fp8_means(
    config: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    tensors = {"w.weight": torch.ones(2, 2).to(FP8), "w.weight_scale": torch.ones(())}
    save_file(tensors, tmp_path / SINGLE)
    floats = as_floats(CheckpointReader(tmp_path))
    assert floats.read("w.weight").dtype == dtype
    assert model_dtype(CheckpointReader(tmp_path)) == (dtype if dtype != torch.bfloat16 else torch.float32)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_fp8_is_read_as_numbers_and_quantized(
    kind: str, make_model: Any, run: Run, tmp_path: Path
) -> None:
    folder = make_model()
    meant = in_fp8(folder, kind)
    floats = as_floats(CheckpointReader(folder))
    for name, wanted in meant.items():
        torch.testing.assert_close(floats.read(name), wanted, rtol=1e-3, atol=0)
    assert not [n for n in floats.tensors if "scale" in n]
    assert floats.tensors.keys() == CheckpointReader(make_model()).tensors.keys()
    seen = run("inspect", folder)
    assert (seen.code, "fp8" in seen.out) == (0, True), seen
    planned = run("plan", folder, *RTN)
    assert (planned.code, "weights are in FP8" in planned.out + planned.err) == (0, True), planned
    out = tmp_path / "q"
    assert run("quantize", folder, "-o", out, *RTN, "--bits", "8").code == 0
    verified = run("verify", out)
    assert verified.code == 0, verified
    assert run("inspect", out).code == 0
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    ids = torch.arange(6, 26).unsqueeze(0)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        original, packed, other = (
            model(ids).logits.log_softmax(-1)
            for model in (load(folder, dtype="float32"), load(out, dtype="float32"), theirs)
        )
    assert float((original.exp() * (original - packed)).sum(-1).mean()) < 1e-2
    assert float((packed.exp() * (packed - other)).sum(-1).mean()) < 1e-4


def floats_of(folder: Path, label: dict[str, Any], **tensors: Tensor) -> CheckpointReader:
    """A folder of nothing but these tensors, read as numbers."""
    save_file(tensors, folder / SINGLE)
    config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": label}
    (folder / "config.json").write_text(json.dumps(config))
    return as_floats(CheckpointReader(folder))


def test_blocks_equal_transformers(tmp_path: Path) -> None:
    weight, scale = torch.randn(96, 64).to(FP8), torch.rand(2, 2)
    floats = floats_of(tmp_path, BLOCKS, w=weight, w_scale_inv=scale)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)
    assert torch.equal(floats.read("w"), theirs)


@pytest.mark.parametrize("size", [[0, 0], [-1, 32], ["48", 32]], ids=str)
def test_blocks_of_no_size_are_the_power_of_two_that_fits(
    size: list[object], tmp_path: Path
) -> None:
    weight, scale = torch.randn(96, 64).to(FP8), torch.rand(2, 2)
    label = {"quant_method": "fp8", "weight_block_size": size}
    floats = floats_of(tmp_path, label, w=weight, w_scale_inv=scale)
    assert torch.equal(floats.read("w"), plain(weight, scale, 64, 32).to(torch.bfloat16))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (3, 1, 1), (3, 1, 8), (3, 2, 2)], ids=str)
def test_one_expert_of_a_stacked_fp8_tensor(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight, scale = torch.randn(3, 4, 8).to(FP8), torch.rand(shape)
    floats = floats_of(tmp_path, {"quant_method": "fp8"}, w=weight, w_scale=scale)
    grid = scale.expand(3, 1, 1) if scale.numel() == 1 else scale
    for i in range(3):
        rows, columns = (n // g for n, g in zip((4, 8), grid.shape[1:], strict=True))
        wanted = plain(weight[i], grid[i], rows, columns).to(torch.bfloat16)
        assert torch.equal(floats.read_part("w", i), wanted)
        assert torch.equal(floats.read("w")[i], wanted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda t, n: t.pop(f"{n}_scale"), "is in FP8 and has no scale", id="no scale"),
        pytest.param(
            lambda t, n: t.update({f"{n}_scale": torch.ones(7, 1)}),
            "no power of two is a block of rows which gives the scales of",
            id="another grid",
        ),
    ],
)
def test_fp8_that_means_nothing_is_refused(
    change: Any, words: str, make_model: Any, run: Run, tmp_path: Path
) -> None:
    folder = make_model()
    in_fp8(folder, "one")
    tensors = load_file(folder / SINGLE)
    change(tensors, "model.layers.0.self_attn.q_proj.weight")
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    for command in (("quantize", folder, "-o", tmp_path / "q", *RTN), ("inspect", folder)):
        ran = run(*command)
        assert ran.code in (1, 2)
        assert words in ran.err


def test_fp8_is_no_layout_to_convert(make_model: Any, run: Run, tmp_path: Path) -> None:
    folder = make_model()
    in_fp8(folder, "rows")
    ran = run("convert", folder, "--to", "gptq", "-o", tmp_path / "q")
    assert (ran.code, "has FP8 weights" in ran.err) == (2, True), ran


def test_mxfp4_equals_transformers(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x.gate_up_proj_blocks": torch.randint(0, 256, (3, 8, 2, 16), generator=generator).byte(),
        "x.gate_up_proj_scales": torch.randint(110, 140, (3, 8, 2), generator=generator).byte(),
    }
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text('{"model_type": "gpt_oss", "dtype": "bfloat16"}')
    floats = as_floats(CheckpointReader(tmp_path))
    wanted = convert_moe_packed_tensors(*tensors.values())
    assert floats.info("x.gate_up_proj").shape == wanted.shape == (3, 64, 8)
    assert torch.equal(floats.read("x.gate_up_proj"), wanted)
    assert torch.equal(floats.read_part("x.gate_up_proj", 1), wanted[1])
    assert list(floats.tensors) == ["x.gate_up_proj"]
    del tensors["x.gate_up_proj_scales"]
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(LlmquantError, match=r"has no x\.gate_up_proj_scales"):
        as_floats(CheckpointReader(tmp_path))


def in_mxfp4(folder: Path) -> None:
    """Turn the experts of a tiny gpt-oss into MXFP4 blocks and scales, as it is published."""
    tensors = load_file(folder / SINGLE)
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        grid = (experts, rows, columns // 32)
        codes = torch.randint(0, 256, (*grid, 16), generator=generator)
        tensors[f"{name}_blocks"] = codes.byte()
        tensors[f"{name}_scales"] = torch.randint(120, 123, grid, generator=generator).byte()
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_an_mxfp4_model_is_quantized_proved_and_loaded(tmp_path: Path, run: Run) -> None:
    source, out = tmp_path / "source", tmp_path / "q"
    save("gpt_oss", source, vocab_size=4096, bos_token_id=0, intermediate_size=64)
    for name in TOKENIZER:
        shutil.copyfile(EXAMPLE / name, source / name)
    in_mxfp4(source)
    seen = run("inspect", source)
    assert (seen.code, "mxfp4" in seen.out) == (0, True), seen
    text = ("--calibration", f"file:{EXAMPLE / 'calibration.txt'}", "--nsamples", "4")
    gptq = ("--method", "gptq", "--bits", "8", "--group-size", "32", *text, "--seqlen", "32")
    made = run("quantize", source, "-o", out, *gptq)
    assert made.code == 0, made
    assert "weights are in MXFP4" in made.out + made.err
    verified = run("verify", out)
    assert verified.code == 0, verified
    ids = torch.arange(6, 38).unsqueeze(0)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted, original, packed = (
            model(ids).logits.log_softmax(-1)
            for model in (theirs, load(source, dtype="float32"), load(out, dtype="float32"))
        )
    torch.testing.assert_close(original, wanted, rtol=1e-4, atol=1e-4)
    assert float((original.exp() * (original - packed)).sum(-1).mean()) < 1e-3
