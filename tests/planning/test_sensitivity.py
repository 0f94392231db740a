"""The sensitivity pass against a plain loop over whole forward passes of the whole model, and that
the loop notices slips."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_walk import WINDOWS, recipe_of, statistics
from tiny_models import save
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmquant.algorithms import factorize, gptq, layer_error, rtn
from llmquant.errors import QuantizationError
from llmquant.models.architectures import blocks_of, find
from llmquant.models.selection import fused_items
from llmquant.planning.allocation import sensitivity
from llmquant.planning.allocation.options import Kind
from llmquant.planning.allocation.quality_loss import Damage, anchors_of, interpolate
from llmquant.planning.allocation.sensitivity import Item, Probe, measure
from llmquant.quantization.plan import WalkPlan
from llmquant.quantization.prepare import prepare
from llmquant.spec import QuantSpec

SPECS = (
    QuantSpec(2, 16),
    QuantSpec(3, 8),
    QuantSpec(3, 16, False),
    QuantSpec(3, None),
    QuantSpec(8, None),
)
PROBE = [*WINDOWS[:2], WINDOWS[-1]]
Damages = list[dict[QuantSpec, Damage]]


def items_of(plan: WalkPlan, head: bool = False) -> list[Item]:
    linears = [n for n, m in plan.model.named_modules() if isinstance(m, nn.Linear)]
    names = [n for n in linears if head or n.startswith(f"{plan.architecture.blocks}.")]
    return [Item(block, members, SPECS) for block, members in fused_items(names, plan.architecture)]


def run(
    folder: Path, kind: Kind, *, head: bool = False, method: str = "gptq", share: float = 0.0
) -> tuple[list[Item], Damages]:
    plan = prepare(folder, recipe_of(**{"method": method, "calibration.first_token_share": share}))
    items = items_of(plan, head)
    return items, measured(plan, items, kind)


def measured(plan: WalkPlan, items: list[Item], kind: Kind) -> Damages:
    found = dict(measure(plan, dict(enumerate(items)), WINDOWS, Probe(kind, PROBE), lambda _: None))
    return [found[i] for i in range(len(items))]


@contextmanager
def block_outputs(model: PreTrainedModel, index: int) -> Iterator[list[torch.Tensor]]:
    """What the block gives, call by call."""
    seen: list[torch.Tensor] = []
    block = blocks_of(model, find(model, model.config.model_type))[index]
    handle = block.register_forward_hook(
        lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    yield seen
    handle.remove()


def plain(
    folder: Path, items: list[Item], kind: Kind, method: str = "gptq", share: float = 0.0
) -> list[dict[QuantSpec, tuple[float, float]]]:
    """Layer error per token and damage of every item and scheme, each from whole forward passes."""
    plan = prepare(folder, recipe_of(method=method))
    model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        .eval()
        .requires_grad_(False)
    )
    stats = statistics(model, [n for item in items for n in item.names], 2, share)
    found = []
    for item in items:
        table = {}
        for spec in item.specs:
            rounded, layer = {}, 0.0
            for name in item.names:
                weight, mine = model.get_submodule(name).weight.clone(), stats[name]
                if method == "rtn":
                    rounded[name] = rtn(weight, spec, plan.search, mine.importance).dequantize()
                else:
                    rounded[name] = gptq(
                        weight, factorize(mine.hessian, plan.gptq_options), spec, plan.gptq_options
                    ).dequantize()
                signal = float(((weight @ mine.hessian) * weight).sum())
                layer += layer_error(weight, rounded[name], mine.hessian) * signal / mine.tokens
            table[spec] = (layer, plain_damage(model, item, rounded, kind))
        found.append(table)
    return found


def plain_damage(
    model: PreTrainedModel, item: Item, rounded: dict[str, torch.Tensor], kind: Kind
) -> float:
    def outputs() -> list[torch.Tensor]:
        if kind == "kl":
            return [
                model(input_ids=w[None], use_cache=False).logits[0].log_softmax(-1) for w in PROBE
            ]
        with block_outputs(model, item.block) as seen:
            for w in PROBE:
                model(input_ids=w[None], use_cache=False)
        return [y[0] for y in seen]

    before = outputs()
    originals = {n: model.get_submodule(n).weight.data for n in rounded}
    for name, weight in rounded.items():
        model.get_submodule(name).weight.data = weight
    after = outputs()
    for name, weight in originals.items():
        model.get_submodule(name).weight.data = weight
    tokens = sum(w.numel() for w in PROBE)
    if kind == "kl":
        return (
            sum(float((p.exp() * (p - q)).sum()) for p, q in zip(before, after, strict=True))
            / tokens
        )
    return (
        sum(
            float(((y - z).norm(dim=-1) / y.norm(dim=-1)).square().sum())
            for y, z in zip(before, after, strict=True)
        )
        / tokens
    )


def disagreement(damages: Damages, expected: list[dict[QuantSpec, tuple[float, float]]]) -> float:
    """The largest relative difference of a layer error or a measured damage from the plain
    loop's."""
    worst = 0.0
    for mine, other in zip(damages, expected, strict=True):
        for spec, damage in mine.items():
            layer, whole = other[spec]
            worst = max(worst, abs(damage.layer / layer - 1))
            if damage.measured is not None:
                worst = max(worst, abs(damage.measured / whole - 1))
    return worst


KINDS = [
    *((kind, "kl") for kind in ("llama", "mistral", "qwen3", "qwen2 mixed windows", "opt")),
    *((kind, "block") for kind in ("qwen2 mixed windows", "gpt_neox", "opt")),
]


@pytest.mark.parametrize(("kind", "sort"), KINDS, ids=[f"{kind}, {sort}" for kind, sort in KINDS])
def test_it_measures_what_a_plain_loop_measures(tmp_path: Path, kind: str, sort: Kind) -> None:
    folder = save(kind, tmp_path / "model")
    items, damages = run(folder, sort)
    assert all(sum(d.measured is not None for d in table.values()) == 2 for table in damages)
    assert disagreement(damages, plain(folder, items, sort)) < 2e-3


def test_rounding_to_nearest_is_judged_as_such(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    items, damages = run(folder, "kl", method="rtn")
    assert disagreement(damages, plain(folder, items, "kl", "rtn")) < 2e-3


def test_a_heavier_first_token_is_heavier_here_too(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    items, damages = run(folder, "kl", head=True, share=0.25)
    assert disagreement(damages, plain(folder, items, "kl", share=0.25)) < 2e-3
    assert disagreement(damages, plain(folder, items, "kl")) > 2e-3


def test_a_tied_head_sees_the_embeddings(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model", tie_word_embeddings=True)
    items, damages = run(folder, "kl")
    assert disagreement(damages, plain(folder, items, "kl")) < 2e-3


def test_the_head_is_an_item_like_any_other(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    items, damages = run(folder, "kl", head=True)
    assert items[-1] == Item(None, ("lm_head",), SPECS)
    assert disagreement(damages[-1:], plain(folder, items[-1:], "kl")) < 2e-3
    _, by_block = run(folder, "block", head=True)
    plan = prepare(folder, recipe_of())
    stats = statistics(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), ["lm_head"], 2
    )["lm_head"]
    weight = plan.reader.read("lm_head.weight")
    for spec, damage in by_block[-1].items():
        rounded = gptq(weight, factorize(stats.hessian, plan.gptq_options), spec, plan.gptq_options)
        if damage.measured is not None:
            assert damage.measured == pytest.approx(
                layer_error(weight, rounded.dequantize(), stats.hessian), rel=2e-3
            )


def test_the_model_is_empty_again_afterwards(tmp_path: Path) -> None:
    for tied in (False, True):
        plan = prepare(save("llama", tmp_path / str(tied), tie_word_embeddings=tied), recipe_of())
        measured(plan, items_of(plan), "kl")
        assert {p.device.type for p in plan.model.parameters()} == {"meta"}


SLIPS = [
    pytest.param(
        "already_run",
        lambda f: lambda blocks, index, given: f(blocks, index + 1 if index else 0, given),
        id="the block itself skipped",
    ),
    pytest.param(
        "swapped",
        lambda f: lambda linears, rounded, dtype: f(dict([*linears.items()][:1]), rounded, dtype),
        id="only the first linear of an item rounded",
    ),
    pytest.param(
        "divergence",
        lambda f: lambda reference, changed: f(changed, reference),
        id="KL the wrong way round",
    ),
]


@pytest.mark.parametrize(("name", "wrong"), SLIPS)
def test_a_slip_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, wrong
) -> None:
    folder = save("llama", tmp_path / "model")
    monkeypatch.setattr(sensitivity, name, wrong(getattr(sensitivity, name)))
    items, damages = run(folder, "kl")
    assert disagreement(damages, plain(folder, items, "kl")) > 1e-2


def test_nan_is_an_error_that_names_the_linear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save("llama", tmp_path / "model")
    monkeypatch.setattr(
        sensitivity,
        "divergence",
        lambda reference, _: torch.full_like(reference[0, :, 0], math.nan),
    )
    with pytest.raises(
        QuantizationError,
        match=r"model\.layers\.0\.self_attn\.q_proj: .* NaN or Inf .*--dtype float32",
    ):
        run(folder, "kl")


def test_one_scheme_per_low_width_is_measured_that_of_median_error() -> None:
    layer = {
        QuantSpec(3, 32): 1.0,
        QuantSpec(3, 64): 3.0,
        QuantSpec(3, 128): 2.0,
        QuantSpec(2, 32): 9.0,
        QuantSpec(8, 32): 0.01,
    }
    assert anchors_of(layer) == [QuantSpec(2, 32), QuantSpec(3, 128)]
    assert anchors_of({QuantSpec(8, 32): 0.01}) == [QuantSpec(8, 32)]


def test_the_others_follow_by_their_layer_errors() -> None:
    layer = {
        QuantSpec(2, 32): 8.0,
        QuantSpec(3, 32): 1.0,
        QuantSpec(3, 64): 3.0,
        QuantSpec(8, 32): 0.01,
    }
    found = interpolate(layer, {QuantSpec(2, 32): 0.9, QuantSpec(3, 64): 0.06})
    assert {s: d.predicted for s, d in found.items()} == pytest.approx(
        {
            QuantSpec(2, 32): 0.9,
            QuantSpec(3, 32): 0.02,
            QuantSpec(3, 64): 0.06,
            QuantSpec(8, 32): 0.0002,
        }
    )
    assert {s: d.measured for s, d in found.items()} == {
        QuantSpec(2, 32): 0.9,
        QuantSpec(3, 32): None,
        QuantSpec(3, 64): 0.06,
        QuantSpec(8, 32): None,
    }


def test_a_layer_without_error_has_no_damage() -> None:
    specs = (QuantSpec(4, 32), QuantSpec(4, 64))
    assert {
        d.predicted for d in interpolate(dict.fromkeys(specs, 0.0), {specs[0]: 1e-9}).values()
    } == {0.0}


def test_a_scheme_is_rounded_as_the_run_rounds_it(tmp_path: Path) -> None:
    """With the recipe's refinement of GPTQ, not by plain GPTQ."""
    folder = save("llama", tmp_path / "model")
    found = []
    for passes in (0, 4):
        plan = prepare(folder, recipe_of(method="gptq", **{"gptq.passes": passes}))
        found.append(measured(plan, items_of(plan), "block"))
    plain, refined = ([d.layer for table in damages for d in table.values()] for damages in found)
    assert sum(refined) < sum(plain)
