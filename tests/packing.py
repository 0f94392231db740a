"""Helpers of the tests: random quantized weights, and a packed copy of a small model, made by the
plainest means."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmquant.algorithms import rtn
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.checkpoint.writer import CheckpointWriter
from llmquant.formats import FORMATS, Scheme
from llmquant.kernels.int4 import cpu_layout
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight, portable

TINY = Path(__file__).parent.parent / "examples" / "tiny-llama"
needs_int4 = pytest.mark.skipif(
    cpu_layout.block_rows() is None, reason="torch's int4 layout is not known on this CPU"
)


def random_weight(
    out_features: int,
    in_features: int,
    spec: QuantSpec,
    *,
    seed: int = 0,
    scale_dtype: torch.dtype | None = None,
    g_idx: Tensor | None = None,
) -> QuantizedWeight:
    """Uniform codes and zeros; portable scales, or scales with the bits of ``scale_dtype``."""
    generator = torch.Generator().manual_seed(seed)
    params = (out_features, spec.groups(in_features))
    codes = torch.randint(
        0, spec.levels, (out_features, in_features), generator=generator, dtype=torch.uint8
    )
    zeros = torch.randint(0, spec.levels, params, generator=generator, dtype=torch.uint8)
    if spec.symmetric:
        zeros.fill_(spec.middle)
    scales = torch.rand(params, generator=generator) * 0.01 + 0.001
    scales = portable(scales) if scale_dtype is None else scales.to(scale_dtype).to(torch.float32)
    return QuantizedWeight(codes, scales, zeros, spec, g_idx)


def shuffled_groups(in_features: int, groups: int, seed: int = 0) -> Tensor:
    """A g_idx with groups of equal size in random column order."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randperm(in_features, generator=generator) % groups).to(torch.int32)


def pack_folder(
    source: Path,
    destination: Path,
    spec: QuantSpec,
    edit: Callable[[dict[str, Tensor]], None] | None = None,
) -> dict[str, QuantizedWeight]:
    """Round every ``*_proj`` of a model folder to nearest and write it in the default format;
    returns the weights.

    ``edit`` may tamper with the tensors before they are written.
    """
    reader = CheckpointReader(source)
    layout = FORMATS["compressed-tensors"]
    tensors: dict[str, Tensor] = {}
    weights: dict[str, QuantizedWeight] = {}
    for name in reader.tensors:
        module = name.removesuffix(".weight")
        if module.endswith("_proj"):
            weights[module] = rtn(reader.read(name), spec)
            packed = layout.pack(weights[module], torch.float16)
            tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in packed.items()}
        else:
            tensors[name] = reader.read(name)
    if edit is not None:
        edit(tensors)
    config = dict(reader.config)
    config["quantization_config"] = layout.config({m: Scheme(spec) for m in weights}, ["lm_head"])
    with CheckpointWriter(destination) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish_weights()
        writer.write_text("config.json", json.dumps(config))
        writer.copy_side_files(source)
        writer.publish()
    return weights
