"""Dense bit packing: a row of b-bit codes as one little-endian bit stream in int32 words.

Code ``i`` of a row occupies bits ``i*b … i*b + b - 1`` of the stream; bit ``k`` of the stream is
bit ``k % 32`` of word ``k // 32``. For 2, 4 and 8 bits no code straddles a word; for 3 bits 32
codes fill exactly 3 words, which is both GPTQ's and compressed-tensors' layout
(:func:`unpack_padded` reads the latter's older one).

``pack``/``unpack`` are vectorized; :func:`pack_slow` is the obvious twin that the tests hold them
equal to.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmquant.errors import FormatError


def words(count: int, bits: int) -> int:
    """int32 words needed for ``count`` codes."""
    return math.ceil(count * bits / 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack along the last dimension.

    Args:
        codes: uint8 ``[..., n]``, each < 2**bits.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 ``[..., ceil(n * bits / 32)]``; unused high bits of the last word are zero.
    """
    *lead, n = codes.shape
    padded = math.ceil(n / 32) * 32
    if padded != n:
        codes = torch.nn.functional.pad(codes, (0, padded - n))
    chunk = codes.reshape(-1, padded // 32, 32)
    if bits == 8:
        stream = chunk
    else:
        # 8 codes fill exactly `bits` bytes: spread them over one int64 and keep the low bytes.
        shifts = torch.arange(8, device=codes.device, dtype=torch.int64) * bits
        octets = chunk.reshape(chunk.shape[0], -1, 8).to(torch.int64)
        word = (octets << shifts).sum(-1)
        stream = word.unsqueeze(-1).view(torch.uint8)[..., :bits]
    packed = stream.reshape(chunk.shape[0], -1).contiguous().view(torch.int32)
    return packed[:, : words(n, bits)].reshape(*lead, words(n, bits)).contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`pack`: uint8 ``[..., count]``.

    Raises:
        FormatError: when the last dimension does not hold exactly ``count`` codes.
    """
    *lead, n_words = packed.shape
    if packed.dtype != torch.int32 or n_words != words(count, bits):
        raise FormatError(
            f"{count} codes of {bits} bits need {words(count, bits)} int32 words a row, "
            f"the tensor has {n_words} of {packed.dtype}"
        )
    padded_words = math.ceil(count / 32) * bits
    if padded_words != n_words:
        packed = torch.nn.functional.pad(packed, (0, padded_words - n_words))
    stream = packed.reshape(-1, padded_words).contiguous().view(torch.uint8)
    if bits == 8:
        codes = stream
    elif bits in (2, 4):
        shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
        codes = (stream.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    else:
        octets = stream.reshape(stream.shape[0], -1, bits).to(torch.int64)
        byte_shift = torch.arange(bits, device=packed.device, dtype=torch.int64) * 8
        code_shift = torch.arange(8, device=packed.device, dtype=torch.int64) * bits
        word = (octets << byte_shift).sum(-1, keepdim=True)
        codes = ((word >> code_shift) & ((1 << bits) - 1)).to(torch.uint8)
    return (
        codes.reshape(-1, padded_words * 32 // bits)[:, :count].reshape(*lead, count).contiguous()
    )


def unpack_padded(packed: Tensor, bits: int, count: int) -> Tensor:
    """Read the layout in which no code straddles a word: ``32 // bits`` codes to a word, the rest
    of it unused.

    compressed-tensors wrote 3 bits like this up to 0.17, under the same label as the dense stream;
    other widths do not differ.

    Args:
        packed: int32 ``[..., ceil(count / (32 // bits))]``.

    Returns:
        uint8 ``[..., count]``.
    """
    *lead, n_words = packed.shape
    per_word = 32 // bits
    if packed.dtype != torch.int32 or n_words != math.ceil(count / per_word):
        raise FormatError(
            f"{count} codes of {bits} bits do not fill {n_words} padded words of {packed.dtype}"
        )
    shifts = torch.arange(per_word, device=packed.device, dtype=torch.int32) * bits
    codes = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.to(torch.uint8).reshape(*lead, n_words * per_word)[..., :count].contiguous()


def pack_slow(codes: list[int], bits: int) -> list[int]:
    """The definition, one bit at a time: signed int32 words of one row of codes."""
    out = [0] * words(len(codes), bits)
    for i, code in enumerate(codes):
        for b in range(bits):
            if code >> b & 1:
                out[(i * bits + b) // 32] |= 1 << ((i * bits + b) % 32)
    return [w - (1 << 32) if w >= 1 << 31 else w for w in out]
