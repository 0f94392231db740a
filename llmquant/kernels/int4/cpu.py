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

Group sizes. The operator knows 32, 64, 128 and 256. A wider group, or a whole row, is the same
numbers repeated over groups of the widest of these that divides it. Columns with an order of their
own (``g_idx``) are stored sorted by group and x is permuted, if every group has equally many.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmquant.kernels.base import Prepared
from llmquant.kernels.int4 import cpu_layout
from llmquant.kernels.int4.operator import Int4Operator
from llmquant.kernels.int4.parameters import exact_scales

# Rows from which dequantize + GEMM is faster, median over shapes and thread counts:
# bench/results/crossover.json.
CROSSOVER_ROWS = 76
# bf16 bytes of dequantized weight that exist at a time. glibc keeps a freed chunk of up to 32 MiB
# for reuse instead of returning its pages, which would be faulted in again at every layer.
_TILE_BYTES = 16 << 20
# Looked up once: a decode step calls it for every linear, and two attribute lookups cost a tenth of
# a small call.
_operator = getattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", None)


class CpuInt4(Int4Operator):
    """torch's int4 CPU operator. ``packed`` is uint8 ``[rows, in/2]``, rows = out padded to 64."""

    name = "cpu_int4"
    runs_on = ("cpu", "the CPU")
    crossover = CROSSOVER_ROWS

    def _why_not_here(self, device: torch.device) -> str | None:
        if cpu_layout.block_rows() is None:
            capability = torch.backends.cpu.get_cpu_capability()
            return f"torch's int4 layout on this CPU ({capability}) is not one it can read back"
        return None

    def _pack(self, codes: Tensor) -> Tensor:
        return cpu_layout.pack(codes)

    def _unpack(self, packed: Tensor) -> Tensor:
        return cpu_layout.unpack(packed, self._block())

    def _padded(self, out_features: int) -> int:
        return cpu_layout.padded_rows(out_features)

    def _block(self) -> int:
        block = cpu_layout.block_rows()
        assert block is not None, "prepared on a machine whose layout is not known"
        return block

    def _take(self, packed: Tensor, blocks: Tensor) -> Tensor:
        block = self._block()
        return packed.view(-1, block, packed.shape[1])[blocks].view(-1, packed.shape[1])

    def _operator(self) -> Callable[[Tensor, Tensor, int, Tensor], Tensor]:
        operator: Callable[[Tensor, Tensor, int, Tensor], Tensor] | None = _operator
        assert operator is not None
        return operator

    def _many(self, x: Tensor, prepared: Prepared) -> Tensor:
        """By a GEMM over tiles of the dequantized weight."""
        packed, shift = prepared["packed"], prepared.get("shift")
        assert packed is not None
        rows, in_features = packed.shape[0], x.shape[1]
        scales, block = exact_scales(prepared), self._block()
        # Tiles of equal size, each a multiple of 64 rows.
        tiles = -(-rows * in_features * 2 // _TILE_BYTES)
        step = cpu_layout.padded_rows(-(-rows // tiles))
        y = torch.empty(x.shape[0], rows, dtype=x.dtype)
        for start in range(0, rows, step):
            tile = slice(start, min(start + step, rows))
            shifts = None if shift is None else shift[:, tile].to(torch.bfloat16)
            weight = cpu_layout.dequantize_tile(
                packed, block, tile, scales[:, tile].contiguous(), shifts
            )
            y[:, tile] = torch.mm(x, weight)
        return y
