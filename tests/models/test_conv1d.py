"""GPT-2 keeps its matrices ``[in, out]``: they are quantized as Linears' are, and what stays
unquantized stays as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from children import Run
from safetensors.torch import load_file, save_file
from test_supported_models import IDS, checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmquant import inspect, load
from llmquant.checkpoint.reader import SINGLE

RTN = ("--method", "rtn", "--group-size", "16", "--store-dtype", "source")
LAYOUTS = {
    "compressed-tensors": "{bits: 4, group_size: 16}",
    "gptq": "{bits: 4, group_size: 16}",
    "awq": "{bits: 4, group_size: 16, symmetric: false}",
    "int-quantized": "{bits: 8, group_size: -1, activations: int8-dynamic}",
}


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        result: Tensor = load(folder, dtype="float32", kernel="reference")(IDS).logits
    return result


def theirs(folder: Path) -> Tensor:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        result: Tensor = model(IDS).logits
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_can_be_made_dense_again(layout: str, tmp_path: Path, run: Run) -> None:
    source = checkpoint("gpt2", tmp_path / "source")
    packed, dense, recipe = (tmp_path / name for name in ("packed", "dense", "recipe.yaml"))
    recipe.write_text(f"{{method: rtn, format: {layout}, weights: {LAYOUTS[layout]}}}")
    made = run("quantize", source, "-o", packed, "--recipe", recipe, "--store-dtype", "source")
    assert made.code == 0, made
    made = run("convert", packed, "--to", "dense", "-o", dense)
    assert made.code == 0, made
    before, after = load_file(source / SINGLE), load_file(dense / SINGLE)
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    if layout != "int-quantized":  # which rounds activations too
        torch.testing.assert_close(theirs(dense), logits(packed), rtol=1e-4, atol=1e-4)
    assert not torch.equal(theirs(dense), theirs(source))


def test_what_is_not_quantized_is_as_it_was(tmp_path: Path, run: Run) -> None:
    source, packed = checkpoint("gpt2", tmp_path / "source"), tmp_path / "packed"
    again, dense = tmp_path / "again", tmp_path / "dense"
    # attn.c_proj is square, so its shape would not give a transposed one away.
    made = run(
        "quantize", source, "-o", packed, *RTN, "--ignore", "*.c_proj", "--ignore", "lm_head"
    )
    assert made.code == 0, made
    assert run("convert", packed, "--to", "gptq", "-o", again).code == 0
    assert run("convert", packed, "--to", "dense", "-o", dense).code == 0
    before = load_file(source / SINGLE)
    kept = [n for n in before if "c_attn.weight" not in n and "c_fc.weight" not in n]
    assert "transformer.h.0.attn.c_proj.weight" in kept
    for folder in (packed, again, dense):
        after = load_file(folder / SINGLE)
        assert all(torch.equal(before[n], after[n]) for n in kept), folder
    assert torch.equal(logits(again), logits(packed))
    torch.testing.assert_close(theirs(dense), logits(packed), rtol=1e-4, atol=1e-4)


def test_as_it_was_published(tmp_path: Path, run: Run) -> None:
    """Without a prefix, with the masks that its checkpoints carry along, and a tied head."""
    source = checkpoint("gpt2", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    packed = tmp_path / "packed"
    named = load_file(source / SINGLE)
    tensors = {n.removeprefix("transformer."): t for n, t in named.items() if n != "lm_head.weight"}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}
    save_file(tensors, source / SINGLE, metadata={"format": "pt"})
    text = ("--calibration", f"file:{source.parent / 'text.txt'}", "--nsamples", "4")
    (source.parent / "text.txt").write_text("Once upon a time there was a river. " * 200)
    gptq = ("--method", "gptq", "--bits", "8", "--group-size", "16", *text, "--seqlen", "32")
    made = run("quantize", source, "-o", packed, *gptq)
    assert made.code == 0, made
    assert run("verify", packed).code == 0
    p, q = theirs(source).log_softmax(-1), logits(packed).log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 1e-3
    (why,) = inspect(packed).engines["transformers"]
    assert "does not find the weights of packed linears" in why
