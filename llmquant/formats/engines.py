"""What serving engines take: one table, asked by ``inspect`` and the tests before anybody waits for
an engine to refuse.

Each rule is a fact that was seen: the suite marked ``vllm`` loads a model for every row of it in
the real engine, and finds it either equal to llmquant's numbers or refused. ``llmquant`` itself
takes every scheme, so it has no rules.

What vLLM takes on a CPU depends on the CPU: it comes with one library of kernels for CPUs with
AVX-512 and another, smaller one for those without. These are two engines here, and a rule may hold
for the second alone. Both answer on every machine, because a model is often made on another machine
than the one that serves it; :func:`vllm_here` says which of them this one is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import itemgetter

from llmquant.formats import Scheme
from llmquant.formats.base import is_embedding, is_expert
from llmquant.formats.rules import (
    JOINED,
    NOT_IN_VLLM,
    NOTHING,
    OWN_CODE,
    STACKED,
    Beside,
    Rule,
)
from llmquant.runtime.processor import Processor, this_processor

VLLM_AVX512 = "vllm (CPU with AVX-512)"
VLLM_NO_AVX512 = "vllm (CPU without AVX-512)"

_GPTQ = frozenset({"gptq", "gptq_v2"})
_CT = frozenset({"compressed-tensors", "int-quantized"})
_ALL = _GPTQ | _CT | {"awq", "auto-round"}


def _weights_only(scheme: Scheme) -> bool:
    return scheme.activations == "none"


_VLLM_CPU = (
    Rule(
        _ALL,
        lambda s: True,
        "vLLM 0.32 has no model of this type and cannot run transformers' own, unquantized or not",
        models=NOT_IN_VLLM,
    ),
    Rule(
        _ALL,
        lambda s: True,
        "its CPU build runs no model that carries states besides keys and values, unquantized or not",
        stateful=True,
    ),
    Rule(
        _CT,
        lambda s: True,
        "its look-up in packed embeddings is a Triton kernel, which its CPU build has not",
        embeddings=True,
    ),
    Rule(
        _GPTQ | _CT,
        lambda s: s.g_idx,
        "it refuses a stored g_idx (desc_act, actorder group); quantize with --act-order static",
    ),
    Rule(
        _ALL,
        lambda s: _weights_only(s) and s.spec.bits == 8,
        "its CPU build has no kernel for 8-bit weights with 16-bit activations (its GPU kernels take them)",
    ),
    Rule(_ALL, lambda s: s.spec.bits in (2, 3), "it has no kernel for 2 or 3 bits here"),
    Rule(
        _GPTQ,
        lambda s: not s.spec.symmetric,
        "it takes asymmetric weights only as compressed-tensors or awq",
    ),
    Rule(_GPTQ, lambda s: s.spec.group_size == 16, "its GPTQ kernel has no groups of 16"),
    Rule(
        _CT,
        _weights_only,
        "it has no kernel for experts of 4 bits in compressed-tensors here; it takes them as gptq or awq",
        experts=True,
    ),
    Rule(
        _ALL,
        lambda s: True,
        "its kernels for quantized experts need AVX-512 and AMX",
        experts=True,
        lacking="avx512f",
    ),
    # The last one, so that what it says of other CPUs is true of every scheme that gets here.
    Rule(
        _ALL,
        lambda s: _weights_only(s) and s.spec.bits == 4,
        "its kernels for 4-bit weights need AVX-512 (on a CPU that has it they take this)",
        lacking="avx512f",
    ),
)

_UNSTACKED = "it reads the experts of this model type only stacked and unquantized, and would put random numbers in their place"
_TRANSFORMERS = (
    Rule(_ALL, lambda s: True, _UNSTACKED, experts=True, models=STACKED),
    Rule(_ALL, lambda s: True, _UNSTACKED, plain_experts=True, models=STACKED),
    Rule(
        _ALL,
        lambda s: True,
        "its own code for this model type does not find the weights of packed linears",
        models=OWN_CODE,
    ),
    Rule(
        _GPTQ | {"awq", "auto-round"}, lambda s: True, "it asks for the compiled gptqmodel package"
    ),
    Rule(
        _CT,
        lambda s: True,
        "transformers 5.23 initializes every embedding, and fails at a packed one",
        embeddings=True,
    ),
    Rule(
        _CT,
        lambda s: True,
        "transformers 5.23 splits matrices of this model type's eye as it reads them, and fails at that beside packed ones",
        models=frozenset({"qianfan_ocr"}),
    ),
    Rule(
        _CT,
        lambda s: True,
        "transformers 5.23 joins tensors of this model type as it reads them, and fails at that beside packed ones",
        models=JOINED,
    ),
    Rule(_CT, lambda s: s.g_idx, "compressed-tensors 0.18 and later have dropped g_idx"),
    Rule(
        _CT,
        lambda s: _weights_only(s) and not s.spec.symmetric,
        "transformers 5.23 with compressed-tensors 0.20 mistakes packed zero-points for unpacked ones",
    ),
    Rule(
        _CT,
        lambda s: not _weights_only(s),
        "transformers 5.23 cannot stack experts that are stored as int8",
        experts=True,
    ),
    Rule(
        _CT,
        lambda s: True,
        "transformers 5.23 fails at a mixture with experts that are not quantized beside linears that are",
        plain_experts=True,
        but=frozenset({"llama4_text"}),
    ),
    Rule(
        _CT,
        lambda s: True,
        "it reads all experts by one scheme, and here they have several",
        experts=True,
        several=True,
    ),
)

ENGINES: Mapping[str, tuple[Rule, ...]] = {
    VLLM_AVX512: tuple(r for r in _VLLM_CPU if r.lacking != "avx512f"),
    VLLM_NO_AVX512: _VLLM_CPU,
    "transformers": _TRANSFORMERS,
}

# Taken, but not with the numbers that were evaluated. Seen on Zen 3: oneDNN's int8 multiplication
# adds pairs of products in 16 bits there and cuts off what does not fit, by up to half of the
# result; of codes within ±63, where nothing overflows, it is exact.
_CAUTIONS: Mapping[str, tuple[Rule, ...]] = {
    VLLM_NO_AVX512: (
        Rule(
            _CT,
            lambda s: not _weights_only(s),
            "without VNNI instructions its int8 sums overflow, so its answers are further from the evaluated ones",
            lacking="avx512f",
        ),
    )
}


def vllm_here(processor: Processor | None = None) -> str | None:
    """The engine that vLLM is on a processor, by default this one; None where that is unknown (no
    x86, or nobody can tell).

    vLLM goes by what the processor has, also where variables hold torch to less.
    """
    found = processor or this_processor()
    if not found.is_x86 or not found.known:
        return None
    return (
        VLLM_AVX512 if "avx512f" in (*found.instruction_sets, *found.held_back) else VLLM_NO_AVX512
    )


def why_not(
    engine: str, layout: str, scheme: Scheme, module: str = "", model: Beside = NOTHING
) -> str | None:
    """Why an engine refuses a module of this scheme in this layout, or None; what it is called
    tells an expert's linear."""
    rules = (r for r in ENGINES[engine] if r.concerns(layout, module, model))
    return next((r.reason for r in rules if r.refuses(scheme)), None)


def refusals(
    layout: str, schemes: Mapping[str, Scheme], model: Beside = NOTHING
) -> dict[str, tuple[str, ...]]:
    """Engine → the distinct reasons why it would refuse a model of these modules; none means that
    it takes it."""
    model = replace(model, several=len({s for n, s in schemes.items() if is_expert(n)}) > 1)
    kinds = {
        (scheme, is_expert(name), is_embedding(name)): name
        for name, scheme in sorted(schemes.items(), key=itemgetter(0))  # one order of reasons
    }
    return {
        engine: tuple(
            dict.fromkeys(
                r for k, name in kinds.items() if (r := why_not(engine, layout, k[0], name, model))
            )
        )
        for engine in ENGINES
    }


def cautions(layout: str, schemes: Mapping[str, Scheme]) -> dict[str, tuple[str, ...]]:
    """Engine → why its answers are not the evaluated ones though it takes the model; engines that
    are exact are left out."""
    found = {
        engine: tuple(
            r.reason
            for r in rules
            if layout in r.layouts and any(r.refuses(s) for s in schemes.values())
        )
        for engine, rules in _CAUTIONS.items()
    }
    return {engine: reasons for engine, reasons in found.items() if reasons}


def answers(
    refused: Mapping[str, Sequence[str]], cautioned: Mapping[str, Sequence[str]]
) -> list[tuple[str, str]]:
    """Rows for a screen: each engine, marked where it is this machine's, and what it makes of the
    model."""
    rows = []
    for engine, reasons in refused.items():
        answer = (
            f"refuses it: {'; '.join(reasons)}"
            if reasons
            else "; ".join(("takes it", *cautioned.get(engine, ())))
        )
        rows.append((engine, f"(like this machine) {answer}" if engine == vllm_here() else answer))
    return rows


def of_the_model_type(layout: str, schemes: Mapping[str, Scheme], model: Beside) -> list[str]:
    """What transformers alone makes of any packed folder of this model type: such a folder it
    may load, with random numbers in the place of what it did not find."""
    every = (
        rule.reason
        for rule in _TRANSFORMERS
        if rule.models
        for name, scheme in schemes.items()
        if rule.concerns(layout, name, model) and rule.refuses(scheme)
    )
    return [
        f"transformers alone cannot read this model (llmquant.register_with_transformers() can): {reason}"
        for reason in dict.fromkeys(every)
    ]


def on_this_cpu(
    layout: str, schemes: Mapping[str, Scheme], model: Beside = NOTHING
) -> tuple[list[str], list[str]]:
    """What vLLM on CPUs says of a model of these modules: what no CPU takes, and what only this
    machine's does not, or worse."""
    reasons = refusals(layout, schemes, model)
    everywhere = reasons[VLLM_AVX512]
    here: list[str] = []
    if vllm_here() == VLLM_NO_AVX512:
        refused = [r for r in reasons[VLLM_NO_AVX512] if r not in everywhere]
        this = "vLLM on a CPU without AVX-512, as this one is,"
        here = [f"{this} will refuse this model: {reason}" for reason in refused]
        if not reasons[VLLM_NO_AVX512]:
            here = [
                f"{this} takes this model: {reason}"
                for reason in cautions(layout, schemes).get(VLLM_NO_AVX512, ())
            ]
    return [f"vLLM on a CPU will refuse this model: {reason}" for reason in everywhere], here
