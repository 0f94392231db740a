"""What a rule of :mod:`llmquant.formats.engines` says, and what it asks of a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmquant.formats.base import EXPERT, Scheme, is_embedding, is_expert


@dataclass(frozen=True, slots=True)
class Rule:
    """One refusal: of which layouts, of which schemes, and why.

    Attributes:
        layouts: names of formats.
        refuses: of these schemes.
        reason: why, for people.
        experts: only of experts' linears.
        embeddings: only of token embeddings, for which there are no other rules.
        lacking: only on a processor without this instruction set, one of
            :data:`llmquant.runtime.processor.INSTRUCTION_SETS`.
        models: only of these model types; of every type where it is empty.
        but: not of these model types.
        plain_experts: only where some experts' linears are not packed.
        several: only where experts have several schemes.
        stateful: only of models that carry states besides keys and values.
    """

    layouts: frozenset[str]
    refuses: Callable[[Scheme], bool]
    reason: str
    experts: bool = False
    embeddings: bool = False
    lacking: str | None = None
    models: frozenset[str] = frozenset()
    but: frozenset[str] = frozenset()
    plain_experts: bool = False
    several: bool = False
    stateful: bool = False

    def concerns(self, layout: str, module: str, model: Beside) -> bool:
        """Whether it is about a module of this name."""
        return (
            layout in self.layouts
            and self.embeddings == is_embedding(module)
            and (not self.experts or is_expert(module))
            and (not self.models or bool(self.models & model.types))
            and not self.but & model.types
            and (not self.plain_experts or model.plain_experts)
            and (not self.several or model.several)
            and (not self.stateful or model.stateful)
        )


# Model types that an engine treats otherwise than others.
STACKED = frozenset(
    {
        *("granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa"),
        *("gpt_oss", "aria_text", "nemotron_h", "qwen3_vl_moe"),
    }
)
OWN_CODE = frozenset(
    {
        *("falcon", "gpt2", "openai-gpt", "gpt_bigcode", "nanochat", "modernbert-decoder"),
        *("mamba", "mamba2", "falcon_mamba", "xlstm"),
        # compressed-tensors unpacks in a forward of the whole, and these have none (the first was
        # tried, the second is made alike).
        *("qwen2_5_omni", "qwen3_omni_moe"),
    }
)
JOINED = frozenset(
    # The last one's packed linears are joined, and so are the two numbers that say their shape.
    {*("kimi_linear", "olmo_hybrid", "glm5_next", "glm5_next_text"), "minimax_m3_vl"}
)
# vLLM 0.32 said so of their configs, and of the last two as it loaded them. Other types that it has
# no code for it runs by transformers'; seven of these were tried, and gave llmquant's numbers.
NOT_IN_VLLM = frozenset(
    {
        *("codegen", "gpt_neo", "gpt_neox_japanese", "mpt", "mvp", "openai-gpt", "prophetnet"),
        *("trocr", "xglm", "biogpt", "diffllama"),
    }
)
# Keys that only configs of models with states have (Mamba, gated delta rule, short convolutions …).
_STATES = frozenset(
    {
        *("state_size", "ssm_cfg", "mamba_d_state", "ssm_state_size", "attention_hidden_size"),
        *("lru_width", "linear_conv_kernel_dim", "conv_L_cache", "chunkwise_kernel"),
        *("short_conv_kernel_size",),
    }
)


@dataclass(frozen=True, slots=True)
class Beside:
    """What rules ask of a model beside its packed modules.

    Attributes:
        types: its model type, and that of its text part.
        plain_experts: some experts' linears are not packed.
        several: its packed experts have several schemes.
        stateful: it carries states besides keys and values.
    """

    types: frozenset[str] = frozenset()
    plain_experts: bool = False
    several: bool = False
    stateful: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], unpacked: Iterable[str]) -> Beside:
        """Of a model's config and the names of what is not packed; blocks behind the last one
        (further prediction heads) do not count, since engines do not build them here."""
        text = config.get("text_config")
        parts = (config, text if isinstance(text, dict) else {})
        blocks = next((n for p in parts if isinstance(n := p.get("num_hidden_layers"), int)), None)
        places = (m for name in unpacked if (m := EXPERT.search(name)))
        before = (re.findall(r"\.(\d+)\.", m.string[: m.start() + 1])[:1] for m in places)
        return cls(
            frozenset(str(p["model_type"]) for p in parts if "model_type" in p),
            any(blocks is None or not index or int(index[0]) < blocks for index in before),
            stateful=any(part.get(key) for part in parts for key in _STATES),
        )


NOTHING = Beside()
