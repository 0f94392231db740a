"""Compiled decoding steps against transformers' own code, and the head that is kept in 16 bits."""

from __future__ import annotations

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
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
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from llmquant.errors import LlmquantError
from llmquant.kernels import native
from llmquant.kernels.packed_linear import PackedLinear
from llmquant.models.decoding import speed_up as decoding
from llmquant.models.decoding import steps as decoder_steps
from llmquant.models.decoding.half_head import HalfEmbedding, HalfLinear
from llmquant.models.decoding.speed_up import speed_up
from llmquant.spec import QuantSpec

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama with biases": lambda: LlamaConfig(**SIZES, attention_bias=True),
    "llama with heads of 48": lambda: LlamaConfig(**{**SIZES, "head_dim": 48}),
    "llama with heads of 128": lambda: LlamaConfig(**{**SIZES, "head_dim": 128}),
    "llama, one head for all": lambda: LlamaConfig(**{**SIZES, "num_key_value_heads": 1}),
    "mistral with a short window": lambda: MistralConfig(**SIZES, sliding_window=8),
    "mistral with a window of 3": lambda: MistralConfig(**SIZES, sliding_window=3),
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
    """A random model with packed linears in its blocks, as :func:`llmquant.load` gives it before it
    is sped up."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(make(), dtype=torch.float32).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            weight = random_weight(module.out_features, module.in_features, spec)
            scaled = type(weight)(
                weight.codes, weight.scales / weight.scales.abs().mean() / 16, weight.zeros, spec
            )
            bias = None if module.bias is None else torch.randn(module.out_features)
            parent, _, leaf = name.rpartition(".")
            setattr(
                model.get_submodule(parent),
                leaf,
                PackedLinear(scaled, bias, dtype=dtype, kernel="cpu"),
            )
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float().to(dtype)
    return model.requires_grad_(False)


def stepped(model: PreTrainedModel) -> int:
    return sum(
        isinstance(m.__dict__.get("forward"), decoding.BlockForward) for m in model.modules()
    )


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
    with caplog.at_level(logging.INFO, "llmquant.models.decoding.speed_up"):
        speed_up(model)
    assert stepped(model) == 0
    assert "stepped by transformers' code" in caplog.text


def test_a_block_with_a_slip_is_caught_by_its_trial(monkeypatch, caplog):
    model = packed(CONFIGS["llama"], QuantSpec(4, 32, True))
    model.model.layers[1].self_attn.scaling *= 1.001
    shape = decoding.BlockShape
    monkeypatch.setattr(
        decoding, "BlockShape", lambda h, k, d, eps, scaling: shape(h, k, d, eps, 16**-0.5)
    )
    with caplog.at_level(logging.INFO, "llmquant.models.decoding.speed_up"):
        speed_up(model)
    assert stepped(model) == 1
    assert "layers.1 is stepped by transformers' code: a trial gave other numbers" in caplog.text


def test_a_block_whose_trial_fails_keeps_its_code(monkeypatch, caplog):
    model = packed(CONFIGS["llama"], QuantSpec(4, 32, True))

    def failing(*args: Any) -> None:
        raise RuntimeError("no such size")

    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", failing)
    with caplog.at_level(logging.INFO, "llmquant.models.decoding.speed_up"):
        speed_up(model)
    assert stepped(model) == 1
    (told,) = (r for r in caplog.records if "a trial of block 1 failed" in r.getMessage())
    assert told.levelno == logging.INFO
    assert "layers.1 is stepped by transformers' code" in caplog.text


def test_several_sequences_and_padding_run_transformers_code():
    plain = packed(CONFIGS["llama"], QuantSpec(4, 32, True))
    fast = copy.deepcopy(plain)
    speed_up(fast)
    tokens = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        logits(fast, tokens, 5), logits(plain, tokens, 5), rtol=1e-5, atol=1e-5
    )
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, :3] = 0
    made = [
        m.generate(
            tokens[:, :6], attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0
        )
        for m in (fast, plain)
    ]
    assert torch.equal(*made)


def test_hidden_states_can_still_be_asked_for():
    plain = packed(CONFIGS["llama"], QuantSpec(4, 32, True))
    fast = copy.deepcopy(plain)
    speed_up(fast)
    token, asked = torch.tensor([[5]]), {"output_hidden_states": True}
    with torch.inference_mode():
        expected, got = (
            m(token, past_key_values=DynamicCache(config=m.config), **asked).hidden_states
            for m in (plain, fast)
        )
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
    model(
        inputs_embeds=embedded, past_key_values=DynamicCache(config=model.config)
    ).logits.sum().backward()
    assert embedded.grad is not None


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 9], ids="{} rows".format)
@pytest.mark.parametrize("instruction_set", list(native.compiled_instructions()))
def test_a_head_of_16_bits_is_exact(stored, rows, instruction_set):
    weight = torch.randn(70, 45, generator=torch.Generator().manual_seed(0)).to(stored).float()
    weight[0, :4] = torch.tensor(
        [0.0, -0.0, 2.0**-14, 2.0**-24 if stored is torch.float16 else 2.0**-100]
    )
    head = HalfLinear(weight, torch.ones(70), stored)
    assert torch.equal(native.half_weight(head.words, 70).float(), weight)
    x = torch.randn(rows, 45)
    with native.instructions(instruction_set):
        y = head(x)
        assert torch.equal((head(torch.eye(45)) - 1).T, weight + 1 - 1)
    exact = x.double() @ weight.double().T + 1
    assert bool(
        (
            (y.double() - exact).abs()
            <= 50 * 2.0**-24 * (x.double().abs() @ weight.double().abs().T + 1)
        ).all()
    )
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
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        CONFIGS["llama"](), dtype=torch.float32
    )
    speed_up(model)
    assert stepped(model) == 0
    assert type(model.get_output_embeddings()) is nn.Linear


def runs(model: PreTrainedModel) -> int:
    """How many of the model's blocks are stepped by the first one's call."""
    found = {
        id(f.run): f.run
        for m in model.modules()
        if isinstance(f := m.__dict__.get("forward"), decoding.BlockForward)
    }
    assert len(found) <= 1
    return sum(len(run._forwards) for run in found.values() if run is not None)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of blocks with each compiled call for several."""
    calls: list[int] = []
    whole = decoder_steps.Steps.run
    monkeypatch.setattr(
        decoder_steps.Steps,
        "run",
        lambda self, *a: (calls.append(len(self._steps)), whole(self, *a))[1],
    )
    return calls


def pair(name: str = "llama", **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model plain and sped up."""
    plain = packed(
        lambda: LlamaConfig(**{**SIZES, **changes}) if name == "llama" else CONFIGS[name](),
        QuantSpec(4, 32, True),
    )
    fast = copy.deepcopy(plain)
    speed_up(fast)
    return plain, fast


TOKENS = torch.randint(0, 128, (1, 24), generator=torch.Generator().manual_seed(1))


def step(model: PreTrainedModel, cache: Any, i: int) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS[:, i : i + 1], past_key_values=cache).logits


def prefilled(model: PreTrainedModel, count: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(TOKENS[:, :count], past_key_values=cache)
    return cache


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_token_is_one_compiled_call(name, monkeypatch):
    plain, fast = pair(name)
    calls = counted(monkeypatch)
    close(logits(fast, TOKENS, 6), logits(plain, TOKENS, 6))
    sliding = "window" in name  # its cache is not a plain growing one
    assert calls == ([] if sliding else [2] * 18)


def test_a_cache_grows_past_its_spare_room_and_stays_transformers_own(monkeypatch):
    monkeypatch.setattr(decoder_steps, "_LEAST_SPARE", 3)
    plain, fast = pair()
    close(logits(fast, TOKENS, 2), logits(plain, TOKENS, 2))
    expected, cache = prefilled(plain, 20), prefilled(fast, 4)
    for i in range(4, 20):
        step(fast, cache, i)
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        assert layer.keys.shape == other.keys.shape
        close(layer.keys, other.keys)
        close(layer.values, other.values)


def test_what_others_hold_of_a_cache_is_never_written_over():
    plain, fast = pair()
    cache = prefilled(fast, 6)
    for i in range(6, 9):
        step(fast, cache, i)
    held = [layer.keys for layer in cache.layers]
    before = [t.clone() for t in held]
    cache.crop(-2)  # by two tokens
    assert cache.get_seq_length() == 7
    twin = copy.deepcopy(cache)
    close(step(fast, cache, 7), step(plain, prefilled(plain, 7), 7))
    close(step(fast, twin, 10), step(plain, prefilled(plain, 7), 10))
    assert all(map(torch.equal, held, before))


def test_watched_blocks_are_stepped_one_by_one(monkeypatch):
    plain, fast = pair()
    calls, seen = counted(monkeypatch), []
    handle = fast.model.layers[1].register_forward_pre_hook(
        lambda _m, args: seen.append(args[0].clone())
    )
    expected = step(plain, prefilled(plain, 5), 5)
    close(step(fast, prefilled(fast, 5), 5), expected)
    assert not calls
    assert len(seen) == 2, "the prompt and the token"
    handle.remove()
    close(step(fast, prefilled(fast, 5), 5), expected)
    assert calls == [2]


def test_a_pass_through_fewer_blocks_runs_only_those():
    plain, fast = pair()
    caches = prefilled(plain, 5), prefilled(fast, 5)
    for model in (plain, fast):
        model.config.num_hidden_layers = 1
    close(step(fast, caches[1], 5), step(plain, caches[0], 5))
    assert [layer.keys.shape[2] for layer in caches[1].layers] == [6, 5]


def test_a_change_between_blocks_is_an_error_and_not_a_wrong_answer():
    _, fast = pair()
    cache, second = prefilled(fast, 5), fast.model.layers[1].forward
    fast.model.layers[1].forward = lambda hidden, **kwargs: second(hidden * 1, **kwargs)
    with pytest.raises(LlmquantError, match="changed the hidden states in front of block 1"):
        step(fast, cache, 5)
    fast.model.layers[1].forward = second
    step(fast, prefilled(fast, 5), 5)


def test_blocks_of_different_attention_are_stepped_one_by_one(caplog):
    made = packed(
        lambda: Qwen2Config(
            **{k: v for k, v in SIZES.items() if k != "head_dim"},
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
        ),
        QuantSpec(4, 32, True),
    )
    assert len(set(made.config.layer_types)) == 2
    fast = copy.deepcopy(made)
    with caplog.at_level(logging.INFO, "llmquant.models.decoding.speed_up"):
        speed_up(fast)
    assert stepped(fast) == 2
    assert runs(fast) == 0
    assert "stepped one by one: their attention is of several kinds" in caplog.text
    close(logits(fast, TOKENS, 6), logits(made, TOKENS, 6))


def test_threads_step_their_own():
    plain, fast = pair()
    expected = logits(plain, TOKENS, 6)
    with ThreadPoolExecutor(2) as pool:
        for made in pool.map(lambda _: logits(copy.deepcopy(fast), TOKENS, 6), range(6)):
            close(made, expected)


class Rows(DynamicLayer):
    """A cache layer of another kind, with room of its own."""

    def in_place(self) -> tuple[torch.Tensor, torch.Tensor, int] | None:
        return None if self.keys is None else (self.keys_room, self.values_room, self.held)


def test_another_kind_of_cache_says_where_the_next_token_goes(monkeypatch):
    plain, fast = pair()
    source = prefilled(fast, 5)
    cache = Cache(layer_class_to_replicate=Rows)
    for index, layer in enumerate(source.layers):
        cache.update(layer.keys, layer.values, index)
    for layer in cache.layers:
        room = [torch.zeros(1, 2, 8, 16) for _ in range(2)]
        for to, held in zip(room, (layer.keys, layer.values), strict=True):
            to[:, :, :5] = held
        layer.keys_room, layer.values_room, layer.held = *room, 5
    calls = counted(monkeypatch)
    expected = prefilled(plain, 5)
    close(step(fast, cache, 5), step(plain, expected, 5))
    assert calls == [2]
    close(cache.layers[1].keys_room[:, :, :6], expected.layers[1].keys)
