"""A float32 model is stored in 16 bits beside its codes, and says so; one of 16 bits stays what it
is; and ``plan``, ``quantize`` and ``verify`` agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_kit import llmquant_command
from safetensors.torch import load_file

SCALE = "model.layers.0.mlp.up_proj.weight_scale"
BESIDE = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", SCALE)
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def quantize(model: Path, output: Path, *options: object) -> Any:
    return llmquant_command(
        "quantize", model, "-o", output, "--method", "rtn", "--group-size", 32, *options
    )


@pytest.mark.parametrize(
    ("source", "options", "stored"),
    [
        pytest.param(torch.float32, (), torch.bfloat16, id="float32"),
        pytest.param(torch.float32, ("--store-dtype", "source"), torch.float32, id="source"),
        pytest.param(torch.float32, ("--store-dtype", "fp32"), torch.float32, id="fp32 by name"),
        pytest.param(torch.float32, ("--store-dtype", "float16"), torch.float16, id="float16"),
        pytest.param(torch.float16, (), torch.float16, id="fp16"),
        pytest.param(torch.bfloat16, (), torch.bfloat16, id="bf16"),
    ],
)
@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
def test_what_is_beside_the_codes(
    source: torch.dtype,
    options: tuple[str, ...],
    stored: torch.dtype,
    layout: str,
    make_model: Any,
    tmp_path: Path,
) -> None:
    model = make_model(dtype=source)
    ran = quantize(model, tmp_path / "q", "--format", layout, *options)
    assert ran.code == 0, ran.err
    tensors, before = (load_file(f / "model.safetensors") for f in (tmp_path / "q", model))
    if layout == "compressed-tensors":
        assert {name: tensors[name].dtype for name in BESIDE} == dict.fromkeys(BESIDE, stored)
    assert torch.float32 not in {t.dtype for t in tensors.values()} or stored is torch.float32
    for name in BESIDE[:3]:
        assert torch.equal(tensors[name], before[name].to(stored))
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["dtype"] == NAMES[stored]
    assert ("are stored in" in ran.err) == (source is not stored)
    if source is not stored:
        assert (
            f"is in float32; scales and what is not quantized are stored in {NAMES[stored]}"
            in ran.said
        )
    planned = llmquant_command(
        "plan", model, "--method", "rtn", "--group-size", 32, "--format", layout, *options, "--json"
    )
    plan = json.loads(planned.out)
    assert plan["bytes_on_disk"] == (tmp_path / "q" / "model.safetensors").stat().st_size
    assert (plan["stored"] is None) == (source is stored)
    assert llmquant_command("verify", tmp_path / "q").code == 0


def test_codes_are_chosen_from_the_full_weights(make_model: Any, tmp_path: Path) -> None:
    model = make_model(dtype=torch.float32)
    assert quantize(model, tmp_path / "short").code == 0
    assert quantize(model, tmp_path / "full", "--store-dtype", "source").code == 0
    short, full = (load_file(tmp_path / n / "model.safetensors") for n in ("short", "full"))
    for name in (n for n in full if n.endswith(("weight_packed", "weight_scale"))):
        assert torch.equal(short[name].float(), full[name].float()), name


def test_numbers_too_large_are_refused(make_model: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = make_model(dtype=torch.float32)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    ran = quantize(model, tmp_path / "q", "--store-dtype", "float16")
    assert ran.code == 1
    assert "model.norm.weight has numbers too large for torch.float16" in ran.said
    assert not (tmp_path / "q").exists()


def test_an_odd_float32_tensor_is_no_float32_model(make_model: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = make_model(dtype=torch.bfloat16)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    ran = quantize(model, tmp_path / "q")
    assert (ran.code, "are stored in" in ran.err) == (0, False)
    assert (
        load_file(tmp_path / "q" / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    )


def test_another_word_is_misuse(make_model: Any, tmp_path: Path) -> None:
    ran = quantize(make_model(), tmp_path / "q", "--store-dtype", "short")
    assert (ran.code, "dtype 'short' does not exist" in ran.said) == (2, True)


@pytest.mark.parametrize("linked", [False, True], ids=["as it is", "through a link"])
def test_a_folder_of_the_hubs_cache_gives_its_models_name(
    linked: bool, make_model: Any, tmp_path: Path
) -> None:
    snapshot = tmp_path / "hub" / "models--acme--Tiny-1.1B" / "snapshots" / ("0123abcd" * 5)
    snapshot.mkdir(parents=True)
    for file in make_model().iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    given = snapshot
    if linked:
        given = tmp_path / "model"
        given.symlink_to(snapshot)
    assert quantize(given, tmp_path / "q").code == 0
    manifest = json.loads((tmp_path / "q" / "manifest.json").read_text())
    assert manifest["base_model"] == "acme/Tiny-1.1B"
    assert "base_model: acme/Tiny-1.1B" in (tmp_path / "q" / "README.md").read_text()
