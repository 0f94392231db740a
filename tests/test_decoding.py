"""Compiled decoding steps against transformers' own code, and the head that is kept in 16 bits."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from packing import random_weight
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.cache_utils import DynamicCache

from llmquant import decoding
from llmquant.decoding import HalfEmbedding, HalfLinear, speed_up
from llmquant.kernels import native
from llmquant.modules import PackedLinear
from llmquant.spec import QuantSpec

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "initializer_range": 0.2,
    "tie_word_embeddings": True, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama with biases": lambda: LlamaConfig(**SIZES, attention_bias=True),
    "llama, one head for all": lambda: LlamaConfig(**{**SIZES, "num_key_value_heads": 1}),
    "mistral with a short window": lambda: MistralConfig(**SIZES, sliding_window=8),
    "qwen2 (biases)": lambda: Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "qwen3 (norms of heads)": lambda: Qwen3Config(**SIZES),
}
OTHERS = {
    "gemma2": lambda: Gemma2Config(**SIZES, query_pre_attn_scalar=16),
    "llama with gelu": lambda: LlamaConfig(**SIZES, hidden_act="gelu"),
    "llama with biases in its MLP": lambda: LlamaConfig(**SIZES, mlp_bias=True),
    "llama with heads of 8": lambda: LlamaConfig(**{**SIZES, "head_dim": 8}),
}


def packed(make: Any, spec: QuantSpec, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model with packed linears in its blocks, as :func:`llmquant.load` gives it before it is sped up."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(make(), dtype=torch.float32).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            weight = random_weight(module.out_features, module.in_features, spec)
            scaled = type(weight)(weight.codes, weight.scales / weight.scales.abs().mean() / 16, weight.zeros, spec)
            bias = None if module.bias is None else torch.randn(module.out_features)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, PackedLinear(scaled, bias, dtype=dtype, kernel="cpu"))
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float().to(dtype)
    return model.requires_grad_(False)


def stepped(model: PreTrainedModel) -> int:
    return sum(isinstance(m.__dict__.get("forward"), decoding._Forward) for m in model.modules())


def logits(model: PreTrainedModel, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """Of a prompt read at once and of the tokens behind it, one by one."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        seen = [model(tokens[:, :prompt], past_key_values=cache).logits]
        for i in range(prompt, tokens.shape[1]):
            seen.append(model(tokens[:, i : i + 1], past_key_values=cache).logits)
    return torch.cat(seen, 1)


@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_steps_give_what_transformers_code_gives(make, bits):
    plain = packed(make, QuantSpec(bits, 32, bits == 3))
    fast = copy.deepcopy(plain)
    speed_up(fast)
    assert stepped(fast) == 2
    assert stepped(plain) == 0
    tokens = torch.randint(0, 128, (1, 24), generator=torch.Generator().manual_seed(1))
    expected = logits(plain, tokens, 6)
    assert float((logits(fast, tokens, 6) - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("instruction_set", list(native.compiled_instructions()))
def test_steps_run_on_every_instruction_set(instruction_set):
    plain = packed(CONFIGS["llama"], QuantSpec(4, 32, False))
    fast = copy.deepcopy(plain)
    tokens = torch.randint(0, 128, (1, 20), generator=torch.Generator().manual_seed(1))
    with native.instructions(instruction_set):
        speed_up(fast)
        assert stepped(fast) == 2
        expected = logits(plain, tokens, 4)
        assert float((logits(fast, tokens, 4) - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_dtypes_are_no_further_from_float32_than_transformers_code(dtype):
    plain = packed(CONFIGS["llama"], QuantSpec(4, 32, True), dtype)
    fast = copy.deepcopy(plain)
    speed_up(fast)
    assert stepped(fast) == 2
    exact = copy.deepcopy(plain).float()
    tokens = torch.randint(0, 128, (1, 24), generator=torch.Generator().manual_seed(1))
    expected = logits(exact, tokens, 6)
    far = [float((logits(m, tokens, 6).float() - expected).norm()) for m in (fast, plain)]
    assert far[0] <= 1.1 * far[1]


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_blocks_that_compute_something_else_keep_their_code(make, caplog):
    model = packed(make, QuantSpec(4, 32, True))
    with caplog.at_level(logging.INFO, "llmquant.decoding"):
        speed_up(model)
    assert stepped(model) == 0
    assert "stepped by transformers' code" in caplog.text


def test_a_block_with_a_slip_is_caught_by_its_trial(monkeypatch, caplog):
    model = packed(CONFIGS["llama"], QuantSpec(4, 32, True))
    model.model.layers[1].self_attn.scaling *= 1.001
    shape = decoding.BlockShape
    monkeypatch.setattr(decoding, "BlockShape", lambda h, k, d, eps, scaling: shape(h, k, d, eps, 16**-0.5))
    with caplog.at_level(logging.INFO, "llmquant.decoding"):
        speed_up(model)
    assert stepped(model) == 1
    assert "layers.1 is stepped by transformers' code: a trial gave other numbers" in caplog.text


def test_several_sequences_and_padding_run_transformers_code():
    plain = packed(CONFIGS["llama"], QuantSpec(4, 32, True))
    fast = copy.deepcopy(plain)
    speed_up(fast)
    tokens = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits(fast, tokens, 5), logits(plain, tokens, 5), rtol=1e-5, atol=1e-5)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, :3] = 0
    made = [
        m.generate(tokens[:, :6], attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (fast, plain)
    ]
    assert torch.equal(*made)


def test_hidden_states_can_still_be_asked_for():
    plain = packed(CONFIGS["llama"], QuantSpec(4, 32, True))
    fast = copy.deepcopy(plain)
    speed_up(fast)
    token, asked = torch.tensor([[5]]), {"output_hidden_states": True}
    with torch.inference_mode():
        expected, got = (m(token, past_key_values=DynamicCache(config=m.config), **asked).hidden_states for m in (plain, fast))
    assert len(got) == len(expected) == 3
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_copy_and_a_model_whose_buffers_moved_step_with_their_own():
    first = packed(CONFIGS["llama"], QuantSpec(4, 32, True))
    speed_up(first)
    tokens = torch.randint(0, 128, (1, 12), generator=torch.Generator().manual_seed(1))
    expected = logits(first, tokens, 4)
    second = copy.deepcopy(first)
    for module in first.modules():
        for name, buffer in list(module._buffers.items()):
            if isinstance(module, PackedLinear):
                module._buffers[name] = buffer.clone()
                buffer.zero_()
    assert torch.equal(logits(first, tokens, 4), expected)
    for module in first.modules():
        if isinstance(module, PackedLinear):
            module.words.zero_()
    assert not torch.equal(logits(first, tokens, 4), expected)
    assert torch.equal(logits(second, tokens, 4), expected)


def test_gradients_run_transformers_code():
    model = packed(CONFIGS["llama"], QuantSpec(4, 32, True))
    speed_up(model)
    embedded = torch.randn(1, 1, 64, requires_grad=True)
    model(inputs_embeds=embedded, past_key_values=DynamicCache(config=model.config)).logits.sum().backward()
    assert embedded.grad is not None


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 9], ids="{} rows".format)
@pytest.mark.parametrize("instruction_set", list(native.compiled_instructions()))
def test_a_head_of_16_bits_is_exact(stored, rows, instruction_set):
    weight = torch.randn(70, 45, generator=torch.Generator().manual_seed(0)).to(stored).float()
    weight[0, :4] = torch.tensor([0.0, -0.0, 2.0**-14, 2.0**-24 if stored is torch.float16 else 2.0**-100])
    head = HalfLinear(weight, torch.ones(70), stored)
    assert torch.equal(native.half_weight(head.words, 70).float(), weight)
    x = torch.randn(rows, 45)
    with native.instructions(instruction_set):
        y = head(x)
        assert torch.equal((head(torch.eye(45)) - 1).T, weight + 1 - 1)
    exact = x.double() @ weight.double().T + 1
    assert bool(((y.double() - exact).abs() <= 50 * 2.0**-24 * (x.double().abs() @ weight.double().abs().T + 1)).all())
    asked = x.clone().requires_grad_()
    head(asked).sum().backward()
    assert asked.grad is not None


def test_a_head_and_the_embedding_tied_to_it_are_halved_where_that_is_exact():
    model = packed(CONFIGS["llama"], QuantSpec(4, 32, True))
    table = model.get_input_embeddings().weight.clone()
    plain = copy.deepcopy(model)
    speed_up(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, HalfLinear)
    assert isinstance(embedding, HalfEmbedding)
    assert head.words is embedding.words
    ids = torch.arange(128).view(4, 32)
    assert torch.equal(embedding(ids), table[ids])
    assert torch.equal(embedding.weight, head.weight)
    assert model.dtype is plain.dtype
    wide = packed(CONFIGS["llama"], QuantSpec(4, 32, True))
    wide.lm_head.weight.data[0, 0] = 1 + 2.0**-20
    speed_up(wide)
    assert type(wide.lm_head) is nn.Linear


def test_dense_models_are_left_as_they_are():
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS["llama"](), dtype=torch.float32)
    speed_up(model)
    assert stepped(model) == 0
    assert type(model.get_output_embeddings()) is nn.Linear
