"""Asymmetric calibration, descent and tuning inside the walk, against whole runs of the original
and the quantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import walk_plans
from tiny_models import STAGES, save, token_windows
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from walk_plans import THREE_BITS

from llmquant.algorithms import asymmetric_target, descend, factorize, gptq
from llmquant.errors import QuantizationError
from llmquant.quantization.plan import BlockResult, WalkPlan, batched
from llmquant.quantization.walk import walk
from llmquant.recipe import Recipe
from llmquant.records import TuneReport
from llmquant.stats import PairStats
from llmquant.weight import QuantizedWeight

CPU = torch.device("cpu")
WINDOWS = [*token_windows(6, 12), *token_windows(2, 9, seed=1)]
TUNE = {"steps": 24, "lr": 0.01, "scale_lr": 0.002, "batch_size": 2, "checks": 4, "patience": 4}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("model") / "llama")


def plan_of(folder: Path, **changes: Any) -> WalkPlan:
    return walk_plans.plan_of(folder, Recipe().updated(THREE_BITS | changes))


def run(plan: WalkPlan) -> list[BlockResult]:
    return list(walk(plan, WINDOWS, lambda _: None))


def weights_of(blocks: list[BlockResult]) -> dict[str, QuantizedWeight]:
    return {name: weight for block in blocks for name, (weight, _) in block.weights.items()}


def digests(weights: dict[str, QuantizedWeight]) -> dict[str, str]:
    return {name: weight.digest() for name, weight in weights.items()}


def whole(folder: Path) -> PreTrainedModel:
    return (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        .eval()
        .requires_grad_(False)
    )


def inputs_of(
    model: PreTrainedModel, names: list[str], batches: list[Tensor]
) -> dict[str, list[Tensor]]:
    """What each named module reads in whole passes of the whole model."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: seen[name].append(args[0])
        )
        for name in names
    ]
    with torch.no_grad():
        for ids in batches:
            model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("strength", "passes", "share"),
    [(1.0, 0, 0.0), (0.5, 2, 0.0), (0.5, 0, 0.25)],
    ids=["asymmetric", "half asymmetric, two passes", "half asymmetric, first tokens count"],
)
@pytest.mark.parametrize("sequential", [True, False], ids=["true_sequential", "a block at once"])
def test_the_walk_equals_the_naive_run_of_both_models(llama, strength, passes, share, sequential):
    changes = {
        "calibration.first_token_share": share,
        "gptq.asymmetric": strength,
        "gptq.passes": passes,
        "gptq.true_sequential": sequential,
    }
    plan = plan_of(llama, **changes)
    original, model, done = whole(llama), whole(llama), {}
    stages = (
        STAGES["llama"] if sequential else [tuple(n for stage in STAGES["llama"] for n in stage)]
    )
    batches = batched(WINDOWS, 2)
    for block in range(2):
        for stage in stages:
            names = [f"model.layers.{block}.{name}" for name in stage]
            read, wanted = inputs_of(model, names, batches), inputs_of(original, names, batches)
            for name in names:
                linear = model.get_submodule(name)
                stats = PairStats(linear.in_features, first_token_share=share)
                for x, f in zip(read[name], wanted[name], strict=True):
                    stats.add_pair(x, f)
                factor = factorize(stats.hessian, plan.gptq_options)
                target = asymmetric_target(
                    linear.weight, stats.hessian, stats.cross, factor, strength
                )
                rounded = gptq(target, factor, plan.specs[name], plan.gptq_options)
                damped = stats.hessian + 0.01 * stats.hessian.diagonal().mean() * torch.eye(
                    linear.in_features
                )
                done[name] = descend(target, rounded, damped, passes, plan.gptq_options.block_size)
            for name in names:
                model.get_submodule(name).weight.data = done[name].dequantize()
    assert digests(weights_of(run(plan))) == digests(done)


def test_the_first_linears_have_no_error_behind_them_to_mend(llama):
    plain, mended = (
        digests(weights_of(run(plan_of(llama, **{"gptq.asymmetric": a})))) for a in (0.0, 1.0)
    )
    assert {name for name in plain if plain[name] == mended[name]} == {
        f"model.layers.0.self_attn.{p}_proj" for p in "qkv"
    }


def block_error(
    folder: Path, weights: dict[str, QuantizedWeight], block: int, on_same_inputs: bool
) -> float:
    """Mean squared difference behind a block, from whole passes of the whole models with nothing of
    the walk in them."""
    original, model = whole(folder), whole(folder)
    for name, weight in weights.items():
        if int(name.split(".")[2]) <= block:
            model.get_submodule(name).weight.data = weight.dequantize()
    if on_same_inputs:
        for name, weight in weights.items():
            if int(name.split(".")[2]) < block:
                original.get_submodule(name).weight.data = weight.dequantize()
    outputs: dict[str, list[Tensor]] = {"model": [], "original": []}
    for kind, one in (("model", model), ("original", original)):
        one.model.layers[block].register_forward_hook(
            lambda _m, _a, out, kind=kind: outputs[kind].append(out)
        )
        with torch.no_grad():
            for ids in batched(WINDOWS, 2):
                one(input_ids=ids, use_cache=False)
    return float(
        torch.cat([(a - b).flatten() for a, b in zip(*outputs.values(), strict=True)])
        .double()
        .square()
        .mean()
    )


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("target", ["original", "block"])
def test_a_tuned_block_reports_the_error_that_the_whole_models_show(llama, target, method):
    blocks = run(plan_of(llama, method=method, tune={**TUNE, "target": target}))
    weights = weights_of(blocks)
    for block in blocks:
        assert block.tuned is not None
        expected = block_error(llama, weights, block.index, on_same_inputs=target == "block")
        assert block.tuned.after == pytest.approx(expected, rel=1e-3)
        assert 0 < block.tuned.after < block.tuned.before
        assert 0 < block.tuned.step <= block.tuned.steps <= TUNE["steps"]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_tuning_begins_at_the_rounding_algorithms_result(llama, method):
    start = weights_of(run(plan_of(llama, method=method, **{"calibration.batch_size": 2})))
    first = run(plan_of(llama, method=method, tune=TUNE))[0]
    assert isinstance(first.tuned, TuneReport)
    assert first.tuned.before == pytest.approx(
        block_error(llama, start, 0, on_same_inputs=False), rel=1e-3
    )


def test_a_tuned_linear_reports_its_final_numbers(llama):
    plan = plan_of(llama, tune=TUNE)
    for block in run(plan):
        for name, (weight, report) in block.weights.items():
            original = plan.reader.read(f"{name}.weight").double()
            expected = (
                original - weight.dequantize(torch.float64)
            ).square().sum() / original.square().sum()
            assert report.digest == weight.digest()
            assert report.weight_error == pytest.approx(float(expected), rel=1e-5)
            assert report.output_error is None


def test_tuning_twice_gives_the_same_and_another_seed_does_not(llama):
    found = [digests(weights_of(run(plan_of(llama, tune=TUNE, seed=seed)))) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_groups_in_visiting_order_are_tuned_too(llama):
    blocks = run(plan_of(llama, tune=TUNE, **{"gptq.act_order": "group"}))
    assert all(
        block.tuned is not None and block.tuned.after < block.tuned.before for block in blocks
    )
    assert all(weight.g_idx is not None for weight in weights_of(blocks).values())


def test_tuning_leaves_nothing_of_a_block_in_memory(llama):
    plan = plan_of(llama, tune=TUNE, **{"gptq.asymmetric": 0.5})
    for _ in walk(plan, WINDOWS, lambda _: None):
        assert all(parameter.is_meta for parameter in plan.model.parameters())


def test_rtn_with_tuning_needs_text(llama):
    with pytest.raises(QuantizationError, match=r"method rtn\+tune needs calibration windows"):
        next(walk(plan_of(llama, method="rtn", tune=TUNE), [], lambda _: None))
