"""The byte layout of torch's int4 CUDA operator, as tensor operations of any device.

``_convert_weight_to_int4pack`` (aten/src/ATen/native/cuda/int4mm.cu of torch, the kernel
``matrix_to_m16n8k16_Bint4_layout``) cuts a weight ``[out, in]`` into tiles of 8 rows and 16
columns, as a tensor core's B operand is spread over the 32 lanes of a warp. A lane is ``4 * row +
c`` and has, of each pair of tiles that follow one another in a row, 8 codes in an int32::

    int32 [tile of rows, columns / (16 * inner), lane, inner / 2]
    bits 4*i … 4*i + 3        code[row, 32*pair + 8*i + 2*c]          i = 0 … 3
    bits 16 + 4*i …           code[row, 32*pair + 8*i + 2*c + 1]

``inner`` tiles lie together: 8, so that a lane loads 16 bytes at once, or as many as divide the
columns. AMD's layout is another. Whether the torch at hand packs this way, :func:`agrees` asks it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

TILE_ROWS = 8
_LANES, _PAIR = 32, 32  # lanes of a warp; columns of two tiles


def inner_tiles(columns: int) -> int | None:
    """The most tiles of 16 columns that can lie together, or None where not even two can."""
    return next((tiles for tiles in (8, 4, 2) if columns % (16 * tiles) == 0), None)


def padded_rows(out_features: int) -> int:
    """Rows as stored: ``out_features`` rounded up to whole tiles."""
    return -(-out_features // TILE_ROWS) * TILE_ROWS


def pack(codes: Tensor) -> Tensor:
    """uint8 codes ``[out, in]`` → int32 ``[rows / 8, in / (16 * inner), 32, inner / 2]``; rows of
    padding hold code 0."""
    out_features, columns = codes.shape
    inner = inner_tiles(columns)
    assert inner is not None, columns
    rows = padded_rows(out_features)
    padded = torch.nn.functional.pad(codes, (0, 0, 0, rows - out_features)).to(torch.int32)
    # rows, row; group of tiles, pair; i, c, whether odd
    cut = padded.view(rows // 8, 8, columns // (16 * inner), inner // 2, 4, 4, 2)
    nibbles = cut.permute(0, 2, 1, 5, 3, 6, 4).reshape(
        rows // 8, columns // (16 * inner), _LANES, inner // 2, 8
    )
    packed = nibbles[..., 0].clone()
    for i in range(1, 8):
        packed |= nibbles[..., i] << 4 * i
    return packed


def unpack(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack`: uint8 ``[rows, in]``, rows of padding included."""
    tiles, groups, _, pairs = packed.shape
    nibbles = torch.stack([(packed >> 4 * i & 15).to(torch.uint8) for i in range(8)], dim=-1)
    cut = nibbles.view(tiles, groups, 8, 4, pairs, 2, 4)  # tile, group, row, c, pair, odd, i
    return cut.permute(0, 2, 1, 4, 6, 3, 5).reshape(tiles * 8, groups * pairs * _PAIR)


@functools.cache
def agrees(device: torch.device) -> bool:
    """Whether torch's own packing on that device gives these bytes."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (16, 256), generator=generator, dtype=torch.uint8, device="cpu")
    bytes_ = (codes[:, ::2] << 4 | codes[:, 1::2]).to(device)  # the even column is the high half
    theirs = torch.ops.aten._convert_weight_to_int4pack(bytes_, 8)
    return torch.equal(theirs.cpu(), pack(codes))
