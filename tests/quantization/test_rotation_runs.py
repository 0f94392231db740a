"""Rotation in whole runs: what comes out is an ordinary checkpoint that computes nearly what the
original does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import save
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmquant.checkpoint.manifest import read_manifest, verify
from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import SINGLE, CheckpointReader
from llmquant.cli.overrides import recipe_of
from llmquant.errors import ArchitectureError, ProofError
from llmquant.models.load import load
from llmquant.models.rotation.rotated import rotated
from llmquant.planning.allocation.allocate import allocate
from llmquant.planning.allocation.options import AllocateOptions
from llmquant.planning.preview import make_plan
from llmquant.quantization import run as pipeline
from llmquant.quantization.options import Events
from llmquant.quantization.plan import Progress
from llmquant.quantization.rerun import rerun
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe

IDS = torch.randint(6, 4096, (2, 24), generator=torch.Generator().manual_seed(1))
MakeModel = Callable[..., Path]


@pytest.fixture(scope="module")
def tied(make_model: MakeModel) -> Path:
    return make_model(tie_word_embeddings=True)


def dense(folder: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


def packed(folder: Path) -> Tensor:
    with torch.no_grad():
        return load(folder, dtype="float32", kernel="reference")(IDS).logits


def distances(model: Path, recipe: Recipe, folder: Path) -> tuple[float, float]:
    """Relative distance of the logits from the original's, without and with rotation."""
    wanted, found = dense(model), []
    for name, changes in (("plain", {"rotation": None}), ("q", {})):
        quantize(model, folder / name, recipe.updated(changes))
        found.append(float((packed(folder / name) - wanted).norm() / wanted.norm()))
    return found[0], found[1]


STEPS = {
    "rtn": {"method": "rtn"},
    "embeddings and head": {"method": "rtn", "embeddings": {"bits": 8}},
    "awq+gptq+tune": {
        "awq": {"grid": 2},
        "tune": {"steps": 2, "checks": 1},
        "gptq.asymmetric": 0.5,
    },
    "smooth+gptq": {"weights.group_size": -1, "weights.activations": "int8-dynamic", "smooth": {}},
}


@pytest.mark.parametrize("steps", STEPS)
def test_a_tied_model_comes_out_rotated_and_close(steps, tied, gptq, tmp_path):
    recipe = gptq.updated({"weights.bits": 8, "rotation": {"seed": 3}, **STEPS[steps]})
    plain, turned = distances(tied, recipe, tmp_path)
    assert turned < 1.5 * plain < 0.1
    entry = read_manifest(tmp_path / "q").rotation
    assert entry is not None
    assert (entry.residual, entry.heads, entry.seed, entry.norms, entry.untied) == (
        "hadamard 64",
        "hadamard 16",
        3,
        5,
        True,
    )
    assert json.loads((tmp_path / "q" / "config.json").read_text())["tie_word_embeddings"] is False
    card = (tmp_path / "q" / "README.md").read_text(encoding="utf-8")
    assert (
        "after a rotation of the residual stream (hadamard 64) and value heads (hadamard 16)"
        in card
    )
    verify(tmp_path / "q")


def test_packed_equals_the_rotated_original_with_dequantized_weights(tied, gptq, tmp_path):
    recipe = gptq.updated({"rotation": {"residual": "random"}})
    quantize(tied, tmp_path / "q", recipe)
    reader, twin = CheckpointReader(tmp_path / "q"), tmp_path / "twin"
    stored = PackedCheckpoint(reader)
    before = rotated(CheckpointReader(tied), recipe)
    tensors = {n: before.read(n) for n in before.tensors}
    for name in stored.schemes:
        tensors[f"{name}.weight"] = stored.weight(name).dequantize(torch.float32)
    twin.mkdir()
    save_file(tensors, twin / SINGLE, metadata={"format": "pt"})
    (twin / "config.json").write_text(json.dumps(before.config))
    assert torch.equal(packed(tmp_path / "q"), dense(twin))


@pytest.mark.parametrize("kind", ["phi3", "opt", "qwen3_moe"])
def test_other_architectures_come_out_close(kind, tied, gptq, tmp_path):
    save(kind, tmp_path / "m", vocab_size=4096, tie_word_embeddings=True, bos_token_id=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tied / name, tmp_path / "m" / name)
    recipe = gptq.updated({"weights.bits": 8, "weights.group_size": 16, "rotation": {}})
    plain, turned = distances(tmp_path / "m", recipe, tmp_path)
    assert turned < 1.5 * plain < 0.1


def test_the_head_of_a_tied_model_can_be_quantized(tied, gptq, tmp_path):
    quantize(tied, tmp_path / "q", gptq.updated({"weights.bits": 8, "rotation": {}, "ignore": ()}))
    assert "lm_head.weight" not in CheckpointReader(tmp_path / "q")
    assert float((packed(tmp_path / "q") - dense(tied)).norm() / dense(tied).norm()) < 0.05


def test_a_head_that_is_not_the_rotated_one_fails_the_proof(tied, rtn, tmp_path, monkeypatch):
    add = pipeline.CheckpointWriter.add
    monkeypatch.setattr(
        pipeline.CheckpointWriter,
        "add",
        lambda self, name, t: add(self, name, t * 2 if name == "lm_head.weight" else t),
    )
    with pytest.raises(ProofError, match=r"lm_head\.weight is not what was to be written"):
        quantize(tied, tmp_path / "q", rtn.updated({"rotation": {}}))


def test_a_rerun_gives_the_same_bytes(tied, gptq, tmp_path):
    quantize(tied, tmp_path / "q", gptq.updated({"rotation": {"residual": "random"}}))
    assert rerun(tmp_path / "q", tied).same


@pytest.mark.parametrize(
    "changes",
    [{"rotation": {}}, STEPS["smooth+gptq"] | {"weights.bits": 8}],
    ids=["rotation", "smooth"],
)
def test_a_run_that_was_stopped_continues_to_the_same_bytes(changes, tied, gptq, tmp_path):
    def stop(where: Progress) -> None:
        if where.block == 1:
            raise KeyboardInterrupt

    recipe = gptq.updated(changes)
    with pytest.raises(KeyboardInterrupt):
        quantize(tied, tmp_path / "stopped", recipe, None, Events(on_progress=stop))
    quantize(tied, tmp_path / "stopped", recipe)
    quantize(tied, tmp_path / "whole", recipe)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes(), path.name


def test_refused_before_anything_is_written(rtn, tmp_path):
    save("gemma2", tmp_path / "m")
    with pytest.raises(ArchitectureError, match="cannot be rotated"):
        quantize(tmp_path / "m", tmp_path / "q", rtn.updated({"rotation": {}}))
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plan_says_what_the_head_of_its_own_takes(dtype, tied, rtn):
    recipes = [rtn.updated({"rotation": wanted}) for wanted in (None, {})]
    plain, turned = (make_plan(tied, recipe, store_dtype=dtype) for recipe in recipes)
    grown = turned.bytes_on_disk - plain.bytes_on_disk
    (note,) = set(turned.notes) - set(plain.notes)
    assert f"{grown / 1e6:,.2f} MB more" in note
    packed_too = recipes[1].updated({"embeddings": {"bits": 8}})
    assert not any("rotation" in note for note in make_plan(tied, packed_too).notes)


def test_of_a_head_that_is_not_tied_nothing_is_said(make_model, rtn):
    untied = make_model()
    plain, turned = (make_plan(untied, rtn.updated({"rotation": r})) for r in (None, {}))
    assert turned.notes == plain.notes
    assert turned.bytes_on_disk == plain.bytes_on_disk


def test_an_allocation_measures_the_rotated_model(tied, gptq):
    options = AllocateOptions(
        5.0, widths=(4, 8), group_sizes=(32,), symmetric=True, probe_tokens=32
    )
    plain, turned = (allocate(tied, gptq.updated({"rotation": r}), options) for r in (None, {}))
    assert turned.recipe.rotation == gptq.updated({"rotation": {}}).rotation
    assert plain.predicted != turned.predicted


@pytest.mark.parametrize(
    ("given", "rotate", "expected"),
    [
        pytest.param(None, True, "hadamard", id="on"),
        pytest.param("random", True, "random", id="on with its own settings"),
        pytest.param("random", False, None, id="off"),
        pytest.param("random", None, "random", id="left"),
    ],
)
def test_the_command_line_switches_it(tmp_path, given, rotate, expected):
    file = tmp_path / "recipe.yaml"
    file.write_text(Recipe.model_validate({"rotation": given and {"residual": given}}).to_yaml())
    recipe = recipe_of({"recipe": str(file), "rotate": rotate})
    assert (recipe.rotation.residual if recipe.rotation else None) == expected
