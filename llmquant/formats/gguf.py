"""GGUF's block types Q4_0, Q4_1 and Q8_0: 32 weights to a block with an fp16 scale inside it.
Tensors only; the file is :mod:`llmquant.conversion.gguf.file`.

Every row is a run of blocks of 32 columns, the first element's nibble low, element i+16 in the high
nibble of byte i::

    Q4_0  18 bytes  d fp16, 16 bytes      w = d * (q - 8)
    Q4_1  20 bytes  d fp16, m fp16, 16 b  w = d * q + m
    Q8_0  34 bytes  d fp16, 32 int8       w = d * q

A weight whose groups are whole blocks goes in exactly where its numbers allow: ``code - zero`` in
-8 … 7 for Q4_0, in -128 … 127 for Q8_0, and for Q4_1 ``m = -zero * d`` must be exact in fp16, which
a portable scale times 9, 11, 13 or 15 need not be. Nothing is ever rounded to fit: :func:`smallest`
chooses the narrowest type that holds *all* of a tensor's numbers. llama.cpp multiplies and adds in
float32, where ``d * q + m`` is exact too, so equal bytes mean equal weights.

What comes back has groups of 32, whatever went in: the same numbers, but a scale repeated for each
block.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from llmquant.errors import FormatError, LayoutError, QuantizationError
from llmquant.formats.base import Scheme, exact
from llmquant.runtime.finite import all_finite
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

BLOCK = 32
Kind = Literal["Q4_0", "Q4_1", "Q8_0"]
BLOCK_BYTES: dict[Kind, int] = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
_SPECS: dict[Kind, QuantSpec] = {
    "Q4_0": QuantSpec(4, BLOCK, True),
    "Q4_1": QuantSpec(4, BLOCK, False),
    "Q8_0": QuantSpec(8, BLOCK, True),
}


def why_not(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Why no type here can hold a weight ``[out, in]`` of this scheme, whatever its numbers, or
    None."""
    spec = scheme.spec
    if scheme.activations != "none":
        return "GGUF has no place for quantized activations"
    if scheme.g_idx:
        return "GGUF has no g_idx; quantize with --act-order static"
    if spec.width(shape[1]) % BLOCK:
        return f"GGUF has one scale per {BLOCK} columns, so a scale for every {spec.width(shape[1])} does not fit"
    return None


def pack(weight: QuantizedWeight, kind: Kind) -> Tensor:
    """uint8 ``[out, in / 32 * block bytes]``.

    Raises:
        FormatError: a number of the weight is none of this type.
    """
    reason = why_not(Scheme(weight.spec, weight.g_idx is not None), weight.shape)
    if reason:
        raise LayoutError(reason)
    out_features, in_features = weight.shape
    blocks = in_features // BLOCK
    repeats = blocks // weight.scales.shape[1]
    scales = weight.scales.repeat_interleave(repeats, 1)
    zeros = weight.zeros.repeat_interleave(repeats, 1)
    codes = weight.codes.view(out_features, blocks, BLOCK)
    signed = codes.to(torch.int16) - zeros.unsqueeze(-1)
    parts = [_halves(scales)]
    if kind == "Q8_0":
        parts.append(_within(signed, -128, 127, kind).to(torch.int8).view(torch.uint8))
    elif kind == "Q4_0":
        parts.append(_nibbles(_within(signed, -8, 7, kind) + 8))
    else:
        nibbles = _nibbles(_within(codes.to(torch.int16), 0, 15, kind))
        parts += [_minimum(scales, zeros), nibbles]
    return torch.cat(parts, -1).reshape(out_features, -1)


def smallest(weight: QuantizedWeight) -> Kind:
    """The narrowest type that holds the weight exactly.

    Raises:
        FormatError: none does; says why the widest does not.
    """
    for kind in ("Q4_0", "Q4_1"):
        try:
            pack(weight, kind)
        except FormatError:
            continue
        return kind
    pack(weight, "Q8_0")
    return "Q8_0"


def unpack(data: Tensor, kind: Kind) -> QuantizedWeight:
    """Inverse of :func:`pack`, with groups of 32.

    Raises:
        FormatError: rows that are no whole blocks, or a Q4_1 minimum that is no whole zero-point
            times its scale, as other quantizers write it.
        QuantizationError: a scale or a minimum that is not finite.
    """
    size = BLOCK_BYTES[kind]
    if data.dtype != torch.uint8 or data.ndim != 2 or data.shape[1] == 0 or data.shape[1] % size:
        raise FormatError(
            f"{kind} needs uint8 [out, blocks * {size}], got {data.dtype} {list(data.shape)}"
        )
    out_features = data.shape[0]
    blocks = data.reshape(out_features, -1, size)
    scales = _floats(blocks[..., :2])
    spec = _SPECS[kind]
    zeros = torch.full(scales.shape, spec.middle, dtype=torch.uint8)
    if kind == "Q8_0":
        codes = (blocks[..., 2:].contiguous().view(torch.int8).to(torch.int16) + spec.middle).to(
            torch.uint8
        )
    else:
        packed = blocks[..., -BLOCK // 2 :]
        codes = torch.cat([packed & 15, packed >> 4], -1)
        if kind == "Q4_1":
            minimum = _floats(blocks[..., 2:4])
            if not (all_finite(scales) and all_finite(minimum)):
                raise QuantizationError("a scale or a minimum is NaN or infinite")
            zeros = _zero_points(scales, minimum)
    return QuantizedWeight(codes.reshape(out_features, -1), scales, zeros, spec)


def _within(values: Tensor, low: int, high: int, kind: Kind) -> Tensor:
    least, most = int(values.min()), int(values.max())
    if least < low or most > high:
        raise FormatError(
            f"{kind} holds {low} … {high} steps of a scale, this weight has {least} … {most}"
        )
    return values


def _minimum(scales: Tensor, zeros: Tensor) -> Tensor:
    """fp16 bytes of Q4_1's ``m``; the product of an fp16 scale and a zero-point of up to 8 bits is
    exact in float32."""
    minimum = 0.0 - zeros * scales
    wrong = int((minimum.to(torch.float16).to(torch.float32) != minimum).sum())
    if wrong:
        raise FormatError(
            f"Q4_1 stores -zero * scale in fp16, which would round {wrong} of {minimum.numel()} groups; use Q8_0"
        )
    return _halves(minimum)


def _zero_points(scales: Tensor, minimum: Tensor) -> Tensor:
    zeros = torch.where(scales == 0, 0.0, -minimum / torch.where(scales == 0, 1.0, scales)).round()
    wrong = (zeros < 0) | (zeros > 15) | (0.0 - zeros * scales != minimum)
    if bool(wrong.any()):
        raise FormatError(
            f"{int(wrong.sum())} of {wrong.numel()} Q4_1 blocks have a minimum that is no zero-point of 0 … 15 times their "
            "scale, so no integer grid means the same"
        )
    return zeros.to(torch.uint8)


def _halves(values: Tensor) -> Tensor:
    """float32 ``[out, blocks]`` → fp16 bytes ``[out, blocks, 2]``."""
    return exact(values, torch.float16).contiguous().unsqueeze(-1).view(torch.uint8)


def _floats(halves: Tensor) -> Tensor:
    """fp16 bytes ``[out, blocks, 2]`` → float32 ``[out, blocks]``."""
    return halves.reshape(-1).clone().view(torch.float16).to(torch.float32).view(halves.shape[:-1])


def _nibbles(codes: Tensor) -> Tensor:
    """``[..., 32]`` values of 4 bits → uint8 ``[..., 16]``."""
    values = codes.to(torch.uint8)
    return values[..., : BLOCK // 2] | values[..., BLOCK // 2 :] << 4
