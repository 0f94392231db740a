"""AWQ and SmoothQuant in whole runs: the finished folder holds the scaled norms, and its proof
fails when it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_walk_refined import WINDOWS, plan_of, run, weights_of
from tiny_models import STAGES, save

from llmquant.checkpoint.manifest import read_manifest
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.errors import ProofError
from llmquant.models.architectures import blocks_of
from llmquant.models.block_inputs import run_block
from llmquant.quantization import run as pipeline
from llmquant.quantization.blocks.capture import observe
from llmquant.quantization.blocks.materialize import materialized
from llmquant.quantization.calibrated import Calibrated, _Block
from llmquant.quantization.run import quantize
from llmquant.quantization.steps import finders
from llmquant.quantization.steps.rounding import Rounding
from llmquant.recipe import Recipe

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"
RECIPE = Recipe().updated({
    "method": "rtn", "awq": {"grid": 4}, "weights.bits": 3, "scales.steps": 2,
    "calibration": {"source": f"file:{MODEL / 'calibration.txt'}", "nsamples": 2, "seqlen": 32},
})  # fmt: skip


INT8 = {
    "weights.bits": 8,
    "weights.group_size": -1,
    "weights.symmetric": True,
    "weights.activations": "int8-dynamic",
}
SCALED = {
    "awq": {"awq": {"grid": 4}},
    "smooth": INT8 | {"smooth": {"alpha": "auto", "pairs": "all"}},
}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt", "gpt_neox"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("scaled", SCALED)
def test_every_pair_is_scaled_or_says_why(tmp_path, kind, method, scaled):
    for block in run(plan_of(save(kind, tmp_path / "model"), method=method, **SCALED[scaled])):
        assert {pair.method for pair in block.scaled} == {scaled}
        for pair in block.scaled:
            assert pair.after <= pair.before
            assert (pair.ratio is None) == (pair.reason is not None)
        norms = {
            f"{p.producer}.weight"
            for p in block.scaled
            if p.reason is None and f"{p.producer}" not in block.weights
        }
        assert norms <= block.changed.keys()
    assert weights_of([block])


SMOOTH = RECIPE.updated(INT8 | {"awq": None, "smooth": {"pairs": "all"}})


@pytest.mark.parametrize(
    ("recipe", "name"), [(RECIPE, "AWQ"), (SMOOTH, "SmoothQuant")], ids=["awq", "smooth"]
)
def test_the_folder_holds_the_scaled_norms(tmp_path, recipe, name):
    result = quantize(MODEL, tmp_path / "q", recipe)
    assert f"({name})" in (tmp_path / "q" / "README.md").read_text(encoding="utf-8")
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


def test_a_heavier_first_token_is_heavier_in_the_search_for_scales(tmp_path):
    folder = save("llama", tmp_path / "model")
    seen = []
    for share in (0.0, 0.9):
        awq = {"method": "rtn", "awq": {"grid": 4}, "calibration.first_token_share": share}
        plan = plan_of(folder, **awq)
        block, prefix = blocks_of(plan.model, plan.architecture)[0], "model.layers.0"
        inputs = Calibrated(Rounding(plan, lambda _: None), WINDOWS)._inputs
        with materialized(plan, block, f"{prefix}."):
            finder = finders._finder(plan, block, prefix, STAGES["llama"], inputs)
            linears = {n: block.get_submodule(n) for (n, *_) in STAGES["llama"]}
            wanted = observe(block, linears, inputs, first_token_share=share)
        for name, stats in wanted.items():
            assert torch.equal(finder._stats[name].hessian, stats.hessian)
        seen.append(wanted["self_attn.q_proj"].hessian)
    assert not torch.equal(*seen)


@pytest.mark.parametrize("pairs", ["norms", "all"])
def test_a_smoothed_block_computes_the_same(tmp_path, pairs):
    plan = plan_of(save("llama", tmp_path / "model"), **INT8, smooth={"alpha": 0.7, "pairs": pairs})
    walker = Calibrated(Rounding(plan, lambda _: None), WINDOWS)
    block, prefix = blocks_of(plan.model, plan.architecture)[0], "model.layers.0"
    with materialized(plan, block, f"{prefix}."):
        before = run_block(block, walker._inputs[0])
        weights = {n: p.clone() for n, p in block.named_parameters()}
        scaling = walker._scale(_Block(0, block, prefix, {}), STAGES["llama"])
        changed = {n for n, p in block.named_parameters() if not torch.equal(p, weights[n])}
        after = run_block(block, walker._inputs[0])
    assert len(scaling.reports) == {"norms": 2, "all": 4}[pairs]
    done = [r for r in scaling.reports if r.reason is None]
    touched = {f"{n}.weight" for r in done for n in (r.producer, *r.readers)}
    assert {f"{prefix}.{n}" for n in changed} == touched
    assert done
    assert float((after - before).norm() / before.norm()) < 1e-5


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
