"""What a label leaves open of FP8 weights: how large their blocks are, and where the label stands.
What is not read is named for what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Run
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmquant.checkpoint.detect import quantization_of
from llmquant.checkpoint.reader import SINGLE, CheckpointReader
from llmquant.checkpoint.sources.floats import as_floats
from llmquant.errors import CheckpointError, LayoutError, QuantizationError, UsageError

FP8 = torch.float8_e4m3fn
_GROUPS = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"block_structure": "48x32"}}}}  # fmt: skip
_TWO = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"block_structure": "48x32"}}, "b": {"weights": {"block_structure": [64, 32]}}}}  # fmt: skip


def folder_of(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> CheckpointReader:
    save_file(tensors, folder / SINGLE)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16", **config}))  # fmt: skip
    return CheckpointReader(folder)


def weights(**shapes: tuple[tuple[int, int], tuple[int, ...]]) -> dict[str, Tensor]:
    """Ones of a shape, and random scales of a grid: what is read is each number's scale."""
    generator = torch.Generator().manual_seed(0)
    found = {n: torch.ones(shape).to(FP8) for n, (shape, _) in shapes.items()}
    scales = {f"{n}_scale": torch.rand(grid, generator=generator) for n, (_, grid) in shapes.items()}  # fmt: skip
    return found | scales


def read_as(floats: CheckpointReader, name: str, scale: Tensor, rows: int, columns: int) -> bool:
    found = floats.read(name)
    wanted = [[float(scale[r // rows, c // columns]) for c in range(found.shape[1])] for r in range(found.shape[0])]  # fmt: skip
    return torch.equal(found, torch.tensor(wanted).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("label", "rows"),
    [
        ({}, 64),
        ({"quant_method": "fp8", "weight_block_size": [48, 32]}, 48),
        (_GROUPS, 48),
        ({"quant_method": "fp8", "weight_block_size": "64, 32"}, 64),
    ],
    ids=["none", "two numbers", "text", "text with a comma"],
)
def test_blocks_that_do_not_divide_a_matrix(
    label: dict[str, Any], rows: int, tmp_path: Path
) -> None:
    tensors = weights(w=((96, 64), (2, 2)), v=((40, 64), (1, 2)), r=((96, 64), (96, 1)))
    reader = folder_of(tmp_path, {"quantization_config": label} if label else {}, tensors)
    floats = as_floats(reader)
    assert read_as(floats, "w", tensors["w_scale"], rows, 32)
    assert read_as(floats, "v", tensors["v_scale"], 40, 32)
    assert read_as(floats, "r", tensors["r_scale"], 1, 64)


def test_groups_of_columns_that_do_not_divide_a_row(tmp_path: Path) -> None:
    group = {"weights": {"type": "float", "num_bits": 8, "strategy": "group", "group_size": 48}}
    label = {"quant_method": "compressed-tensors", "config_groups": {"g": group}}
    tensors = weights(w=((64, 96), (64, 2)), r=((96, 64), (96, 1)))
    floats = as_floats(folder_of(tmp_path, {"quantization_config": label}, tensors))
    assert read_as(floats, "w", tensors["w_scale"], 1, 48)
    assert read_as(floats, "r", tensors["r_scale"], 1, 64)


WRONG: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "no common size": ({}, weights(w=((96, 64), (2, 2)), v=((96, 64), (3, 2))), "no power of two is a block of rows which gives the scales of w and v"),
    "no power of two": ({}, weights(w=((70, 64), (7, 2))), "no power of two is a block of rows which gives the scales of w"),
    "no size at all": ({}, weights(w=((10, 64), (6, 2))), "w_scale is [6, 2], which gives no blocks of w, [10, 64]"),
    "not the label's": ({"weight_block_size": [32, 32]}, weights(w=((96, 64), (2, 2))), "w_scale is [2, 2], which gives no blocks of 32 x 32 of w"),
    "two of the label's": (_TWO, weights(w=((96, 64), (2, 2))), "w could be in blocks of [48, 32] or [64, 32]"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_scales_that_give_no_blocks(name: str, tmp_path: Path) -> None:
    label, tensors, message = WRONG[name]
    with pytest.raises(CheckpointError) as told:
        as_floats(folder_of(tmp_path, {"quantization_config": label}, tensors))
    assert message in str(told.value)


def test_a_label_in_the_text_part(tmp_path: Path) -> None:
    """It says the size of blocks, and goes with them."""
    label = {"quant_method": "fp8", "weight_block_size": [48, 32]}
    tensors = weights(w=((96, 64), (2, 2)))
    reader = folder_of(tmp_path, {"text_config": {"quantization_config": label, "x": 1}}, tensors)
    floats = as_floats(reader)
    assert read_as(floats, "w", tensors["w_scale"], 48, 32)
    assert floats.config["text_config"] == {"x": 1}
    assert quantization_of(floats) is None


@pytest.mark.parametrize("read", [as_floats, quantization_of], ids=["to quantize", "to convert"])
def test_fp8_beside_packed_integers(read: Any, tmp_path: Path) -> None:
    tensors = weights(w=((96, 64), (96, 1)))
    tensors["v.weight_packed"] = torch.zeros(4, 4, dtype=torch.int32)
    reader = folder_of(tmp_path, {"quantization_config": _GROUPS}, tensors)
    with pytest.raises(UsageError, match=r"FP8 weights \(w\) beside packed integers \(v.weight_p"):
        read(reader)


def test_numbers_beyond_fp16_are_not_the_checkpoints_fault(tmp_path: Path) -> None:
    tensors = {"w": torch.full((4, 4), 448.0).to(FP8), "w_scale": torch.tensor(200.0)}
    floats = as_floats(folder_of(tmp_path, {"dtype": "float16"}, tensors))
    with pytest.raises(QuantizationError, match=r"tensor w has .* too large for torch\.float16"):
        floats.read("w")


def test_records_of_another_quantization_stay_behind(
    make_model: Any, run: Run, tmp_path: Path
) -> None:
    folder = make_model()
    records = ("hf_quant_config.json", "quantization_config.json", "quant_cfg.json", "quantize_config.json")  # fmt: skip
    for name in records:
        (folder / name).write_text('{"quantization": {"quant_algo": "FP8"}}')
    made = run("quantize", folder, "-o", tmp_path / "q", "--method", "rtn", "--group-size", "32")
    assert made.code == 0, made
    assert run("convert", tmp_path / "q", "--to", "dense", "-o", tmp_path / "d").code == 0
    for result in (tmp_path / "q", tmp_path / "d"):
        assert not [n for n in records if (result / n).exists()]


@pytest.mark.parametrize("much", [1, 40], ids=["one row", "most rows"])
def test_infinite_weights_are_named(much: int, make_model: Any, run: Run, tmp_path: Path) -> None:
    folder = make_model()
    tensors = load_file(folder / SINGLE)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][: much * tensors[name].shape[0] // 40, 0] = float("inf")
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    told = run("quantize", folder, "-o", tmp_path / "q", "--method", "rtn", "--group-size", "32")
    assert (told.code, "up_proj" in told.err, "NaN or Inf" in told.err) == (1, True, True), told


# Hadamards at a linear's input, as compressed-tensors writes them; a storage without zeros.
_ROTATED = {"transform_config": {"config_groups": {"R4": {"type": "hadamard", "apply": [{"targets": ["re:.*down_proj$"], "location": "input"}]}}}}  # fmt: skip
_SPARSE = {"sparsity_config": {"format": "sparse-24-bitmask"}}
_FLOATS = {"quant_method": "compressed-tensors", "format": "float-quantized"}
BEYOND = [
    pytest.param(_ROTATED, "transform_config rotates activations", id="rotations"),
    pytest.param(_SPARSE, "sparsity_config stores weights as 'sparse-24-bitmask'", id="sparse"),
]


@pytest.mark.parametrize(("more", "words"), BEYOND)
@pytest.mark.parametrize("kind", ["FP8", "plain floats", "packed by another method"])
def test_a_label_that_says_more_than_the_weights(
    kind: str, more: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """Left out with the label, it would be another model's numbers."""
    label, tensors = {**_FLOATS, **more}, weights(w=((96, 64), (96, 1)))
    if kind == "plain floats":
        label, tensors = {**label, "config_groups": {}}, {"w": torch.ones(96, 64)}
    if kind == "packed by another method":
        label = {"quant_method": "awq", "bits": 4, "group_size": 32, **more}
        tensors = {"w.qweight": torch.zeros(4, 4, dtype=torch.int32)}
    reader = folder_of(tmp_path, {"quantization_config": label}, tensors)
    with pytest.raises(LayoutError, match=words) as told:
        quantization_of(as_floats(reader))
    assert str(tmp_path) in str(told.value)


@pytest.mark.parametrize("more", [{"transform_config": None}, {"sparsity_config": {"format": "dense"}}, {"sparsity_config": {}}])  # fmt: skip
def test_a_label_whose_sections_say_nothing(more: dict[str, Any], tmp_path: Path) -> None:
    label = {**_FLOATS, **more}
    floats = as_floats(folder_of(tmp_path, {"quantization_config": label}, weights(w=((96, 64), (96, 1)))))  # fmt: skip
    assert len(floats.notes) == 1


@pytest.mark.parametrize(
    ("key", "value"), [("kv_cache_scheme", {"num_bits": 8}), ("kv_cache_quant_algo", "FP8")]
)
def test_a_quantized_cache_is_left_out_with_a_note(key: str, value: Any, tmp_path: Path) -> None:
    label = {"quant_method": "fp8", key: value}
    floats = as_floats(folder_of(tmp_path, {"quantization_config": label}, weights(w=((96, 64), (96, 1)))))  # fmt: skip
    assert [n for n in floats.notes if f"config.json's {key} is left out" in n]


def test_an_fp8_model_that_rotates_is_not_quantized(
    make_model: Any, run: Run, tmp_path: Path
) -> None:
    folder = make_model()
    tensors = load_file(folder / SINGLE)
    for name in [n for n in tensors if n.endswith("down_proj.weight")]:
        tensors |= {name: tensors[name].to(FP8), f"{name}_scale": torch.ones(tensors[name].shape[0], 1)}  # fmt: skip
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {**_FLOATS, **_ROTATED}}))  # fmt: skip
    for command in (("quantize", folder, "-o", tmp_path / "q", "--method", "rtn", "--group-size", "32"), ("inspect", folder), ("generate", folder, "a")):  # fmt: skip
        told = run(*command)
        assert (told.code, "rotates activations" in told.said) == (2, True), (command, told)
    assert not (tmp_path / "q").exists()
