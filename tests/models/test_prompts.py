"""Prompts, batches and padded sequences in compiled blocks, and single tokens past transformers'
code, against that code."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from test_decoding import CONFIGS, OTHERS, packed
from transformers import LlamaConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, StaticCache

from llmquant.kernels import native
from llmquant.models.decoding import speed_up as decoding
from llmquant.models.decoding import token as single
from llmquant.models.decoding.speed_up import speed_up
from llmquant.models.decoding.steps import BlockForward
from llmquant.spec import QuantSpec

SPEC = QuantSpec(4, 32, False)


def blocks(model: PreTrainedModel) -> list[BlockForward]:
    found = [m.__dict__.get("forward") for m in model.modules()]
    return [f for f in found if isinstance(f, BlockForward)]


def pair(make: Any, spec: QuantSpec = SPEC) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model as it is loaded, and the same one sped up; the second must use compiled code, or a
    comparison says nothing."""
    plain = packed(make, spec)
    fast = copy.deepcopy(plain)
    speed_up(fast)
    assert [f.many for f in blocks(fast)] == [True, True]
    return plain, fast


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every compiled block of many rows."""
    rows: list[int] = []
    plain = BlockForward._many

    def many(self: BlockForward, hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        rows.append(hidden.shape[0] * hidden.shape[1])
        return plain(self, hidden, *args)

    monkeypatch.setattr(BlockForward, "_many", many)
    return rows


def ids(*size: int) -> torch.Tensor:
    return torch.randint(1, 128, size, generator=torch.Generator().manual_seed(2))


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.isfinite().all()
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("size", [(1, 2), (1, 17), (3, 5), (2, 1), (2, 40)], ids=str)
def test_prompts_give_what_transformers_code_gives(make, size, counted):
    plain, fast = pair(make)
    counted.clear()
    tokens = ids(*size)
    with torch.inference_mode():
        assert far(fast(tokens).logits, plain(tokens).logits) < 1e-5
        assert counted == [size[0] * size[1]] * 2
        assert far(fast(tokens, use_cache=False).logits, plain(tokens).logits) < 1e-5
    assert len(counted) == 4


@pytest.mark.parametrize("instruction_set", list(native.compiled_instructions()))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_instruction_set_and_width(instruction_set, bits, counted):
    with native.instructions(instruction_set):
        plain, fast = pair(CONFIGS["llama"], QuantSpec(bits, 32, bits == 3))
        counted.clear()
        tokens = ids(2, 37)
        with torch.inference_mode():
            assert far(fast(tokens).logits, plain(tokens).logits) < 1e-5
        assert counted == [74, 74]


@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
def test_a_prompt_in_parts_and_tokens_behind_it(make, counted):
    plain, fast = pair(make)
    counted.clear()
    tokens, seen = ids(1, 60), []
    with torch.inference_mode():
        for model in (plain, fast):
            cache = DynamicCache(config=model.config)
            parts = tokens.split([6, 1, 20, 3, 30], 1)
            seen.append(torch.cat([model(p, past_key_values=cache).logits for p in parts], 1))
    assert far(seen[1], seen[0]) < 1e-5
    assert {6, 20, 3, 30} <= set(counted)


@pytest.mark.parametrize("tokens_after", [1, 2, 9])
def test_padded_sequences(tokens_after, counted):
    plain, fast = pair(CONFIGS["qwen3 (norms of heads)"])
    counted.clear()
    tokens, mask = ids(3, 21 + tokens_after), torch.ones(3, 21 + tokens_after, dtype=torch.long)
    mask[1, :7] = mask[2, :19] = 0
    seen = []
    with torch.inference_mode():
        for model in (plain, fast):
            cache = DynamicCache(config=model.config)
            first = model(tokens[:, :21], attention_mask=mask[:, :21], past_key_values=cache).logits
            last = model(tokens[:, 21:], attention_mask=mask, past_key_values=cache).logits
            seen.append(torch.cat([first, last], 1)[mask.bool()])
    assert far(seen[1], seen[0]) < 1e-5
    assert counted == [63, 63, 3 * tokens_after, 3 * tokens_after]


def test_many_rows_of_several_blocks_and_more_tokens_than_a_panel(counted):
    # 600 rows are three blocks of rows, 300 tokens two panels of keys; widths that fill no tile.
    sizes = {"hidden_size": 72, "intermediate_size": 104, "num_attention_heads": 3}
    more = {"num_key_value_heads": 1, "head_dim": 48, "max_position_embeddings": 512}
    small = {"vocab_size": 128, "num_hidden_layers": 2, "initializer_range": 0.2}
    plain, fast = pair(lambda: LlamaConfig(**sizes, **more, **small), QuantSpec(4, 8, False))
    counted.clear()
    tokens = ids(2, 300)
    with torch.inference_mode():
        assert far(fast(tokens).logits, plain(tokens).logits) < 1e-5
    assert counted == [600, 600]


def test_a_cache_of_fixed_length(counted):
    plain, fast = pair(CONFIGS["llama"])
    counted.clear()
    tokens, seen = ids(1, 12), []
    with torch.inference_mode():
        for model in (plain, fast):
            cache = StaticCache(config=model.config, max_cache_len=32)
            parts = [model(p, past_key_values=cache).logits for p in tokens.split([8, 4], 1)]
            seen.append(torch.cat(parts, 1))
    assert far(seen[1], seen[0]) < 1e-5
    assert counted == [8, 8, 4, 4]


def test_threads_do_not_change_a_bit():
    _, fast = pair(CONFIGS["llama"])
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                outputs.append(fast(ids(2, 50)).logits)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_dtypes_are_no_further_from_float32_than_transformers_code(dtype, counted):
    plain = packed(CONFIGS["llama"], SPEC, dtype)
    fast, exact = copy.deepcopy(plain), copy.deepcopy(plain).float()
    speed_up(fast)
    counted.clear()
    tokens = ids(2, 30)
    with torch.inference_mode():
        ours, theirs, right = (m(tokens).logits.float() for m in (fast, plain, exact))
    assert (ours - right).norm() <= 1.1 * (theirs - right).norm()
    assert counted == [60, 60]


def test_who_looks_inside_gets_transformers_code(counted):
    plain, fast = pair(CONFIGS["llama"])
    counted.clear()
    tokens, seen = ids(1, 9), []
    with torch.inference_mode():
        handle = fast.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: seen.append(1))
        fast(tokens)
        assert counted == [9], "the other block has no hook"
        assert seen == [1]
        handle.remove()
        fast(tokens)
    assert counted == [9, 9, 9]
    counted.clear()
    fast.set_attn_implementation("eager")
    with torch.inference_mode():
        fast(tokens)
    embedded = plain.get_input_embeddings()(tokens).requires_grad_(True)
    fast.set_attn_implementation("sdpa")
    fast(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None
    assert counted == []
    with torch.inference_mode():
        states = [m(tokens, output_hidden_states=True).hidden_states for m in (plain, fast)]
    for ours, theirs in zip(*reversed(states), strict=True):
        assert far(ours, theirs) < 1e-5


def test_a_block_that_computes_something_else_keeps_its_code(monkeypatch):
    plain = packed(CONFIGS["llama"], SPEC)
    right = decoding._agree

    def other(fast: BlockForward, model: Any, size: tuple[int, int], mask: Any) -> bool:
        if mask is not None:
            fast.step.shape = copy.copy(fast.step.shape)
            object.__setattr__(fast.step.shape, "scaling", 1.0)
            fast.step._link()
        return right(fast, model, size, mask)

    monkeypatch.setattr(decoding, "_agree", other)
    speed_up(plain)
    assert [f.many for f in blocks(plain)] == [False, False]


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_models_are_left_alone(make):
    model = packed(make, SPEC)
    speed_up(model)
    assert not isinstance(model.forward, single.TokenForward)


# ---- single tokens ----


def test_generate_gives_the_same_tokens(monkeypatch):
    plain, fast = pair(CONFIGS["llama"])
    assert isinstance(fast.forward, single.TokenForward)
    assert inspect.signature(fast.forward) == inspect.signature(plain.forward)
    ours = []
    monkeypatch.setattr(single, "CausalLMOutputWithPast", lambda **k: ours.append(1) or real(**k))
    tokens = ids(1, 7)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    made = [
        m.generate(tokens, attention_mask=torch.ones_like(tokens), **options) for m in (plain, fast)
    ]
    assert torch.equal(*made)
    assert len(ours) == 11


real = single.CausalLMOutputWithPast


def test_what_is_not_one_plain_token_is_the_models_own():
    plain, fast = pair(CONFIGS["llama"])
    tokens, one = ids(1, 6), ids(1, 1)

    def last(model: PreTrainedModel, **more: Any) -> Any:
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(tokens, past_key_values=cache)
            return model(one, past_key_values=cache, **more)

    hidden = torch.ones(1, 7, dtype=torch.long)
    hidden[0, :2] = 0
    for more in (
        {},
        {"attention_mask": torch.ones(1, 7, dtype=torch.long)},
        {"attention_mask": hidden},
        {"position_ids": torch.tensor([[40]])},
        {"logits_to_keep": 1},
        {"labels": one},
    ):
        assert far(last(fast, **more).logits, last(plain, **more).logits) < 1e-5, more
    assert last(fast, labels=one).loss is not None
    assert len(last(fast, output_hidden_states=True).hidden_states) == 3
    assert isinstance(last(fast, return_dict=False), tuple)


def test_angles_by_the_models_own_embedding_at_any_position():
    _, fast = pair(CONFIGS["llama"])
    rotary = fast.model.rotary_emb
    angles = single.Angles(rotary)
    for position in (0, 3, 255, 256, 5000, 7):
        for dtype in (torch.float32, torch.bfloat16):
            hidden = torch.zeros(1, 1, 64, dtype=dtype)
            expected = rotary(hidden, position_ids=torch.tensor([[position]]))
            for ours, theirs in zip(angles.at(position, hidden), expected, strict=True):
                assert torch.equal(ours, theirs)


def test_a_copy_works_on_its_own_weights():
    _, fast = pair(CONFIGS["llama"])
    copied = copy.deepcopy(fast)
    assert copied.forward.plain.__self__ is copied
    assert copied.forward.run is not fast.forward.run
    tokens = ids(1, 5)
    with torch.no_grad():
        fast.model.norm.weight.zero_()
        for layer in fast.model.layers:
            layer.self_attn.q_proj.words.zero_()
    plain = packed(CONFIGS["llama"], SPEC)
    seen = []
    with torch.inference_mode():
        for model in (plain, copied):
            cache = DynamicCache(config=model.config)
            parts = [model(p, past_key_values=cache).logits for p in tokens.split([4, 1], 1)]
            seen.append(torch.cat(parts, 1))
    assert far(seen[1], seen[0]) < 1e-5
