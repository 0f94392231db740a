"""AWQ in whole runs: the finished folder holds the scaled norms, and its proof fails when it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_walk_refined import plan_of, run, weights_of
from tiny_models import save

from llmquant import pipeline
from llmquant.checkpoint import CheckpointReader
from llmquant.errors import ProofError
from llmquant.manifest import read_manifest
from llmquant.pipeline import quantize
from llmquant.recipe import Recipe

MODEL = Path(__file__).parent.parent / "examples" / "tiny-llama"
RECIPE = Recipe().updated({
    "method": "rtn", "awq": {"grid": 4}, "weights.bits": 3, "scales.steps": 2,
    "calibration": {"source": f"file:{MODEL / 'calibration.txt'}", "nsamples": 2, "seqlen": 32},
})  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt", "gpt_neox"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_every_pair_is_scaled_or_says_why(tmp_path, kind, method):
    for block in run(plan_of(save(kind, tmp_path / "model"), method=method, awq={"grid": 4})):
        assert block.scaled
        for pair in block.scaled:
            assert pair.after <= pair.before
            assert (pair.ratio is None) == (pair.reason is not None)
        norms = {f"{p.producer}.weight" for p in block.scaled if p.reason is None and f"{p.producer}" not in block.weights}
        assert norms <= block.changed.keys()
    assert weights_of([block])


def test_the_folder_holds_the_scaled_norms(tmp_path):
    result = quantize(MODEL, tmp_path / "q", RECIPE)
    before, after = CheckpointReader(MODEL), CheckpointReader(tmp_path / "q")
    pairs = [p for block in read_manifest(tmp_path / "q").scaled.values() for p in block]
    norms = [p for p in pairs if p.producer.endswith("layernorm")]
    assert len(pairs) == 24
    assert any(p.reason is None for p in norms)
    assert sum(map(len, result.scaled.values())) == 24
    for pair in norms:
        name = f"{pair.producer}.weight"
        assert after.read(name).dtype == before.read(name).dtype
        assert torch.equal(after.read(name), before.read(name)) == (pair.reason is not None)
    assert "(AWQ)" in (tmp_path / "q" / "README.md").read_text(encoding="utf-8")


def test_a_norm_that_is_not_the_computed_one_fails_the_proof(tmp_path, monkeypatch):
    add = pipeline.CheckpointWriter.add
    seen = []

    def wrong(self, name, tensor):
        if name.endswith("input_layernorm.weight") and not seen:
            seen.append(name)
            tensor = tensor * 2
        add(self, name, tensor)

    monkeypatch.setattr(pipeline.CheckpointWriter, "add", wrong)
    with pytest.raises(ProofError, match=r"input_layernorm\.weight is not what was to be written"):
        quantize(MODEL, tmp_path / "q", RECIPE)
    assert not (tmp_path / "q").exists()
