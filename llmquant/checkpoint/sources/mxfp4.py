"""MXFP4 weights as numbers: gpt-oss's experts.

Blocks of 32 numbers of 4 bits (sign, two bits of exponent, one of mantissa), two in a byte with the
first in the low half, and a power of two for each block. ``NAME_blocks [experts, out, in/32, 16]``
and ``NAME_scales [experts, out, in/32]`` are ``NAME [experts, in, out]``: what an unquantized
checkpoint of the type holds, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from llmquant.checkpoint.reader import CheckpointReader
from llmquant.checkpoint.sources.derived import Made, rounded
from llmquant.errors import CheckpointError

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BLOCKS, _SCALES = "_blocks", "_scales"


def weights_of(reader: CheckpointReader) -> list[str]:
    """Names, without their ending, of the weights in MXFP4."""
    return [
        name.removesuffix(_BLOCKS)
        for name, info in reader.tensors.items()
        if name.endswith(_BLOCKS) and info.dtype == torch.uint8
    ]


def made_of(
    reader: CheckpointReader, dtype: torch.dtype
) -> Iterator[tuple[str, Made, tuple[str, ...]]]:
    """Every weight in MXFP4: its name, how it is made, and the stored tensors that are used up.

    Raises:
        CheckpointError: blocks without scales, or of another shape.
    """
    for name in weights_of(reader):
        blocks, scales = f"{name}{_BLOCKS}", f"{name}{_SCALES}"
        if scales not in reader:
            raise CheckpointError(
                f"{reader.path}: {blocks} has no {scales}; fetch the folder again"
            )
        shape = reader.info(blocks).shape
        if len(shape) != 4 or shape[3] != 16 or reader.info(scales).shape != shape[:3]:
            raise CheckpointError(
                f"{reader.path}: {blocks} is {list(shape)} and {scales} {list(reader.info(scales).shape)}, "
                "not [experts, out, in/32, 16] and [experts, out, in/32]"
            )
        whole = (shape[0], shape[2] * 32, shape[1])
        made = Made(
            (blocks, scales),
            partial(_numbers, f"{reader.path}: tensor {name}", dtype),
            whole,
            dtype,
        )
        yield name, made, (blocks, scales)


def _numbers(where: str, dtype: torch.dtype, blocks: Tensor, scales: Tensor) -> Tensor:
    table = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], dtype=torch.float32)
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).long()
    powers = torch.ldexp(torch.ones(scales.shape), scales.int() - 127)
    numbers = (table[codes] * powers.unsqueeze(-1)).flatten(-2)
    return rounded(numbers.transpose(-1, -2), dtype, where).contiguous()
