"""Folding leaves a block's function alone, in float64 to the last digits; slips in it are
noticed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import STAGES, random_model, token_windows
from torch import Tensor

from llmquant.models.architectures import blocks_of, find
from llmquant.models.block_inputs import BlockInput, first_inputs, run_with
from llmquant.quantization.steps.folding import (
    Pair,
    checked,
    fold,
    head_channels,
    names_of,
    norm_pairs,
)

GATED = ("llama", "mistral", "qwen2", "qwen3")
BIASED = ("qwen2", "opt", "gpt_neox")


def block_of(kind: str, dtype: torch.dtype = torch.float64) -> tuple[torch.nn.Module, BlockInput]:
    model = random_model(kind).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms of ones and biases of zeros would hide slips
                parameter.copy_(
                    torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                    + 0.5
                )
    blocks = blocks_of(model, find(model, kind))
    return blocks[0], first_inputs(model, blocks, [torch.stack(token_windows(2, 12))])[0]


def value_pair(shared: bool = True) -> Pair:
    """v -> o of four query heads over two key-value heads of width 8."""
    channel = head_channels(16, 32, 2)
    assert channel is not None
    return Pair(
        "self_attn.v_proj",
        ("self_attn.o_proj",),
        channel if shared else torch.arange(16).repeat(2),
        linear=True,
    )


UP = Pair("mlp.up_proj", ("mlp.down_proj",), linear=True)


def folded(block: torch.nn.Module, pair: Pair, seed: int = 3) -> dict[str, Tensor]:
    tensors = {name: block.get_parameter(name).detach() for name in names_of(pair, block)}
    channels = tensors[f"{pair.producer}.weight"].shape[0]
    scale = (
        torch.rand(channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
        + 0.2
    )
    return fold(
        pair,
        scale.to(next(iter(tensors.values())).dtype),
        tensors,
        {name: t.dtype for name, t in tensors.items()},
    )


def difference(block: torch.nn.Module, changed: dict[str, Tensor], inputs: BlockInput) -> float:
    with torch.no_grad():
        before, after = run_with(block, {}, inputs), run_with(block, changed, inputs)
    return float((after - before).norm() / (before - inputs.hidden).norm())


def pairs_of(kind: str, block: torch.nn.Module, inputs: BlockInput) -> list[Pair]:
    return norm_pairs(block, STAGES[kind], inputs) + ([value_pair(), UP] if kind in GATED else [])


@pytest.mark.parametrize("kind", [*GATED, "opt", "gpt_neox"])
def test_a_folded_block_computes_the_same(kind):
    block, inputs = block_of(kind)
    pairs = pairs_of(kind, block, inputs)
    assert [p.readers for p in pairs if not p.linear] == [STAGES[kind][0], STAGES[kind][2]]
    for pair in pairs:
        changed = folded(block, pair)
        assert difference(block, changed, inputs) < 1e-12, pair.producer
        assert any(not torch.equal(t, block.get_parameter(n)) for n, t in changed.items())
        for name, tensor in changed.items():
            block.get_parameter(name).data = tensor  # the pairs together, as a run folds them


def inverted(changed: dict[str, Tensor], block: torch.nn.Module, pair: Pair) -> dict[str, Tensor]:
    """The readers divided where they should be multiplied."""
    reader = f"{pair.readers[0]}.weight"
    original = block.get_parameter(reader)
    return changed | {reader: original * original / changed[reader]}


def without_bias(
    changed: dict[str, Tensor], block: torch.nn.Module, pair: Pair
) -> dict[str, Tensor]:
    return {name: t for name, t in changed.items() if name != f"{pair.producer}.bias"}


@pytest.mark.parametrize(
    ("pair", "slip"),
    [
        pytest.param(value_pair(), inverted, id="inverse scale on the wrong side"),
        pytest.param(value_pair(), without_bias, id="v's bias forgotten"),
        pytest.param(
            value_pair(shared=False),
            lambda changed, *_: changed,
            id="query heads repeated in the wrong order",
        ),
    ],
)
def test_a_slip_changes_what_the_block_computes(pair, slip):
    block, inputs = block_of("qwen2")
    assert difference(block, slip(folded(block, pair), block, pair), inputs) > 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*GATED, "opt", "gpt_neox"])
def test_the_trial_allows_every_true_pair(kind, dtype):
    block, inputs = block_of(kind, dtype)
    for pair in pairs_of(kind, block, inputs):
        assert checked(block, pair, inputs) is not None, pair.producer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(value_pair(shared=False), id="wrong repetition"),
        pytest.param(
            Pair("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj")),
            id="a reader left out",
        ),
        pytest.param(
            Pair("mlp.gate_proj", ("mlp.down_proj",), linear=True),
            id="through an activation function",
        ),
    ],
)
def test_the_trial_refuses_what_is_no_pair(pair, dtype):
    block, inputs = block_of("qwen2", dtype)
    assert checked(block, pair, inputs) is None


class OnePlus(torch.nn.Module):
    """Gemma's norm: multiplies by ``1 + weight``."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(norm.weight.detach() - 1, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def test_a_norm_that_multiplies_by_one_plus_its_weight_is_told_apart():
    block, inputs = block_of("llama")
    block.input_layernorm = OnePlus(block.input_layernorm)
    pair = next(
        p for p in norm_pairs(block, STAGES["llama"], inputs) if p.producer == "input_layernorm"
    )
    found = checked(block, pair, inputs)
    assert found == replace(pair, offset=1.0)
    assert difference(block, folded(block, found), inputs) < 1e-12


def test_a_norm_is_rounded_to_its_stored_dtype_and_the_readers_make_up_for_it():
    block, inputs = block_of("llama", torch.float32)
    pair = norm_pairs(block, STAGES["llama"], inputs)[0]
    tensors = {name: block.get_parameter(name).detach() for name in names_of(pair, block)}
    changed = fold(pair, torch.linspace(0.3, 3, 32), tensors, dict.fromkeys(tensors, torch.float16))
    norm = changed["input_layernorm.weight"]
    assert torch.equal(norm, norm.half().float())
    assert difference(block, changed, inputs) < 1e-5


def test_a_norm_weight_of_zero_is_left_alone():
    pair = Pair("norm", ("q",))
    tensors = {"norm.weight": torch.tensor([0.0, 2.0]), "q.weight": torch.ones(3, 2)}
    changed = fold(pair, torch.tensor([2.0, 4.0]), tensors, {"norm.weight": torch.float16})
    assert changed["norm.weight"].tolist() == [0.0, 0.5]
    assert changed["q.weight"].tolist() == [[1.0, 4.0]] * 3


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        pytest.param((4, 8, 2), [0, 1, 0, 1, 2, 3, 2, 3], id="two query heads per key-value head"),
        pytest.param((4, 8, 1), [0, 1, 2, 3, 0, 1, 2, 3], id="one key-value head"),
        pytest.param((4, 6, 2), None, id="no whole number of query heads"),
        pytest.param((4, 8, 3), None, id="heads do not divide"),
    ],
)
def test_columns_of_o_by_row_of_v(sizes, expected):
    found = head_channels(*sizes)
    assert (None if found is None else found.tolist()) == expected
