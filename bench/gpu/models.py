"""Whole models: the same packed folder on the CPU and on the device by every kernel, held against
the dense original; and tokens per second of one with random weights in the shape of Llama-3-8B."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from clock import seconds
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

import llmquant
from llmquant.errors import LlmquantError
from llmquant.kernels.gpu.attention import use_grouped_sdpa
from llmquant.kernels.packed_linear import PackedLinear
from llmquant.planning.advice.in_turn import random_weight
from llmquant.spec import QuantSpec
from llmquant_serve.engines.batching import step_graph
from llmquant_serve.engines.batching.row_cache import RowCache

WINDOWS, WINDOW = 2, 256
PREFILL, PROMPT = 512, 64


def distances(
    original: Path, packed: Path, text: Path, load: Callable[..., Any], names: Sequence[str],
    in_time: Callable[[], bool],
) -> dict[str, Any]:  # fmt: skip
    """Mean KL(original || packed) per token in nats: in float32 on the CPU, and as ``load`` loads
    the folder with each kernel."""
    tokenizer = AutoTokenizer.from_pretrained(original)
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    ids = ids[: WINDOWS * WINDOW].view(WINDOWS, WINDOW)
    expected = log_probabilities(llmquant.load(original, dtype="float32"), ids)
    on_cpu = log_probabilities(llmquant.load(packed, dtype="float32"), ids)
    found: dict[str, Any] = {"cpu float32": divergence(expected, on_cpu)}
    for name in names:
        if not in_time():
            found[name] = {"refused": "no time was left"}
            continue
        try:
            model = load(kernel=name)
        except LlmquantError as e:
            found[name] = {"refused": str(e)}
            continue
        found[name] = divergence(expected, log_probabilities(model, ids))
    return found


@torch.inference_mode()
def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """``[windows, tokens, vocabulary]``, float32 on the CPU."""
    rows = [model(row.unsqueeze(0).to(model.device)).logits.float().cpu() for row in ids]
    return torch.cat(rows).log_softmax(-1)


def divergence(expected: Tensor, found: Tensor) -> float:
    each = (expected.exp() * (expected - found)).sum(-1)
    return float(each.mean())


def random_llama(
    config: dict[str, Any], spec: QuantSpec, device: torch.device, dtype: torch.dtype, kernel: str
) -> LlamaForCausalLM:
    """A Llama with drawn packed linears in its blocks; head and embeddings dense."""
    use_grouped_sdpa(device)
    with device:
        model = LlamaForCausalLM(LlamaConfig(**config, num_hidden_layers=1)).to(dtype)
        layer = type(model.model.layers[0])
        model.model.layers = nn.ModuleList(
            packed_block(layer(model.config, i), spec, device, dtype, kernel)
            for i in range(int(config["blocks"]))
        )
        model.config.num_hidden_layers = int(config["blocks"])
    return model.eval().requires_grad_(False)


def packed_block(
    block: nn.Module, spec: QuantSpec, device: torch.device, dtype: torch.dtype, kernel: str
) -> nn.Module:
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.Linear):
            weight = random_weight((module.out_features, module.in_features), spec)
            linear = PackedLinear(weight, dtype=dtype, device=device, kernel=kernel)
            block.set_submodule(name, linear)
    return block.to(dtype)


def speeds(model: Any, prefill: int = PREFILL, prompt: int = PROMPT) -> dict[str, float | str]:
    """Tokens per second of one decoded token behind ``prompt`` others, and of a prompt; as Python
    calls them, and of a token as the server decodes it."""
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (1, prefill), device=model.device)
    cache = DynamicCache(config=model.config)

    def read() -> object:
        return model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)

    def decode() -> object:
        return model(ids[:, :1], past_key_values=cache, logits_to_keep=1)

    with torch.inference_mode():
        model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
        for work in (read, decode):
            work()
        return {
            "decode_tokens_per_second": 1 / seconds(decode, model.device),
            "prefill_tokens_per_second": prefill / seconds(read, model.device),
            **served(model, ids[:, :prompt]),
        }


def served(model: Any, prompt: Tensor) -> dict[str, float | str]:
    """Tokens per second of one row behind ``prompt`` as ``llmquant serve`` decodes it: recorded as
    a CUDA graph, or the same step run anew where nothing is recorded."""
    record = step_graph.recorder_for(model)
    cache = RowCache(model.config.num_hidden_layers, 1)
    cache.join(model(prompt, use_cache=True).past_key_values, prompt.shape[1])
    cache.before_step()
    graphs = step_graph.StepGraphs(model, cache, record or (lambda run: run))

    def step() -> object:
        return graphs.step([0])

    step()
    how = graphs.failed or ("recorded" if record else "run anew")
    return {"served_tokens_per_second": 1 / seconds(step, model.device), "served": how}


def each_kernel(
    make: Callable[..., Any], names: Sequence[str], in_time: Callable[[], bool], prefill: int
) -> dict[str, Any]:
    """Speeds with every kernel that takes the model."""
    found: dict[str, Any] = {}
    for name in names:
        if not in_time():
            found[name] = {"refused": "no time was left"}
            continue
        try:
            model = make(kernel=name)
        except LlmquantError as e:
            found[name] = {"refused": str(e)}
            continue
        found[name] = speeds(model, prefill, min(PROMPT, prefill // 2))
        print(f"{name:12} {found[name]}", flush=True)
        del model
    return found
