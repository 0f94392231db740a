"""What the model builder reads: a GPTQ folder of the packed numbers, or a float one.

Only the builder ever sees the GPTQ folder, and it is no file for other readers: scales are float32,
because the builder takes codes back through products with them, and zero-points are stored less
one modulo 2^bits, because it adds one so. Linears that the builder could not keep (the embeddings;
a head whose groups it does not take) are written as float32, which holds their products exactly.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant import bitpack
from llmquant.checkpoint.detect import without_quantization
from llmquant.checkpoint.writer import CheckpointWriter
from llmquant.conversion.source import Source
from llmquant.errors import ArchitectureError, FormatError, LayoutError
from llmquant.formats import Scheme
from llmquant.formats.base import exact, is_embedding
from llmquant.models.selection import PLACELESS, SHARED
from llmquant.runtime.finite import some
from llmquant.weight import QuantizedWeight

# Of the architectures that onnxruntime-genai's builder (0.18) has: those of one list of blocks
# whose packed linears it finds by name.
ARCHITECTURES = (
    "Ernie4_5ForCausalLM",
    "Gemma2ForCausalLM",
    "GemmaForCausalLM",
    "GraniteForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "OlmoForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
)
BITS = (2, 4, 8)
_SMALLEST_GROUP = 16


def check_architecture(config: Mapping[str, Any], where: Path) -> None:
    """Raises ArchitectureError for a model that the builder lacks."""
    named = (config.get("architectures") or ["none"])[0]
    if named not in ARCHITECTURES:
        raise ArchitectureError(
            f"{where}: {named} is not among the architectures that are exported to ONNX: "
            f"{', '.join(a.removesuffix('ForCausalLM') for a in ARCHITECTURES)}"
        )


def why_not(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Why MatMulNBits or its builder cannot hold a weight ``[out, in]`` of this scheme, or None."""
    spec, width = scheme.spec, scheme.spec.width(shape[1])
    if spec.bits not in BITS:
        return f"ONNX Runtime multiplies by weights of 2, 4 and 8 bits, not {spec.bits}"
    if scheme.g_idx:
        return "a g_idx cannot be exported; quantize with --act-order static"
    if width < _SMALLEST_GROUP or width & (width - 1):
        return (
            f"a scale for every {width} columns; ONNX Runtime takes groups of a power of two, "
            f"{_SMALLEST_GROUP} or more"
        )
    for what, size in (("input", shape[1]), ("output", shape[0])):
        if size * spec.bits % 32:
            return f"the {what} size {size} at {spec.bits} bits does not fill whole 32-bit words"
    return None


@dataclass(frozen=True, slots=True)
class Plan:
    """Which modules stay packed, and which are written as float32."""

    packed: Mapping[str, Scheme]
    floats: tuple[str, ...]


def plan(source: Source, dtype: torch.dtype) -> Plan:
    """Sort the packed modules of a folder.

    Args:
        dtype: of the graph's scales.

    Raises:
        LayoutError: linears that the export cannot hold, each with its reason.
    """
    packed: dict[str, Scheme] = {}
    floats: list[str] = []
    refused: dict[str, list[str]] = {}
    for name, scheme in source.packed.schemes.items():
        reason = why_not(scheme, source.packed.shape(name))
        if is_embedding(name) or (name == source.head and reason is not None):
            floats.append(name)
            continue
        reason = reason or _numbers(source.weight(name), dtype)
        if reason is None:
            packed[name] = scheme
        else:
            refused.setdefault(reason, []).append(name)
    alone = [
        n
        for n, why in source.skipped.items()
        if n != source.head and why not in (PLACELESS, SHARED)
    ]
    if alone:
        what = "not quantized; the builder takes no block of which only a part is packed"
        refused.setdefault(what, []).extend(alone)
    if refused:
        lines = "".join(f"\n  {some(names)}: {why}" for why, names in refused.items())
        raise LayoutError(f"{source.reader.path} cannot be exported to ONNX without loss:{lines}")
    return Plan(packed, tuple(floats))


def _numbers(weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
    """Why a weight's numbers would not survive, or None."""
    nothing = int((weight.scales == 0).sum())
    if nothing:
        return f"{nothing} of {weight.scales.numel()} scales are 0, from which the builder cannot take codes back"
    try:
        exact(weight.scales, dtype)
    except FormatError as e:
        return str(e)
    return None


def write_packed(source: Source, chosen: Plan, folder: Path) -> None:
    """The folder that the builder reads. It must not exist."""
    with CheckpointWriter(folder) as writer:
        for name in source.packed.others:
            writer.add(name, source.reader.read(name))
        for name in source.packed.schemes:
            if name in chosen.floats:
                writer.add(f"{name}.weight", source.weight(name).dequantize(torch.float32))
            else:
                tensors = _as_gptq(source.weight(name))
                writer.add_together({f"{name}.{suffix}": t for suffix, t in tensors.items()})
        writer.finish_weights()
        writer.copy_side_files(source.reader.path)
        config = without_quantization(source.reader.config)
        writer.write_json("config.json", {**config, "quantization_config": _label(chosen.packed)})
        writer.publish()


def _as_gptq(weight: QuantizedWeight) -> dict[str, Tensor]:
    bits = weight.spec.bits
    less_one = (weight.zeros + weight.spec.max_code) & weight.spec.max_code
    return {
        "qweight": bitpack.pack(weight.codes, bits).T.contiguous(),
        "qzeros": bitpack.pack(less_one.T.contiguous(), bits),
        "scales": weight.scales.T.contiguous(),
        "g_idx": weight.column_groups().to(torch.int32),
    }


def _label(schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """``quantization_config`` as the builder reads it: the commonest scheme, and the others by
    name."""
    kinds = Counter((s.spec.bits, s.spec.group_size or -1) for s in schemes.values())
    (bits, group), _ = kinds.most_common(1)[0]
    others = {
        f"+:{re.escape(name)}(\\.|$)": {"bits": s.spec.bits, "group_size": s.spec.group_size or -1}
        for name, s in schemes.items()
        if (s.spec.bits, s.spec.group_size or -1) != (bits, group)
    }
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "sym": False,
        "dynamic": others,
    }


def one_scheme(schemes: Mapping[str, Scheme]) -> bool:
    """Whether q, k and v of every layer have one grid, so that the builder may fuse them."""
    grids: dict[str, set[tuple[int, int | None]]] = {}
    for name, scheme in schemes.items():
        layer, _, role = name.rpartition(".")
        if role in ("q_proj", "k_proj", "v_proj"):
            grids.setdefault(layer, set()).add((scheme.spec.bits, scheme.spec.group_size))
    return all(len(kinds) == 1 for kinds in grids.values())
