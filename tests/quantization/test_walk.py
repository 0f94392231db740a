"""The walk against a naive whole-model implementation: the same bits for every weight, one block in
memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import STAGES, save, token_windows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from walk_plans import THREE_BITS, plan_of

from llmquant.algorithms import factorize, gptq, layer_error, rtn
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.errors import ArchitectureError, CheckpointError, QuantizationError
from llmquant.models.architectures import find, norm_of
from llmquant.models.from_folder import empty_model
from llmquant.models.naming.names import as_in_checkpoint
from llmquant.quantization.plan import BlockResult, Progress, WalkPlan, batched
from llmquant.quantization.walk import walk
from llmquant.recipe import Recipe
from llmquant.records import ModuleReport
from llmquant.stats import InputStats
from llmquant.weight import QuantizedWeight

CPU = torch.device("cpu")
WINDOWS = [*token_windows(5, 12), *token_windows(2, 9, seed=1)]
TOKENS = 5 * 12 + 2 * 9
Weights = dict[str, QuantizedWeight]


def recipe_of(**changes: Any) -> Recipe:
    return Recipe().updated(THREE_BITS | {"method": "gptq"} | changes)


def results(
    plan: WalkPlan, windows: list[Tensor], on_progress: Callable[[Progress], None] = lambda _: None
) -> Weights:
    return {
        name: weight
        for block in walk(plan, windows, on_progress)
        for name, (weight, _) in block.weights.items()
    }


def reports(plan: WalkPlan, windows: list[Tensor]) -> dict[str, ModuleReport]:
    return {
        name: report
        for block in walk(plan, windows, lambda _: None)
        for name, (_, report) in block.weights.items()
    }


def digests(weights: Weights) -> dict[str, str]:
    return {name: weight.digest() for name, weight in weights.items()}


def statistics(
    model: PreTrainedModel, names: list[str], batch_size: int, share: float = 0.0
) -> dict[str, InputStats]:
    """Input statistics of linears from whole forward passes of the whole model."""
    linears = {name: model.get_submodule(name) for name in names}
    stats = {
        name: InputStats(linear.in_features, first_token_share=share)
        for name, linear in linears.items()
    }
    handles = [
        linear.register_forward_pre_hook(lambda _m, args, name=name: stats[name].add(args[0]))
        for name, linear in linears.items()
    ]
    with torch.no_grad():
        for ids in batched(WINDOWS, batch_size):
            model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return stats


def naive(folder: Path, plan: WalkPlan, steps: list[list[str]]) -> Weights:
    """Quantize the fully loaded model, running all of it from its tokens before each step's linears
    are quantized."""
    model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        .eval()
        .requires_grad_(False)
    )
    as_in_checkpoint(model, model.config.model_type)
    options, done = plan.gptq_options, {}
    for names in steps:
        wanted = plan.recipe.calibration
        stats = statistics(model, names, wanted.batch_size, wanted.first_token_share)
        for name in names:
            linear = model.get_submodule(name)
            factor = factorize(stats[name].hessian, options)
            done[name] = gptq(linear.weight, factor, plan.specs[name], options)
        for name in names:
            model.get_submodule(name).weight.data = done[name].dequantize()
    return done


# Those left out differ from one that is here in names alone.
KINDS = [k for k in STAGES if k not in ("phimoe", "granitemoe", "qwen2_moe")]
KINDS += ["qwen2 mixed windows"]


def steps_of(plan: WalkPlan, stages: list[tuple[str, ...]], together: bool) -> list[list[str]]:
    """The linears of each step, by full name: a stage each, or a whole block at once."""
    found: list[list[str]] = []
    for block in range(2):
        each = [
            [f"{plan.architecture.blocks}.{block}.{name}" for name in stage] for stage in stages
        ]
        found.extend([[name for stage in each for name in stage]] if together else each)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints of the tiny models, each made once."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = save(kind, tmp_path_factory.mktemp("model") / kind.replace(" ", "-"))
        return made[kind]

    return folder


@pytest.fixture
def llama(folders: Callable[[str], Path]) -> Path:
    return folders("llama")


@pytest.mark.parametrize("sequential", [True, False], ids=["true_sequential", "a block at once"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_walk_equals_the_naive_whole_model_run(folders, kind, sequential):
    folder = folders(kind)
    plan = plan_of(folder, recipe_of(**{"gptq.true_sequential": sequential}))
    stages = STAGES.get(kind, STAGES["qwen2"])
    expected = naive(folder, plan, steps_of(plan, stages, together=not sequential))
    got = results(plan, WINDOWS)
    # Experts do not read one another, so the walk takes their first linears together, then their
    # second ones.
    assert list(got) == list(expected) or (
        plan.architecture.experts and sorted(got) == sorted(expected)
    )
    assert digests(got) == digests(expected)


@pytest.mark.parametrize("order", ["off", "group"])
def test_every_act_order_goes_through_the_walk(llama, order):
    plan = plan_of(llama, recipe_of(**{"gptq.act_order": order}))
    assert digests(results(plan, WINDOWS)) == digests(
        naive(llama, plan, steps_of(plan, STAGES["llama"], together=False))
    )


def test_true_sequential_changes_every_stage_but_the_first(llama):
    on, off = (
        digests(results(plan_of(llama, recipe_of(**{"gptq.true_sequential": v})), WINDOWS))
        for v in (True, False)
    )
    same = {name for name in on if on[name] == off[name]}
    assert same == {f"model.layers.0.self_attn.{p}_proj" for p in "qkv"}


def test_later_blocks_see_the_errors_of_earlier_ones(llama):
    everything = digests(results(plan_of(llama, recipe_of()), WINDOWS))
    second = plan_of(llama, recipe_of(), select=lambda name: ".layers.1." in name)
    alone = digests(results(second, WINDOWS))
    assert list(alone) == [name for name in everything if ".layers.1." in name]
    assert all(alone[name] != everything[name] for name in alone)


def test_a_block_with_nothing_to_quantize_still_yields_and_passes_on(llama):
    plan = plan_of(llama, recipe_of(), select=lambda name: name.endswith("layers.1.mlp.down_proj"))
    first, second = walk(plan, WINDOWS, lambda _: None)
    assert first == BlockResult(0, {})
    assert (second.index, list(second.weights)) == (1, ["model.layers.1.mlp.down_proj"])
    expected = naive(llama, plan, [["model.layers.1.mlp.down_proj"]])
    assert (
        second.weights["model.layers.1.mlp.down_proj"][0].digest()
        == expected["model.layers.1.mlp.down_proj"].digest()
    )


def real_parameters(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.is_meta}


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_one_block_at_a_time_is_in_memory_and_none_afterwards(llama, method):
    plan = plan_of(llama, recipe_of(method=method), head=True)
    seen: dict[int, set[str]] = {}
    for block in walk(
        plan, WINDOWS, lambda p: seen.setdefault(p.block, set()).update(real_parameters(plan.model))
    ):
        assert real_parameters(plan.model) == set(), f"after block {block.index}"
    names = [name for name, _ in plan.model.named_parameters()]
    assert seen == {
        0: {name for name in names if name.startswith("model.layers.0.")},
        1: {name for name in names if name.startswith("model.layers.1.")},
        2: set(),
    }


def test_progress_names_every_module_once(llama):
    plan = plan_of(llama, recipe_of(), head=True)
    told: list[Progress] = []
    results(plan, WINDOWS, told.append)
    assert [p.module for p in told] == list(plan.specs)
    assert {(p.block, p.blocks) for p in told} == {(0, 3), (1, 3), (2, 3)}


def test_rtn_without_windows_never_runs_the_model(llama, monkeypatch):
    plan = plan_of(llama, recipe_of(method="rtn"), head=True)

    def never(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a data-free method ran the model")

    for module in plan.model.modules():
        monkeypatch.setattr(module, "forward", never)
    got = results(plan, [])
    assert list(got) == list(plan.specs)
    for name, weight in got.items():
        expected = rtn(plan.reader.read(f"{name}.weight"), plan.specs[name], plan.search)
        assert weight.digest() == expected.digest()


def test_rtn_with_windows_weighs_the_search_by_importance(llama):
    plan = plan_of(llama, recipe_of(method="rtn", **{"scales.weighted": True}))
    model = (
        AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        .eval()
        .requires_grad_(False)
    )
    name = "model.layers.0.self_attn.q_proj"
    importance = statistics(model, [name], 2)[name].importance
    expected = rtn(plan.reader.read(f"{name}.weight"), plan.specs[name], plan.search, importance)
    assert results(plan, WINDOWS)[name].digest() == expected.digest()
    assert (
        expected.digest()
        != rtn(plan.reader.read(f"{name}.weight"), plan.specs[name], plan.search).digest()
    )


def test_gptq_without_windows_is_refused_and_never_becomes_rtn(llama):
    with pytest.raises(QuantizationError, match="method gptq needs calibration windows"):
        next(walk(plan_of(llama, recipe_of()), [], lambda _: None))


def test_the_head_is_calibrated_on_the_normed_output_of_the_quantized_blocks(llama):
    plan = plan_of(llama, recipe_of(), head=True)
    expected = naive(llama, plan, [*steps_of(plan, STAGES["llama"], together=False), ["lm_head"]])
    assert digests(results(plan, WINDOWS)) == digests(expected)
    assert norm_of(plan.model, plan.architecture).weight.is_meta


def test_a_heavier_first_token_is_heavier_everywhere(llama):
    share = {"calibration.first_token_share": 0.25}
    plan = plan_of(llama, recipe_of(**share), head=True)
    expected = naive(llama, plan, [*steps_of(plan, STAGES["llama"], together=False), ["lm_head"]])
    got = digests(results(plan, WINDOWS))
    assert got == digests(expected)
    plain = digests(results(plan_of(llama, recipe_of(), head=True), WINDOWS))
    assert all(plain[name] != got[name] for name in got)


def test_reports_say_what_was_done(llama):
    plan = plan_of(
        llama, recipe_of(), select=lambda name: name.endswith("layers.0.self_attn.k_proj")
    )
    name = "model.layers.0.self_attn.k_proj"
    model = (
        AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        .eval()
        .requires_grad_(False)
    )
    hessian = statistics(model, [name], 2)[name].hessian
    weight, quantized = plan.reader.read(f"{name}.weight"), results(plan, WINDOWS)[name]
    report = reports(plan, WINDOWS)[name]
    delta = (weight - quantized.dequantize()).double()
    assert report.weight_error == pytest.approx(
        float(delta.square().sum() / weight.double().square().sum()), rel=1e-5
    )
    assert report.output_error == layer_error(weight, quantized.dequantize(), hessian)
    assert (report.name, report.spec, report.digest) == (
        name,
        str(plan.specs[name]),
        quantized.digest(),
    )
    assert report.shape == tuple(weight.shape)
    assert (report.tokens, report.dropped, report.dead, report.damping) == (TOKENS, 0, 0, 0.01)


def changed_copy(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


def test_dead_channels_are_reported(llama, tmp_path):
    def silence(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][3:7] = 0

    folder = changed_copy(llama, tmp_path / "silent", silence)
    found = reports(plan_of(folder, recipe_of()), WINDOWS)
    assert {name: report.dead for name, report in found.items() if report.dead} == {
        "model.layers.0.mlp.down_proj": 4
    }


def test_damping_that_had_to_rise_is_reported(llama):
    # Twelve tokens leave the Hessians singular, and float32 cannot factorize them at a damping far
    # below its roundoff.
    found = reports(plan_of(llama, recipe_of(**{"gptq.damping": 1e-12})), WINDOWS[:1])
    assert all(report.tokens == 12 for report in found.values())
    assert all(
        report.damping is not None and 1e-9 < report.damping < 1e-3 for report in found.values()
    )


def poison(name: str, row: int | None = None) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        if row is None:
            tensors[name].fill_(torch.nan)
        else:
            tensors[name][row] = torch.nan

    return change


TOKEN = int(WINDOWS[0][5])
BROKEN = {
    "a weight": (
        poison("model.layers.1.mlp.up_proj.weight", 0),
        r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or Inf",
    ),
    "a norm": (
        poison("model.layers.0.input_layernorm.weight"),
        "input_layernorm.weight holds NaN or Inf",
    ),
    "a token's embedding": (
        poison("model.embed_tokens.weight", TOKEN),
        "embed_tokens.weight holds NaN or Inf",
    ),
    "statistics that overflow": (
        lambda tensors: tensors["model.layers.0.input_layernorm.weight"].fill_(1e30),
        r"^model\.layers\.0\.self_attn\.q_proj: its calibration statistics overflowed",
    ),
}


@pytest.mark.parametrize(("change", "told"), BROKEN.values(), ids=BROKEN)
def test_numbers_that_are_not_finite_stop_the_walk_by_name(llama, tmp_path, change, told):
    plan = plan_of(changed_copy(llama, tmp_path / "broken", change), recipe_of())
    with pytest.raises(QuantizationError, match=told):
        results(plan, WINDOWS)
    assert real_parameters(plan.model) == set()


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: (tensors.pop(name), None)[1]


def with_shape(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


UNLIKE_ITS_CONFIG = {
    "no embedding": (
        without("model.embed_tokens.weight"),
        r"tensor model\.embed_tokens\.weight of the model is not in",
    ),
    "no norm in a block": (
        without("model.layers.1.post_attention_layernorm.weight"),
        r"tensor model\.layers\.1\.post_attention_layernorm\.weight of the model is not in the checkpoint",
    ),
    "no weight to quantize": (
        without("model.layers.0.mlp.up_proj.weight"),
        r"tensor model\.layers\.0\.mlp\.up_proj\.weight",
    ),
    "another shape": (
        with_shape("model.layers.1.mlp.up_proj.weight", 40, 32),
        r"model\.layers\.1\.mlp\.up_proj\.weight is \[40, 32\] in the checkpoint, config\.json makes it \[48, 32\]",
    ),
}


@pytest.mark.parametrize(("change", "told"), UNLIKE_ITS_CONFIG.values(), ids=UNLIKE_ITS_CONFIG)
def test_a_checkpoint_unlike_its_config_names_the_tensor(llama, tmp_path, change, told):
    plan = plan_of(llama, recipe_of())
    # As if the files changed after the plan was made, which refuses such a checkpoint itself.
    damaged = CheckpointReader(changed_copy(llama, tmp_path / "unlike", change))
    plan = replace(plan, source=replace(plan.source, reader=damaged))
    with pytest.raises(CheckpointError, match=told):
        results(plan, WINDOWS)
    assert real_parameters(plan.model) == set()


def test_the_checkpoint_on_disk_is_never_written_to(llama):
    before = (llama / "model.safetensors").read_bytes()
    results(plan_of(llama, recipe_of()), WINDOWS)
    assert (llama / "model.safetensors").read_bytes() == before


def test_the_same_walk_twice_gives_the_same_bits(llama):
    plan = plan_of(llama, recipe_of())
    assert digests(results(plan, WINDOWS)) == digests(results(plan, WINDOWS))


def test_a_walk_can_be_left_in_the_middle(llama):
    plan = plan_of(llama, recipe_of())
    steps: Iterator[BlockResult] = walk(plan, WINDOWS, lambda _: None)
    assert next(steps).index == 0
    steps.close()  # type: ignore[attr-defined]
    assert real_parameters(plan.model) == set()


def test_an_architecture_without_a_block_list_is_refused_by_name(llama):
    model = empty_model(CheckpointReader(llama), torch.float32)
    model.model.layers = nn.ModuleList(model.model.layers[:1])
    with pytest.raises(
        ArchitectureError, match="model type 'unheard-of' is not in llmquant's table"
    ):
        find(model, "unheard-of")


@pytest.mark.parametrize(
    ("lengths", "size", "shapes"),
    [
        pytest.param([4, 4, 4], 2, [(2, 4), (1, 4)], id="equal lengths, a smaller last batch"),
        pytest.param(
            [4, 7, 4, 7, 2], 8, [(2, 7), (2, 4), (1, 2)], id="unequal lengths are never padded"
        ),
        pytest.param([3], 8, [(1, 3)], id="one window"),
        pytest.param([], 8, [], id="none"),
    ],
)
def test_batches_hold_windows_of_one_length_and_lose_none(lengths, size, shapes):
    windows = [torch.arange(n) + 100 * i for i, n in enumerate(lengths)]
    batches = batched(windows, size)
    assert [tuple(b.shape) for b in batches] == shapes
    assert sorted(row.tolist() for b in batches for row in b) == sorted(w.tolist() for w in windows)
