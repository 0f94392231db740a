"""inspect: the facts of a folder from its headers, equal to those of the run and of the tensors
themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save

from llmquant.checkpoint.inspect import inspect
from llmquant.checkpoint.reader import SINGLE, CheckpointReader
from llmquant.errors import CheckpointError, FormatError
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe

GOLDEN = Path(__file__).parents[1] / "golden"


def test_an_unquantized_model(model: Path) -> None:
    found = inspect(model)
    reader = CheckpointReader(model)
    assert (found.format, found.scheme, found.model_type) == (None, "float16", "llama")
    assert (found.quantized, found.linears, found.coverage, found.bits_per_weight) == (
        0,
        15,
        0.0,
        None,
    )
    assert found.parameters == sum(math.prod(i.shape) for i in reader.tensors.values())
    assert found.bytes_on_disk == (model / SINGLE).stat().st_size
    assert found.weights_sha256 == reader.digest()
    assert found.modules == ()
    assert found.recipe_sha256 is None


def test_a_quantized_model(quantized: Path, model: Path, gptq: Recipe) -> None:
    found, original = inspect(quantized), inspect(model)
    assert (found.format, found.scheme) == ("compressed-tensors", "W4 g32 sym")
    assert (found.quantized, found.linears) == (14, original.linears)
    assert found.parameters == original.parameters
    assert found.recipe_sha256 == gptq.sha256()
    shapes = {i.name: i.shape for i in found.modules}
    source = CheckpointReader(model)
    assert shapes == {n: source.info(f"{n}.weight").shape for n in shapes}
    assert found.coverage == sum(map(math.prod, shapes.values())) / original.parameters


@pytest.mark.parametrize(
    ("kind", "linears"), [("gpt2", 9), ("gpt_neox", 9), ("opt", 13), ("falcon", 9)]
)
def test_tables_are_no_linears_and_heads_are(kind: str, linears: int, tmp_path: Path) -> None:
    assert inspect(save(kind, tmp_path)).linears == linears


@pytest.mark.parametrize(
    ("changes", "scheme", "bits"),
    [
        ({}, "W4 g32 sym", 4.5),
        ({"weights.symmetric": False}, "W4 g32 asym", 4.625),
        ({"weights.bits": 8, "include": ("*.mlp.*",)}, "W8 g32 sym", 8.5),
        ({"overrides": ({"match": "*.self_attn.*", "bits": 8},)}, "W4 g32 sym, W8 g32 sym", None),
        ({"format": "gptq"}, "W4 g32 sym", None),
        ({"format": "awq"}, "W4 g32 sym", None),
    ],
    ids=["W4", "asym", "W8 mlp", "mixed", "gptq", "awq"],
)
def test_the_size_is_that_of_the_run(
    model: Path,
    rtn: Recipe,
    tmp_path: Path,
    changes: dict[str, Any],
    scheme: str,
    bits: float | None,
) -> None:
    result = quantize(model, tmp_path / "q", rtn.updated(changes))
    found = inspect(tmp_path / "q")
    assert set(found.scheme.split(", ")) == set(scheme.split(", "))
    assert found.bits_per_weight == pytest.approx(result.bits_per_weight, rel=1e-12)
    if bits is not None:
        assert found.bits_per_weight == bits
        assert {m.bits_per_weight for m in found.modules} == {bits}
    assert found.quantized == len(result.modules)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_width_that_fills_no_word_is_the_model_s(
    make_model: Callable[..., Path], tmp_path: Path, bits: int
) -> None:
    """Headers tell it to the next word only, where one scale holds for a row."""
    model = make_model(intermediate_size=45)
    weights = {"bits": bits, "group_size": -1, "symmetric": True}
    result = quantize(model, tmp_path / "q", Recipe(method="rtn").updated({"weights": weights}))
    found, source = inspect(tmp_path / "q"), CheckpointReader(model)
    shapes = {i.name: i.shape for i in found.modules}
    assert shapes == {n: source.info(f"{n}.weight").shape for n in shapes}
    assert found.parameters == inspect(model).parameters
    assert found.bits_per_weight == pytest.approx(result.bits_per_weight, rel=1e-12)


@pytest.mark.parametrize(
    "folder", sorted(p.name for p in GOLDEN.iterdir() if (p / "expected.safetensors").is_file())
)
def test_other_tools_folders(folder: str) -> None:
    found = inspect(GOLDEN / folder)
    assert found.quantized == 7
    assert found.format is not None
    assert all(m.shape[1] in (64, 128) for m in found.modules)


def test_what_cannot_be_inspected(
    model: Path, tampered: Path, tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        inspect(tmp_path)
    edit_json(
        tampered / "config.json", lambda c: c["quantization_config"].update(quant_method="spqr")
    )
    with pytest.raises(FormatError, match="quant_method 'spqr' is not one llmquant reads"):
        inspect(tampered)
