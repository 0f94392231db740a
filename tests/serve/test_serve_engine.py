"""The local engine gives the tokens and log-probabilities of the model itself, alone and in a
batch."""

from __future__ import annotations

import asyncio
import itertools

import pytest
import torch
from serving import StepCounter, collect, greedy, with_engine
from tiny_models import long_rope
from transformers import (
    BartConfig,
    BartForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    TrOCRConfig,
    TrOCRForCausalLM,
)
from transformers.cache_utils import DynamicCache

from llmquant.errors import ArchitectureError
from llmquant_serve.engines.base import EngineError, Load, Sampling
from llmquant_serve.engines.batching.batcher import PROMPT_CHUNK
from llmquant_serve.engines.local import LocalEngine

GREEDY = Sampling(max_tokens=40, temperature=0.0, logprobs=5)


async def idle(engine):
    """A last token is delivered a moment before its row is free."""
    while engine.load().running:
        await asyncio.sleep(0.001)


def ids(tokens):
    return [t.id for t in tokens]


def test_alone_it_gives_the_tokens_of_generate(model, prompts):
    async def work(engine):
        return [ids(await collect(engine, p, GREEDY)) for p in prompts]

    assert with_engine(model, work) == [greedy(model, p, 40) for p in prompts]


def test_a_prompt_of_many_chunks_alone_gives_the_tokens_of_generate(model, prompts):
    long = list(itertools.islice(itertools.cycle(itertools.chain(*prompts)), 3 * PROMPT_CHUNK + 7))
    assert with_engine(model, lambda e: collect(e, long, GREEDY)) is not None
    assert ids(with_engine(model, lambda e: collect(e, long, GREEDY))) == greedy(model, long, 40)


def test_in_a_full_batch_tokens_differ_only_where_the_best_two_are_within_rounding(model, prompts):
    """The rounding is measured: by how much the same log-probabilities, after the same text, change
    in a batch."""
    asked = Sampling(max_tokens=40, temperature=0.0, logprobs=5, ignore_eos=True)

    async def work(engine):
        alone = [await collect(engine, p, asked) for p in prompts]
        return alone, await asyncio.gather(*(collect(engine, p, asked) for p in prompts))

    alone, batched = with_engine(model, work)
    noise, gaps, same = 0.0, [], 0
    for a, b in zip(alone, batched, strict=True):
        for x, y in zip(a, b, strict=True):
            shared = dict(x.top).keys() & dict(y.top).keys()
            noise = max(noise, *(abs(dict(x.top)[t] - dict(y.top)[t]) for t in shared))
            if x.id != y.id:
                gaps.append(x.top[0][1] - dict(x.top)[y.id])
                break
            same += 1
    print(
        f"{same} tokens the same, rounding at most {noise:.4f} nats, first differences by {[f'{g:.4f}' for g in gaps]}"
    )
    assert 0 < noise < 0.5
    assert all(gap <= 2 * noise for gap in gaps)


def test_log_probabilities_are_the_models(model, prompts):
    """At the engine's own dtype the sums run in another order (one pass instead of steps), so the
    bound is bf16's."""
    tokens = with_engine(model, lambda e: collect(e, prompts[0], GREEDY))
    with torch.inference_mode():
        logits = model(torch.tensor([prompts[0] + ids(tokens)])).logits[0].float()
    expected = torch.log_softmax(logits, -1)[len(prompts[0]) - 1 : -1]
    for row, token in zip(expected, tokens, strict=True):
        for i, p in (*token.top, (token.id, token.logprob)):
            assert p == pytest.approx(float(row[i]), abs=0.15)
        assert [p for _, p in token.top] == sorted((p for _, p in token.top), reverse=True)


def test_a_prompt_alone_can_be_scored(model, prompts):
    async def work(engine):
        sampling = Sampling(max_tokens=0, prompt_logprobs=3)
        return [step async for step in engine.generate(prompts[1], sampling)]

    first, last = with_engine(model, work)
    assert (last.tokens, last.finish) == ((), "length")
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([prompts[1]])).logits[0].float(), -1)
    assert ids(first.prompt) == prompts[1]
    assert first.prompt[0].logprob is None
    for row, token in zip(expected, first.prompt[1:], strict=False):
        assert token.logprob == float(row[token.id])
        assert [i for i, _ in token.top] == row.topk(3).indices.tolist()


def test_long_prompts_are_scored_in_chunks(model, prompts):
    long = list(itertools.islice(itertools.cycle(itertools.chain(*prompts)), 600))

    async def work(engine):
        return (
            await anext(engine.generate(long, Sampling(max_tokens=0, prompt_logprobs=0)))
        ).prompt

    scored = with_engine(model, work)
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([long])).logits[0].float(), -1)
    rows = [float(expected[i, t]) for i, t in enumerate(long[1:])]
    assert [t.logprob for t in scored[1:]] == pytest.approx(rows, abs=0.25)


SAMPLED = Sampling(max_tokens=24, temperature=0.9, top_p=0.95, top_k=50, seed=7, ignore_eos=True)


def test_a_seed_gives_the_same_text_whoever_else_is_served(wide, prompts):
    """In float32 rounding in a batch is too small to move a draw, so this is an equality."""
    others = Sampling(max_tokens=60, temperature=1.3, seed=1, ignore_eos=True)

    async def work(engine):
        alone = await collect(engine, prompts[0], SAMPLED)
        batched = await asyncio.gather(
            *(collect(engine, p, others) for p in prompts[1:5]),
            collect(engine, prompts[0], SAMPLED),
        )
        other_seed = await collect(
            engine, prompts[0], Sampling(max_tokens=24, temperature=0.9, seed=8, ignore_eos=True)
        )
        return ids(alone), ids(batched[-1]), ids(other_seed)

    alone, batched, other_seed = with_engine(wide, work)
    assert alone == batched
    assert alone != other_seed


def test_sequences_that_come_and_go_do_not_disturb_each_other(wide, prompts):
    """Lengths from 1 to 60 tokens through 3 rows: joins, leaves and moves of the cache, against
    each one alone."""
    asked = [
        Sampling(max_tokens=1 + (37 * i) % 60, temperature=0.0, ignore_eos=True) for i in range(10)
    ]

    async def work(engine):
        alone = [
            ids(await collect(engine, prompts[i % 8] * (1 + i % 5), s)) for i, s in enumerate(asked)
        ]
        together = await asyncio.gather(
            *(collect(engine, prompts[i % 8] * (1 + i % 5), s) for i, s in enumerate(asked))
        )
        return alone, [ids(t) for t in together]

    alone, together = with_engine(wide, work, max_streams=3)
    assert [len(t) for t in together] == [s.max_tokens for s in asked]
    assert together == alone


def test_a_cache_that_outgrows_its_buffer(wide, prompts):
    asked = Sampling(max_tokens=120, temperature=0.0, ignore_eos=True)

    async def work(engine):
        slow = asyncio.create_task(collect(engine, prompts[0], asked))
        await asyncio.sleep(0.2)
        await collect(engine, prompts[1] * 40, Sampling(max_tokens=4, temperature=0.0))
        return ids(await slow)

    assert with_engine(wide, work) == greedy(wide, prompts[0], 120, eos=False)


SMALL = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "eos_token_id": 1,
    "bos_token_id": 0,
}
GQA = {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 256}
OTHERS = {
    "mistral, sliding window": lambda: MistralForCausalLM(MistralConfig(**GQA, sliding_window=16)),
    "qwen3, sliding and full": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            **GQA, head_dim=16, use_sliding_window=True, sliding_window=16, max_window_layers=1
        )
    ),
    "lfm2, short convolutions": lambda: Lfm2ForCausalLM(
        Lfm2Config(**GQA, block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"])
    ),
    "qwen3.5, linear attention": lambda: Qwen3_5ForCausalLM(
        Qwen3_5TextConfig(
            **GQA,
            head_dim=16,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        )
    ),
    "jamba, Mamba": lambda: JambaForCausalLM(
        JambaConfig(**GQA, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, num_experts=1)
    ),
    "trocr, positions by the cache's length": lambda: TrOCRForCausalLM(
        TrOCRConfig(
            vocab_size=4096,
            d_model=64,
            decoder_layers=2,
            decoder_attention_heads=4,
            decoder_ffn_dim=96,
            max_position_embeddings=256,
            init_std=0.2,
        )
    ),
    "gpt2, learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(**SMALL, n_positions=256, n_embd=64, n_layer=2, n_head=4)
    ),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_other_attention(make, prompts):
    torch.manual_seed(0)
    other = make().eval().requires_grad_(False)
    asked = Sampling(max_tokens=40, temperature=0.0, ignore_eos=True)

    async def work(engine):
        return await asyncio.gather(*(collect(engine, p, asked) for p in prompts))

    assert [ids(t) for t in with_engine(other, work)] == [
        greedy(other, p, 40, eos=False) for p in prompts
    ]


@pytest.mark.parametrize("context", [None, 24], ids=["long", "short"])
def test_frequencies_that_depend_on_the_length(context, prompts, caplog):
    """A sequence that crosses the length is computed anew; its neighbours keep their own."""
    model, mixed = long_rope(24, GQA["vocab_size"]), [p[:12] for p in prompts]
    mixed[1] = list(itertools.islice(itertools.cycle(prompts[1]), 20 if context else 40))
    counts = [24 - len(p) if context else 8 + 4 * i for i, p in enumerate(mixed)]

    async def work(engine):
        asked = [Sampling(max_tokens=n, temperature=0.0, ignore_eos=True) for n in counts]
        pairs = zip(mixed, asked, strict=True)
        return await asyncio.gather(*(collect(engine, *pair) for pair in pairs))

    assert [ids(t) for t in with_engine(model, work, context=context)] == [
        greedy(model, p, n, eos=False) for p, n in zip(mixed, counts, strict=True)
    ]
    assert ("sequences take turns" in caplog.text) == (context is None)


def test_a_decoder_whose_cache_transformers_builds_too_short_is_refused():
    """By the layers of an encoder, of which BART's config has a number of its own."""
    small = {"encoder_layers": 1, "decoder_layers": 2, "decoder_attention_heads": 4}
    model = BartForCausalLM(BartConfig(vocab_size=64, d_model=32, **small)).eval()
    with pytest.raises(ArchitectureError, match=r"neither several sequences at once \(transf"):
        LocalEngine(model)


def test_a_model_with_recurrent_states_is_refused():
    model = MambaForCausalLM(
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    )
    told = r"\(it keeps other states: LinearAttentionLayer\) nor in turn: it has no layer of keys"
    with pytest.raises(ArchitectureError, match=told):
        LocalEngine(model)


def test_a_model_with_states_outside_of_its_cache_is_refused():
    torch.manual_seed(0)
    small = {name: value for name, value in GQA.items() if name != "initializer_range"}
    kinds = ["recurrent", "attention"]
    model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**small, block_types=kinds)).eval()
    told = r"\(it keeps other states: LinearAttentionLayer\) nor in turn: token by token, between"
    with pytest.raises(ArchitectureError, match=told):
        LocalEngine(model)


@pytest.mark.parametrize("error", [ValueError("it has a cache of its own\nand more"), None])
def test_states_that_are_not_carried_are_refused(error: Exception | None, monkeypatch):
    """By transformers' own error, or by what a sequence computes in parts."""
    torch.manual_seed(0)
    model = OTHERS["lfm2, short convolutions"]().eval().requires_grad_(False)
    attend = model.forward

    def forward(input_ids, past_key_values=None, **options):
        if past_key_values is not None and error is not None:
            raise error
        if input_ids.shape[1] == 1:  # as if nothing stood before
            past_key_values = DynamicCache(config=model.config)
        return attend(input_ids=input_ids, past_key_values=past_key_values, **options)

    monkeypatch.setattr(model, "forward", forward)
    told = "computes something else" if error is None else "it has a cache of its own; use"
    with pytest.raises(ArchitectureError, match=told):
        LocalEngine(model)


def test_sequences_in_turn_are_cancelled_and_scored(prompts):
    """What is left of a row goes with it, and log-probabilities of a prompt are the model's."""
    torch.manual_seed(0)
    model = OTHERS["lfm2, short convolutions"]().eval().requires_grad_(False)
    scored = Sampling(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    endless = Sampling(max_tokens=2000, temperature=0.0, ignore_eos=True)

    async def work(engine):
        stream = engine.generate(prompts[0], endless)
        await anext(stream)
        steps = [step async for step in engine.generate(prompts[1], scored)]
        await stream.aclose()
        await idle(engine)
        return steps[0].prompt, engine.load()

    told, load = with_engine(model, work)
    assert (load.running, load.cached_tokens) == (0, 0)
    rows = model(torch.tensor([prompts[1]])).logits[0].log_softmax(-1)
    wanted = [float(rows[i, token]) for i, token in enumerate(prompts[1][1:])]
    assert [t.logprob for t in told[1:]] == pytest.approx(wanted, abs=1e-4)


def test_leaving_frees_the_slot_at_once(model, prompts):
    """One row only: the second request can begin because the first was dropped, long before it
    would have ended."""

    async def work(engine):
        counter = StepCounter(engine)
        stream = engine.generate(
            prompts[0], Sampling(max_tokens=2000, temperature=0.0, ignore_eos=True)
        )
        await anext(stream)
        assert engine.load().running == 1
        await stream.aclose()
        assert len(await collect(engine, prompts[1], Sampling(max_tokens=3, temperature=0.0))) == 3
        await idle(engine)
        return counter.steps, engine.load()

    steps, load = with_engine(model, work, max_streams=1)
    assert steps < 1000
    assert load == Load(0, 0, 0)


def test_a_waiting_request_can_leave(model, prompts):
    async def work(engine):
        first = asyncio.create_task(
            collect(engine, prompts[0], Sampling(max_tokens=60, temperature=0.0, ignore_eos=True))
        )
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(
            collect(engine, prompts[1], Sampling(max_tokens=60, temperature=0.0))
        )
        await asyncio.sleep(0.05)
        waiting.cancel()
        return len(await first), engine.load().waiting

    assert with_engine(model, work, max_streams=1) == (60, 0)


def test_a_failure_reaches_everyone_and_is_told(model, prompts):
    async def work(engine):
        engine._jobs._admit = None  # as good a catastrophe as any
        with pytest.raises(EngineError, match="the engine stopped"):
            await collect(engine, prompts[0], Sampling(max_tokens=5))
        assert not engine.health().ok
        with pytest.raises(EngineError, match="the engine stopped"):
            await collect(engine, prompts[0], Sampling(max_tokens=5))

    with_engine(model, work)


def test_closing_fails_what_is_left(model, prompts):
    async def work(engine):
        task = asyncio.create_task(
            collect(engine, prompts[0], Sampling(max_tokens=2000, ignore_eos=True))
        )
        await asyncio.sleep(0.1)
        await engine.close()
        with pytest.raises(EngineError, match="shutting down"):
            await task

    with_engine(model, work)
