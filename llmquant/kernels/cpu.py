"""``cpu``: 2, 3, 4 and 8 bits on any CPU, in compiled code (csrc/cpu). Activations are not
quantized; sums are float32.

One packed copy of the weight serves every number of rows and every dtype of activations. One row is
multiplied straight from the packed bytes; several rows decode a panel of 16 output rows at a time,
once for 264 rows of x, and multiply it from the first-level cache. Whatever the dtype of x,
products and sums are float32, the result is rounded once.

Where the processor multiplies bfloat16 in hardware (AMX, avx512_bf16), torch's product is faster
from some number of rows on: then a tile is decoded to the dtype of x and given to ``torch.mm``.
From how many rows is measured once in a process, on the machine itself; elsewhere the kernel's own
product is used throughout.

Every group size is taken, per-row scales and columns with an order of their own too: groups are
padded to whole words and columns are stored sorted by group, which ``columns`` undoes as x is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from llmquant.errors import UsageError
from llmquant.kernels import native
from llmquant.kernels.base import Prepared
from llmquant.kernels.embedding import gather
from llmquant.kernels.native import ROWS, TYPES, Layout, Packed
from llmquant.kernels.reference import narrowest
from llmquant.runtime.processor import this_processor
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

# Of decoded weight that torch.mm gets at a time; glibc reuses freed chunks up to 32 MiB.
_TILE_BYTES = 16 << 20
_NEVER = 1 << 62


def unit(bits: int) -> int:
    """Columns that fill whole 32-bit words: what groups are padded to."""
    return 32 if bits == 3 else 32 // bits


class Cpu:
    """Compiled products from packed weights.

    Buffers: ``words`` int32 ``[tiles, words, 16]``; ``scales`` ``[tiles, G, 16]`` in the narrowest
    of bf16, fp16 and fp32 that holds them; ``zeros`` uint8 ``[tiles, G, 16]`` unless symmetric;
    ``columns`` int32 ``[stored]`` where they are not x's.
    """

    name = "cpu"
    any_dtype = True
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
        if dtype not in TYPES:
            return f"it takes float32, bfloat16 and float16, not {dtype}"
        return native.why_missing()

    def why_not_weight(self, weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
        return None

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        columns, layout = _columns(weight)
        buffers = {
            "words": native.pack(weight.codes, layout, columns),
            "scales": _by_tile(narrowest(weight.scales)),
        }
        if not weight.spec.symmetric:
            buffers["zeros"] = _by_tile(weight.zeros)
        if columns is not None:
            buffers["columns"] = columns
        return buffers

    def linear(
        self, x: Tensor, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int]
    ) -> Tensor:
        """The product; differentiable in x.

        Raises:
            UsageError: activations of a dtype that is none of float32, bfloat16 and float16, or of
                another width.
        """
        self._check(x, shape)
        if x.requires_grad and torch.is_grad_enabled():
            return torch.nn.functional.linear(x, self.weight(prepared, spec, shape, x.dtype))
        packed = Packed.of(prepared, spec, shape)
        y: Tensor = _product(x, packed) if eager(x) else _OPERATOR(x, *packed)
        return y

    def _check(self, x: Tensor, shape: tuple[int, int]) -> None:
        """Raises UsageError for activations that this kernel cannot multiply."""
        if x.dtype not in TYPES:
            raise UsageError(
                f"kernel {self.name} takes float32, bfloat16 and float16 activations, but got {x.dtype}"
            )
        if x.shape[-1] != shape[1]:
            raise UsageError(f"a linear of {shape[1]} input columns was given {list(x.shape)}")

    def weight(
        self, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        weight, packed = torch.empty(shape, dtype=dtype), Packed.of(prepared, spec, shape)
        for rows in _tiles(*shape, torch.float32):
            weight[rows] = native.decode(packed, rows, torch.float32).T
        return weight

    def rows(
        self, prepared: Prepared, ids: Tensor, spec: QuantSpec, shape: tuple[int, int]
    ) -> Tensor:
        return gather.rows(Packed.of(prepared, spec, shape), ids)


def eager(x: Tensor) -> bool:
    """Whether x is a plain tensor that is computed with now, so that the operator may be passed by:
    the dispatcher costs more than a small product."""
    return type(x) is Tensor and not torch.compiler.is_compiling()


def _product(x: Tensor, weight: Packed) -> Tensor:
    """``[..., in]`` → ``[..., out]``, by the kernel's own product or by torch's over decoded
    tiles."""
    if x.numel() // weight.in_ >= rows_for_torch(x.dtype):
        return _by_torch(x, weight)
    return native.linear(x, weight)


_OPERATOR = native.operator("llmquant::packed_linear", _product)


def _columns(weight: QuantizedWeight) -> tuple[Tensor | None, Layout]:
    """The input column of each stored column, None where they are the same, and the layout."""
    spec, (out_features, in_features) = weight.spec, weight.shape
    groups = weight.scales.shape[1]
    group = weight.column_groups()
    counts = torch.bincount(group, minlength=groups)
    width = -(-int(counts.max()) // unit(spec.bits)) * unit(spec.bits)
    layout = Layout(spec.bits, out_features, in_features, groups, width)
    if weight.g_idx is None and groups * width == in_features:
        return None, layout
    columns = torch.full((groups, width), -1, dtype=torch.int32)
    order = torch.argsort(group, stable=True)
    place = torch.arange(in_features) - (counts.cumsum(0) - counts)[group[order]]
    columns[group[order], place] = order.to(torch.int32)
    return columns.view(-1), layout


def _by_tile(values: Tensor) -> Tensor:
    """``[out, G]`` → ``[tiles, G, 16]``, rows of padding zero."""
    padding = -values.shape[0] % ROWS
    padded = torch.nn.functional.pad(values, (0, 0, 0, padding))
    return padded.view(-1, ROWS, values.shape[1]).transpose(1, 2).contiguous()


def _tiles(out: int, in_: int, dtype: torch.dtype) -> list[slice]:
    """Ranges of output rows of about ``_TILE_BYTES``, each beginning at a multiple of 16."""
    tiles = -(-out * in_ * dtype.itemsize // _TILE_BYTES)
    step = -(-out // tiles // ROWS) * ROWS
    return [slice(s, min(s + step, out)) for s in range(0, out, step)]


def _by_torch(x: Tensor, weight: Packed) -> Tensor:
    """The product by ``torch.mm`` over tiles decoded to x's dtype."""
    rows = x.reshape(-1, weight.in_)
    y = x.new_empty((rows.shape[0], weight.out))
    for tile in _tiles(weight.out, weight.in_, x.dtype):
        y[:, tile] = torch.mm(rows, native.decode(weight, tile, x.dtype))
    return y.view(*x.shape[:-1], weight.out)


@cache
def rows_for_torch(dtype: torch.dtype) -> int:
    """From how many rows on ``torch.mm`` over decoded tiles is faster here; measured where it can
    be, which takes some 50 ms."""
    processor = this_processor()
    # In float32 it never is by much, and a choice by the clock would make results depend on it. In
    # bfloat16 it may be several times as fast (AMX), or slower: that is known by trying alone.
    fast = ("amx_bf16", "avx512_bf16", "bf16") if dtype is torch.bfloat16 else ()
    if not any(processor.has(name) for name in fast):
        return _NEVER
    size = 1024
    spec, shape = QuantSpec(4, 128), (size, size)
    codes = torch.zeros(shape, dtype=torch.uint8)
    weight = QuantizedWeight(
        codes,
        torch.ones(size, size // 128),
        torch.full((size, size // 128), 8, dtype=torch.uint8),
        spec,
    )
    packed = Packed.of(Cpu().prepare(weight, dtype), spec, shape)
    wins = _NEVER
    for rows in (512, 256, 128, 64, 32, 16):
        x = torch.ones(rows, size, dtype=dtype)
        if _best_of(_by_torch, x, packed) >= _best_of(native.linear, x, packed):
            break
        wins = rows
    return wins


def _best_of(work: Callable[..., object], *arguments: object) -> float:
    times = []
    for _ in range(4):
        started = time.perf_counter()
        work(*arguments)
        times.append(time.perf_counter() - started)
    return min(times[1:])
