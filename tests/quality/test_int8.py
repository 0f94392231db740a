"""Measured: what W8A8 costs the shipped model, and that SmoothQuant and rotation repair it where
activations have outliers.

The shipped model has no channel outliers to speak of, so they are planted: some channels of every
norm are multiplied by 32 and the columns that read them divided by it, which leaves every product
as it was (powers of two, stored in float32).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llmquant import Recipe, quantize
from llmquant_eval.run.evaluate import evaluate
from llmquant_eval.run.request import Request

pytestmark = pytest.mark.quality

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"
RECIPE = Recipe().updated(
    {
        "method": "rtn",
        "weights.bits": 8,
        "weights.group_size": -1,
        "weights.activations": "int8-dynamic",
        "scales.steps": 0,
        "calibration.source": f"file:{MODEL / 'calibration.txt'}",
        "calibration.nsamples": 8,
        "calibration.seqlen": 256,
    }
)
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
CHANNELS = [3, 77, 140, 201]


def planted(folder: Path) -> Path:
    """The shipped model in float32 with four large channels behind every norm of a block."""
    shutil.copytree(MODEL, folder)
    tensors = {name: t.float() for name, t in load_file(folder / "model.safetensors").items()}
    for name in [n for n in tensors if n.split(".")[-2] in READERS]:
        block, _, norm = name.removesuffix(".weight").rpartition(".")
        tensors[name][CHANNELS] *= 32
        for reader in READERS[norm]:
            tensors[f"{block}.{reader}.weight"][:, CHANNELS] /= 32
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return folder


def kl(folders: list[Path], reference: Path = MODEL) -> list[float]:
    request = Request(
        candidates=tuple(map(str, folders)),
        text=f"file:{MODEL / 'heldout.txt'}",
        reference=str(reference),
        protocol=None,
        window=512,
        max_windows=16,
        dtype="float32",
        device="cpu",
        kernel="dense",
        batch_size=8,
        cost=False,
        noise_floor=False,
    )
    return [m.metrics["kl_mean"].value for m in evaluate(request).models if m.role == "candidate"]


@pytest.mark.long
def test_smoothing_and_rotation_repair_planted_outliers(tmp_path: Path) -> None:
    outliers = planted(tmp_path / "outliers")
    runs = {
        "plain": (MODEL, RECIPE),
        "lost": (outliers, RECIPE),
        "smooth": (outliers, RECIPE.updated({"smooth": {}})),
        "rotated": (outliers, RECIPE.updated({"rotation": {}})),
    }
    for name, (model, recipe) in runs.items():
        quantize(model, tmp_path / name, recipe)
    same, plain, lost, smooth, turned = kl([outliers, *(tmp_path / name for name in runs)])
    print(
        f"KL: planted {same:.1e}, W8A8 {plain:.5f}, with outliers {lost:.5f}, smoothed {smooth:.5f}, rotated {turned:.5f}"
    )
    assert same < 1e-6
    assert lost > 5 * plain
    assert smooth < 1.5 * plain
    assert turned < 1.5 * plain
