"""FP8 weights as numbers: a matrix of bytes times its scales.

Every layout that is published multiplies: one scale for a tensor (FP8 as AutoFP8, Mistral and
ModelOpt write it), one for each row (FBGEMM, compressed-tensors ``float-quantized``), or one for
each block (DeepSeek's ``weight_scale_inv``, which is no inverse). The last blocks of a matrix that
they do not divide are cut off. Scales of activations are for engines that round those; what is read
here is what the weights are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoint.reader import CheckpointReader
from llmquant.checkpoint.sources.derived import Made
from llmquant.errors import CheckpointError, UsageError

DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("_scale_inv", "_scale")
_ONE = (0, 0)  # rows and columns that share a scale, where all do
_OF_ACTIVATIONS = ("input_scale", "activation_scale", "input_scale_ub", "input_scale_inv")


def weights_of(reader: CheckpointReader) -> list[str]:
    """Tensors that are FP8 weights."""
    return [
        name
        for name, info in reader.tensors.items()
        if info.dtype in DTYPES and "scale" not in name.rpartition(".")[2]
    ]


def made_of(
    reader: CheckpointReader, label: Mapping[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, Made, tuple[str, ...]]]:
    """Every FP8 weight: its name, how it is made, and the stored tensors that are used up.

    Raises:
        UsageError: one without scales.
        CheckpointError: scales of another shape than the weight's blocks.
    """
    blocks = _blocks(label)
    for name in weights_of(reader):
        scale = next((f"{name}{s}" for s in _SCALES if f"{name}{s}" in reader), None)
        if scale is None:
            raise UsageError(
                f"{reader.path}: {name} is in FP8 and has no scale ({name}{_SCALES[0]} or {name}{_SCALES[1]}), so what it "
                "means is not known; give the original FP16 or BF16 model"
            )
        shape = reader.info(name).shape
        sizes = _sizes(shape, reader.info(scale).shape, blocks)
        if sizes is None:
            raise CheckpointError(
                f"{reader.path}: {scale} is {list(reader.info(scale).shape)}, which gives no blocks of {name}, {list(shape)}"
            )
        module = name.rpartition(".")[0]
        beside = (f"{module}.{leaf}" for leaf in _OF_ACTIVATIONS)
        yield (
            name,
            Made(
                (name, scale),
                partial(_times, sizes, dtype),
                shape,
                dtype,
                whole=(scale,) if sizes == _ONE else (),
            ),
            (scale, *(n for n in beside if n in reader)),
        )


def _blocks(label: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block, where the config says."""
    groups = label.get("config_groups")
    groups = groups.values() if isinstance(groups, dict) else ()
    inside = [
        g["weights"] for g in groups if isinstance(g, dict) and isinstance(g.get("weights"), dict)
    ]
    for found in (label.get("weight_block_size"), *(w.get("block_structure") for w in inside)):
        if (
            isinstance(found, list)
            and len(found) == 2
            and all(type(n) is int and n > 0 for n in found)
        ):
            return found[0], found[1]
    return None


def _sizes(
    shape: tuple[int, ...], grid: tuple[int, ...], blocks: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Rows and columns that share a scale, or ``_ONE``; None for shapes that do not fit."""
    if all(n == 1 for n in grid):
        return _ONE
    if len(shape) < 2:
        return None
    if len(grid) == 1:
        return (1, shape[-1]) if grid[0] == shape[-2] and len(shape) == 2 else None
    if len(grid) != len(shape) or grid[:-2] != shape[:-2]:
        return None
    rows, columns = shape[-2:]
    if (
        blocks is not None
        and tuple(-(-n // b) for n, b in zip(shape[-2:], blocks, strict=True)) == grid[-2:]
    ):
        return blocks
    if rows % grid[-2] or columns % grid[-1]:
        return None
    return rows // grid[-2], columns // grid[-1]


def _times(sizes: tuple[int, int], dtype: torch.dtype, weight: Tensor, scale: Tensor) -> Tensor:
    """The numbers, multiplied in float32 and rounded once."""
    factors = scale.float()
    if scale.dtype == torch.uint8:  # exponents
        factors = torch.ldexp(torch.ones(scale.shape), scale.int() - 127)
    if sizes == _ONE:
        return (weight.float() * factors.reshape(())).to(dtype)
    if factors.ndim == 1:
        factors = factors.unsqueeze(-1)
    rows, columns = weight.shape[-2:]
    factors = factors.repeat_interleave(sizes[0], -2)[..., :rows, :]
    factors = factors.repeat_interleave(sizes[1], -1)[..., :columns]
    return (weight.float() * factors).to(dtype)
