"""``cpu_int4``: 4-bit weights on a CPU in bf16. torch's int4 operator for few rows, dequantize +
GEMM for many.

One packed copy of the weight serves both. The operator computes ``sum_k x_k * ((q - 8) * s +
zero)`` in float32 from bf16 ``s`` and ``zero`` and rounds once, reading half a byte a weight: it is
bound by memory, so at one row it beats a dense bf16 linear. With many rows it is bound by
arithmetic, and a GEMM over a weight dequantized to bf16 a tile at a time wins although it
dequantizes anew each time. ``CROSSOVER_ROWS`` is where, as measured by bench/crossover.py. Ratios
of time to a dense bf16 linear there (a CPU with AMX): 0.3 to 0.5 at 1 row, 1.1 to 1.5 at 8, 4 to 7
at the crossover, 2 to 3 at 512 rows and 1.3 to 1.6 at 2048: who evaluates or prefills should offer
many rows at once.

Exactness. ``zero`` should be ``(8 - z) * s``, up to 12 significant bits of which bf16 holds 8. What
does not fit is again exact in bf16 (at most 4 bits): the *residual*. Multiplied with the group sums
of x, a matmul ``[rows, G] x [G, out]``, it puts the missing part back. A scale that is not exact in
bf16 (fp16 scales of other tools) is split the same way, ``s = high + low``, and the operator runs a
second time with ``low``; our own portable scales never need that. (Only where such a scale meets a
zero-point does anything remain, below 2**-16 of the zero term; the dequantized weight is exact
throughout.)

Group sizes. The operator knows 32, 64, 128 and 256. A wider group, or a whole row, is the same
numbers repeated over groups of the widest of these that divides it. Columns with an order of their
own (``g_idx``) are stored sorted by group and x is permuted, if every group has equally many.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant.errors import UsageError
from llmquant.kernels import int4pack
from llmquant.kernels.base import Prepared
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

# Rows from which dequantize + GEMM is faster, median over shapes and thread counts:
# bench/results/crossover.json.
CROSSOVER_ROWS = 76
# bf16 bytes of dequantized weight that exist at a time. glibc keeps a freed chunk of up to 32 MiB
# for reuse instead of returning its pages, which would be faulted in again at every layer.
_TILE_BYTES = 16 << 20
_GROUPS = (256, 128, 64, 32)
# Looked up once: a decode step calls it for every linear, and two attribute lookups cost a tenth of
# a small call.
_operator = getattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", None)


def operator_group(width: int) -> int | None:
    """The widest group of torch's operator that divides a group of ``width`` columns."""
    return next((g for g in _GROUPS if width % g == 0), None)


class CpuInt4:
    """torch's int4 CPU operator, and dequantize + GEMM from the same bytes.

    Buffers: ``packed`` uint8 ``[rows, in/2]`` (rows = out padded to 64); ``scales_and_zeros`` bf16
        ``[G, rows, 2]``;
    ``shift`` int8 ``[G, rows]``, 8 - z, and ``residual`` bf16 ``[G, rows]`` where a zero-point
    needs them; ``low`` bf16 ``[G, rows, 2]`` where a scale is not exact in bf16; ``columns`` int64
    ``[in]`` if columns are sorted by group.
    """

    name = "cpu_int4"
    any_dtype = False
    rounds_inputs = False

    def why_not(
        self,
        spec: QuantSpec,
        shape: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
        g_idx: bool = False,
    ) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device}"
        if spec.bits != 4:
            return f"it takes 4 bits, not {spec.bits}"
        if dtype is not torch.bfloat16:
            return f"torch's int4 operator is slow (30 to 60 times) in {dtype}; it takes torch.bfloat16"
        if operator_group(spec.width(shape[1])) is None:
            return f"groups of {spec.width(shape[1])} columns are not a multiple of 32"
        if int4pack.block_rows() is None:
            capability = torch.backends.cpu.get_cpu_capability()
            return f"torch's int4 layout on this CPU ({capability}) is not one it can read back"
        return None

    def why_not_weight(self, weight: QuantizedWeight) -> str | None:
        high = weight.scales.to(torch.bfloat16)
        rest = weight.scales - high.to(torch.float32)
        if not torch.equal(rest.to(torch.bfloat16).to(torch.float32), rest):
            return "a scale has more than 16 significant bits"
        if weight.g_idx is not None:
            counts = torch.bincount(weight.g_idx, minlength=weight.scales.shape[1])
            if not bool((counts == counts[0]).all()):
                return "its g_idx gives groups of different sizes"
        return None

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        codes, buffers = weight.codes, {}
        if weight.g_idx is not None:
            buffers["columns"] = torch.argsort(weight.g_idx, stable=True)
            codes = codes[:, buffers["columns"]]
        buffers["packed"] = int4pack.pack(codes)
        width = weight.spec.width(codes.shape[1])
        repeats = width // (operator_group(width) or width)
        scales = _by_group(weight.scales, repeats, 1.0)
        shift = 8.0 - _by_group(weight.zeros.to(torch.float32), repeats, 8.0)
        return buffers | _params(scales, shift)

    def linear(
        self, x: Tensor, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int]
    ) -> Tensor:
        if x.dtype is not torch.bfloat16:
            raise UsageError(
                f"kernel cpu_int4 was loaded for bfloat16 activations but got {x.dtype}; load with that dtype"
            )
        out_features, in_features = shape
        rows = x.reshape(-1, in_features)
        columns = prepared.get("columns")
        rows = rows.contiguous() if columns is None else rows.index_select(1, columns)
        y = _few(rows, prepared) if rows.shape[0] < CROSSOVER_ROWS else _many(rows, prepared)
        if y.shape[1] != out_features:
            y = y[:, :out_features].contiguous()
        return y.view(*x.shape[:-1], out_features)

    def weight(
        self, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        packed, columns = prepared["packed"], prepared.get("columns")
        assert packed is not None
        scales, shift = _scales(prepared).to(torch.float32), prepared.get("shift")
        codes = int4pack.unpack(packed, _block()).to(torch.float32).sub_(8.0)
        grouped = codes.view(codes.shape[0], scales.shape[0], codes.shape[1] // scales.shape[0])
        if shift is not None:
            grouped.add_(shift.T.unsqueeze(-1))
        weight = grouped.mul_(scales.T.unsqueeze(-1)).view(codes.shape)[: shape[0]].to(dtype)
        return (
            weight if columns is None else torch.empty_like(weight).index_copy_(1, columns, weight)
        )

    def rows(
        self, prepared: Prepared, ids: Tensor, spec: QuantSpec, shape: tuple[int, int]
    ) -> Tensor:
        # Rows are packed in blocks, so the blocks that the ids are in are unpacked, each once.
        block = _block()
        blocks, which = torch.unique(ids // block, return_inverse=True)
        taken = (blocks.unsqueeze(-1) * block + torch.arange(block)).flatten()
        picked = {
            n: t if t is None or n == "columns" else t[taken] if n == "packed" else t[:, taken]
            for n, t in prepared.items()
        }
        weight = self.weight(picked, spec, (len(taken), shape[1]), torch.float32)
        return weight[which * block + ids % block]


def _block() -> int:
    block = int4pack.block_rows()
    assert block is not None, "prepared on a machine whose layout is not known"
    return block


def _by_group(values: Tensor, repeats: int, fill: float) -> Tensor:
    """float32 ``[out, G]`` → ``[G * repeats, padded rows]``, rows of padding filled."""
    out_features = values.shape[0]
    expanded = values.repeat_interleave(repeats, dim=1) if repeats > 1 else values
    padding = int4pack.padded_rows(out_features) - out_features
    return torch.nn.functional.pad(expanded.T, (0, padding), value=fill).contiguous()


def _params(scales: Tensor, shift: Tensor) -> dict[str, Tensor]:
    """Split float32 scales and ``shift * scales`` (all ``[G, rows]``) into what bf16 holds and what
    is left."""
    wanted = torch.stack([scales, shift * scales], dim=-1)
    high = wanted.to(torch.bfloat16)
    rest = wanted - high.to(torch.float32)
    buffers = {"scales_and_zeros": high}
    if bool(shift.any()):
        buffers["shift"] = shift.to(torch.int8)
    if bool(rest[..., 0].any()):
        buffers["low"] = rest.to(torch.bfloat16)
    elif bool(rest.any()):
        buffers["residual"] = rest[..., 1].to(torch.bfloat16).contiguous()
    return buffers


def _scales(prepared: Prepared) -> Tensor:
    """The exact scales ``[G, rows]``: bf16, or float32 when they were split."""
    high, low = prepared["scales_and_zeros"], prepared.get("low")
    assert high is not None
    if low is None:
        return high[..., 0].contiguous()
    return high[..., 0].to(torch.float32) + low[..., 0].to(torch.float32)


def _few(x: Tensor, prepared: Prepared) -> Tensor:
    """``[M, in]`` → ``[M, rows]`` by the int4 operator, plus what its bf16 parameters could not
    hold."""
    packed, high = prepared["packed"], prepared["scales_and_zeros"]
    assert high is not None
    assert _operator is not None
    groups = high.shape[0]
    width = x.shape[1] // groups
    y: Tensor = _operator(x, packed, width, high)
    residual, low = prepared.get("residual"), prepared.get("low")
    if residual is not None:
        y = torch.addmm(y, x.view(-1, groups, width).sum(-1), residual)
    elif low is not None:
        y += _operator(x, packed, width, low)
    return y


def _many(x: Tensor, prepared: Prepared) -> Tensor:
    """``[M, in]`` → ``[M, rows]`` by a GEMM over tiles of the dequantized weight."""
    packed, shift = prepared["packed"], prepared.get("shift")
    assert packed is not None
    rows, in_features = packed.shape[0], x.shape[1]
    scales, block = _scales(prepared), _block()
    # Tiles of equal size, each a multiple of 64 rows.
    tiles = -(-rows * in_features * 2 // _TILE_BYTES)
    step = int4pack.padded_rows(-(-rows // tiles))
    y = torch.empty(x.shape[0], rows, dtype=x.dtype)
    for start in range(0, rows, step):
        tile = slice(start, min(start + step, rows))
        shifts = None if shift is None else shift[:, tile].to(torch.bfloat16)
        weight = int4pack.dequantize_tile(packed, block, tile, scales[:, tile].contiguous(), shifts)
        y[:, tile] = torch.mm(x, weight)
    return y
