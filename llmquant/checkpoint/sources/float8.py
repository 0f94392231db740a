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
from llmquant.checkpoint.sources.blocks import ONE, Grid, Sizes, sizes_of
from llmquant.checkpoint.sources.derived import Made, rounded
from llmquant.errors import UsageError

DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("_scale_inv", "_scale")
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
        CheckpointError: scales of another shape than the weight's blocks, or blocks whose size is
            not known.
    """
    grids = [_grid(reader, name) for name in weights_of(reader)]
    sizes = sizes_of(reader.path, grids, label)
    for grid in grids:
        name, scale, size = grid.name, grid.scale, sizes[grid.name]
        module = name.rpartition(".")[0]
        beside = (f"{module}.{leaf}" for leaf in _OF_ACTIVATIONS)
        yield (
            name,
            Made(
                (name, scale),
                partial(_times, f"{reader.path}: tensor {name}", size, dtype),
                grid.shape,
                dtype,
                whole=(scale,) if size == ONE else (),
            ),
            (scale, *(n for n in beside if n in reader)),
        )


def _grid(reader: CheckpointReader, name: str) -> Grid:
    scale = next((f"{name}{s}" for s in _SCALES if f"{name}{s}" in reader), None)
    if scale is None:
        raise UsageError(
            f"{reader.path}: {name} is in FP8 and has no scale ({name}{_SCALES[0]} or {name}{_SCALES[1]}), so what it "
            "means is not known; give the original FP16 or BF16 model"
        )
    return Grid(name, reader.info(name).shape, scale, reader.info(scale).shape)


def _times(where: str, sizes: Sizes, dtype: torch.dtype, weight: Tensor, scale: Tensor) -> Tensor:
    """The numbers, multiplied in float32 and rounded once."""
    factors = scale.float()
    if scale.dtype == torch.uint8:  # exponents
        factors = torch.ldexp(torch.ones(scale.shape), scale.int() - 127)
    if sizes == ONE:
        return rounded(weight.float() * factors.reshape(()), dtype, where)
    if factors.ndim == 1:
        factors = factors.unsqueeze(-1)
    rows, columns = weight.shape[-2:]
    factors = factors.repeat_interleave(sizes[0], -2)[..., :rows, :]
    factors = factors.repeat_interleave(sizes[1], -1)[..., :columns]
    return rounded(weight.float() * factors, dtype, where)
