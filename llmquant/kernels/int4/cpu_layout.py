"""The byte layout of torch's int4 CPU operator, and reading it back fast enough to feed a GEMM.

``_convert_weight_to_int4pack_for_cpu`` cuts a weight ``[out, in]`` into blocks of B rows (B = 64
with AVX-512, 32 with AVX2)
and stores each block column by column, B/2 bytes a column. With ``h = B/2``::

    byte [block, k, j]    low nibble  = code[block*B + j,     k]
                          high nibble = code[block*B + j + h, k]

A last block of fewer rows, and CPUs without either instruction set, are laid out otherwise;
:func:`pack` pads the rows to a multiple of 64 so that no such block exists, and :func:`block_rows`
packs a probe and reads it back before anything trusts the layout. Nothing here assumes a torch
version: if the bytes move, the probe fails and the kernel refuses.

:func:`dequantize_tile` turns a range of blocks into bf16 ``[in, rows]``, the right-hand side of ``x
@ W``. torch has no fused unpacking, and strided bit operations are ten times slower than contiguous
ones, so it works on int32 words (4 adjacent rows, both nibbles): mask one nibble set, fold it to a
16-bit number, look four bf16 integers up at once in a table of 65536 (512 KiB: it stays in L2),
multiply by the scale into place. ``code - 8`` and ``code - zero`` are exact in bf16 and torch
multiplies bf16 in float32 and rounds once, so the tile equals
``QuantizedWeight.dequantize(bfloat16)`` bit for bit.
"""

from __future__ import annotations

import functools
import math
import threading

import torch
from torch import Tensor

ROW_MULTIPLE = (
    64  # the largest block of any instruction set: a multiple of it leaves no short block
)
_PACK_ROWS = 1024  # rows converted at a time; the operator wants int32, 8 bytes a packed byte
_TILE_BLOCKS, _TILE_COLUMNS = (
    32,
    512,
)  # of one pass of the table look-up; its temporaries stay in L2 (measured)
_NIBBLES = 0x0F0F0F0F


def padded_rows(out_features: int) -> int:
    """Rows as stored: ``out_features`` rounded up to a multiple of 64."""
    return -(-out_features // ROW_MULTIPLE) * ROW_MULTIPLE


def pack(codes: Tensor) -> Tensor:
    """uint8 codes ``[out, in]`` → torch's int4 layout, uint8 ``[padded_rows(out), in/2]``; padding
    rows hold code 0."""
    out_features, in_features = codes.shape
    packed = torch.empty(padded_rows(out_features), in_features // 2, dtype=torch.uint8)
    for start in range(0, packed.shape[0], _PACK_ROWS):
        chunk = codes[start : start + _PACK_ROWS].to(torch.int32)
        rows = min(_PACK_ROWS, packed.shape[0] - start)
        if chunk.shape[0] != rows:
            chunk = torch.nn.functional.pad(chunk, (0, 0, 0, rows - chunk.shape[0]))
        packed[start : start + rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            chunk.contiguous(), 1
        )
    return packed


def unpack(packed: Tensor, block: int) -> Tensor:
    """Inverse of :func:`pack` for blocks of ``block`` rows: uint8 ``[padded rows, in]``."""
    rows, half_columns = packed.shape
    stored = packed.view(rows // block, half_columns * 2, block // 2)
    codes = torch.cat([stored & 15, stored >> 4], dim=-1)
    return codes.transpose(1, 2).reshape(rows, half_columns * 2)


@functools.cache
def block_rows() -> int | None:
    """Rows per block on this machine: 64 or 32, or None when a probe does not read back as the
    layout says."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(0, 16, (3 * ROW_MULTIPLE, 32), generator=generator, dtype=torch.uint8)
    try:
        packed = pack(probe)
    except (RuntimeError, AttributeError):  # no such operator in this build
        return None
    return next((b for b in (64, 32) if torch.equal(unpack(packed, b), probe)), None)


@functools.cache
def _table() -> Tensor:
    """int64 ``[65536]``: four bf16 integers ``nibble - 8`` for the nibbles at bits 0, 8, 4 and 12,
    rows j … j+3."""
    index = torch.arange(1 << 16)
    # Folding a masked word by 12 bits leaves the nibbles of bytes 0, 1, 2, 3 at bits 0, 8, 4 and
    # 12.
    quads = torch.stack([(index >> shift & 15) - 8 for shift in (0, 8, 4, 12)], dim=-1)
    return quads.to(torch.bfloat16).contiguous().view(torch.int64).squeeze(-1)


class _Scratch(threading.local):
    """One growing buffer per purpose and thread. Fresh pages would cost as much as the arithmetic
    (measured: 2x)."""

    def __init__(self) -> None:
        self._bytes: dict[str, Tensor] = {}

    def take(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor, valid until the next ``take`` for the same purpose on this
        thread."""
        size = math.prod(shape) * dtype.itemsize
        held = self._bytes.get(purpose)
        if held is None or held.numel() < size:
            with torch.inference_mode(False):  # usable in and out of inference mode
                held = self._bytes[purpose] = torch.empty(size, dtype=torch.uint8)
        return held[:size].view(dtype).view(shape)


_scratch = _Scratch()


def dequantize_tile(
    packed: Tensor, block: int, rows: slice, scales: Tensor, shift: Tensor | None
) -> Tensor:
    """bf16 ``[in, stop - start]`` of the rows ``start … stop - 1``, multiples of 64; valid until
    the next call.

    Args:
        packed: uint8 ``[padded rows, in/2]``.
        scales: bf16 or float32 ``[G, rows of the slice]``, exact.
        shift: bf16 ``[G, rows of the slice]``, ``8 - zero``; None when it is 0 everywhere.
    """
    in_features, half, count = packed.shape[1] * 2, block // 2, rows.stop - rows.start
    groups, blocks = scales.shape[0], count // block
    width = in_features // groups
    words = packed[rows].view(torch.int32).view(blocks, in_features, half // 4)
    weight = _scratch.take("weight", (in_features, count), torch.bfloat16)
    target = weight.view(groups, width, blocks, 2, half)
    factors = scales.view(groups, 1, blocks, 2, half)
    shifts = None if shift is None else shift.view(groups, 1, blocks, 2, half)
    step = max(1, _TILE_COLUMNS // width)
    for b in range(0, blocks, _TILE_BLOCKS):
        bs = slice(b, min(b + _TILE_BLOCKS, blocks))
        for g in range(0, groups, step):
            gs = slice(g, min(g + step, groups))
            shape = (gs.stop - g, width, bs.stop - b, half)
            piece = _scratch.take("piece", (shape[0] * width, shape[2], half // 4), torch.int32)
            piece.copy_(words[bs, g * width : gs.stop * width].transpose(0, 1))
            for nibble in (0, 1):
                codes = _lookup(piece, 4 * nibble).view(shape)
                if shifts is not None:
                    codes.add_(shifts[gs, :, bs, nibble])
                torch.mul(codes, factors[gs, :, bs, nibble], out=target[gs, :, bs, nibble])
    return weight


def _lookup(words: Tensor, bit: int) -> Tensor:
    """``nibble - 8`` in bf16 of every byte's nibble at ``bit`` (0, then 4: words are shifted), in
    byte order."""
    shape = tuple(words.shape)
    index, fold = (
        _scratch.take("index", shape, torch.int32),
        _scratch.take("fold", shape, torch.int32),
    )
    if bit:
        words.bitwise_right_shift_(bit)
    torch.bitwise_and(words, _NIBBLES, out=index)
    torch.bitwise_right_shift(index, 12, out=fold)
    index.bitwise_or_(fold).bitwise_and_(0xFFFF)
    quads = _scratch.take("quads", (words.numel(),), torch.int64)
    torch.index_select(_table(), 0, index.view(-1), out=quads)
    return quads.view(torch.bfloat16)
