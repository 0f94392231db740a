"""humming's layout of a weight for 16-bit activations, as tensor operations of any device.

Read in humming-kernels 0.1.19: ``weight_repack_nk`` (include/humming/kernel/process.cuh) with
``kNumBitsA = 16``, and ``transform_humming_weight``, ``…_weight_scale`` and ``…_zero_point``
(transform.py). A weight ``[out, in]`` is cut into tiles of 64 rows and 16 columns. A lane of the 32
of a warp is ``4 * row + c`` and has 32 codes of a tile, in this order::

    code[16*i + 8*j + row, 8*half + 2*c + odd]    for i = 0 … 3, j, half, odd = 0, 1
    packed  int32 [in / 16, out / 64, 32 lanes, bits], the last three as one dimension

The codes fill words from the lowest bits up. Of the codes of a word the even ones come first, then
the odd ones. 3-bit codes stand in four bits each, and the fourth bits of three words hold the
fourth word.

8-bit codes of bfloat16 activations are not stored as they are but as a distance from the
zero-point: ``q - z``, or ``255 - q`` for ``q < z``, which no other code of its group has.

Scales are ``[G, out]`` in the dtype of the activations: of 64 rows, row ``8*i + j`` stands at
``8*j + i``. With one scale for a whole row, which is applied to the result, row ``8*i + 2*j + odd``
of 32 stands at ``8*j + 2*i + odd``. Zero-points are ordered as the former, in 4 bits each (8 for
8-bit codes), as int32 ``[G, out / 8]`` (``[G, out / 4]``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant.kernels.base import Prepared
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

ROWS, COLUMNS = 64, 16  # of a tile
_LANES = 32
_LOW, _HIGH = (0x77777777, 0x33333333, 0x11111111), (0x44444444, 0x66666666, 0x77777777)


def pack(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """``packed``, ``scales`` and, unless symmetric, ``zeros``. Rows are whole tiles, columns too,
    and scales are exact in ``dtype``."""
    out_features, in_features = weight.shape
    codes = weight.codes
    if _distances(weight.spec, dtype):
        codes = _to_distances(codes, weight.zeros)
    # tile, i, j, row; block of columns, half, c, odd
    cut = codes.reshape(out_features // ROWS, 4, 2, 8, in_features // COLUMNS, 2, 4, 2)
    lanes = cut.permute(4, 0, 3, 6, 1, 2, 5, 7).reshape(-1, out_features // ROWS, _LANES, 32)
    packed = _words(lanes, weight.spec.bits)
    buffers = {
        "packed": packed.reshape(in_features // COLUMNS, -1),
        "scales": _order_scales(weight.scales.to(dtype)),
    }
    if not weight.spec.symmetric:
        buffers["zeros"] = _pack_zeros(weight.zeros, weight.spec.bits)
    return buffers


def unpack(prepared: Prepared, spec: QuantSpec, shape: tuple[int, int]) -> QuantizedWeight:
    """Inverse of :func:`pack`."""
    packed, scales, zeros = (prepared.get(n) for n in ("packed", "scales", "zeros"))
    assert packed is not None
    assert scales is not None
    out_features, in_features = shape
    lanes = _codes(packed.view(packed.shape[0], -1, _LANES, spec.bits), spec.bits)
    # block of columns, tile, row, c, i, j, half, odd
    cut = lanes.view(in_features // COLUMNS, out_features // ROWS, 8, 4, 4, 2, 2, 2)
    codes = cut.permute(1, 4, 5, 2, 0, 6, 3, 7).reshape(out_features, in_features)
    if zeros is None:
        points = codes.new_full((out_features, scales.shape[0]), spec.middle)
    else:
        points = _unpack_zeros(zeros, spec.bits)
    if _distances(spec, scales.dtype):
        codes = _from_distances(codes, points)
    return QuantizedWeight(codes, _natural_scales(scales).to(torch.float32), points, spec)


def take(prepared: Prepared, tiles: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
    """The buffers of some tiles of rows, int64 ``[n]``."""
    taken = {}
    for name in ("packed", "scales", "zeros"):
        buffer = prepared.get(name)
        if buffer is not None:
            out_features = _rows(prepared, spec)
            cut = buffer.view(buffer.shape[0], out_features // ROWS, -1)
            taken[name] = cut[:, tiles].reshape(buffer.shape[0], -1)
    return taken


def _rows(prepared: Prepared, spec: QuantSpec) -> int:
    packed = prepared["packed"]
    assert packed is not None
    return packed.shape[1] * 2 // spec.bits


def _distances(spec: QuantSpec, dtype: torch.dtype) -> bool:
    """bfloat16 has too few bits for the way in which the others become numbers."""
    return spec.bits == 8 and dtype is torch.bfloat16


def _to_distances(codes: Tensor, zeros: Tensor) -> Tensor:
    grouped = codes.view(*zeros.shape, -1).to(torch.int16)
    zero = zeros.unsqueeze(-1)
    found = torch.where(grouped >= zero, grouped - zero, 255 - grouped)
    return found.to(torch.uint8).view(codes.shape)


def _from_distances(stored: Tensor, zeros: Tensor) -> Tensor:
    grouped = stored.view(*zeros.shape, -1).to(torch.int16)
    zero = zeros.unsqueeze(-1).to(torch.int16)
    found = torch.where(grouped <= 255 - zero, grouped + zero, 255 - grouped)
    return found.to(torch.uint8).view(stored.shape)


def _order(count: int, device: torch.device) -> Tensor:
    """Even places, then odd ones."""
    places = torch.arange(count, device=device)
    return torch.cat([places[::2], places[1::2]])


def _words(values: Tensor, bits: int) -> Tensor:
    """uint8 ``[…, 32]`` → int32 ``[…, bits]``."""
    room = 4 if bits == 3 else bits
    each = values.view(*values.shape[:-1], room, 32 // room)
    words = torch.zeros(each.shape[:-1], dtype=torch.int32, device=values.device)
    for k, place in enumerate(_order(32 // room, torch.device("cpu")).tolist()):
        words |= each[..., place].to(torch.int32) << k * room
    if bits != 3:
        return words
    parts = words.unbind(-1)
    return torch.stack(
        [parts[i] & _LOW[i] | (parts[i + 1] & _HIGH[i]) << 1 for i in range(3)], dim=-1
    )


def _codes(words: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`_words`."""
    room = 4 if bits == 3 else bits
    if bits == 3:
        kept = [words[..., i] & _LOW[i] for i in range(3)]
        moved = [words[..., i] >> 1 & _HIGH[i] for i in range(3)]
        parts = [kept[0], kept[1] | moved[0], kept[2] | moved[1], moved[2]]
        words = torch.stack(parts, dim=-1)
    mask = (1 << bits) - 1
    each = [(words >> k * room & mask).to(torch.uint8) for k in range(32 // room)]
    places = torch.argsort(_order(32 // room, torch.device("cpu"))).tolist()
    return torch.stack([each[p] for p in places], dim=-1).view(*words.shape[:-1], 32)


def _order_scales(scales: Tensor) -> Tensor:
    """``[out, G]`` → ``[G, out]``."""
    if scales.shape[1] == 1:
        return scales.T.reshape(1, -1, 4, 4, 2).transpose(2, 3).reshape(1, -1)
    return _across(scales)


def _natural_scales(scales: Tensor) -> Tensor:
    if scales.shape[0] == 1:
        return scales.view(1, -1, 4, 4, 2).transpose(2, 3).reshape(1, -1).T.contiguous()
    return _along(scales)


def _across(values: Tensor) -> Tensor:
    """``[out, G]`` → ``[G, out]``, row ``8*i + j`` of 64 at ``8*j + i``."""
    groups = values.shape[1]
    return values.T.reshape(groups, -1, 8, 8).transpose(2, 3).reshape(groups, -1)


def _along(values: Tensor) -> Tensor:
    groups = values.shape[0]
    return values.view(groups, -1, 8, 8).transpose(2, 3).reshape(groups, -1).T.contiguous()


def _pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    ordered = _across(zeros)
    if bits <= 4:
        ordered = ordered[:, 1::2] << 4 | ordered[:, ::2]
    return ordered.contiguous().view(torch.int32)


def _unpack_zeros(zeros: Tensor, bits: int) -> Tensor:
    ordered = zeros.contiguous().view(torch.uint8)
    if bits <= 4:
        ordered = torch.stack([ordered & 15, ordered >> 4], dim=-1).view(ordered.shape[0], -1)
    return _along(ordered)
