"""The compiled CPU library (csrc/cpu) as Python functions over tensors: found, loaded once, and
called through ctypes.

The library has a plain C interface, so it depends on no version of torch. What torch must know of
it, for ``torch.compile`` and exports, are the operators ``llmquant::packed_linear`` and
``llmquant::half_linear``; eager calls go past the dispatcher, which would cost more than a small
product does. Loading it and choosing the instruction set is runtime/native_library.py's.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from llmquant.kernels.base import Prepared
from llmquant.runtime.native_library import best_instructions as best_instructions
from llmquant.runtime.native_library import compiled_instructions as compiled_instructions
from llmquant.runtime.native_library import current_instructions, library
from llmquant.runtime.native_library import instruction_number as instruction_number
from llmquant.runtime.native_library import instructions as instructions
from llmquant.runtime.native_library import why_missing as why_missing
from llmquant.spec import QuantSpec

ROWS = 16  # output rows of a tile
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Weight(ctypes.Structure):
    """``llmquant::Weight`` of csrc/cpu/packed.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("words", "scales", "zeros", "columns")),
        *((name, ctypes.c_int64) for name in ("out", "in_", "groups", "width")),
        *((name, ctypes.c_int32) for name in ("bits", "scale_type")),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layout:
    """What the buffers do not say of a packed weight; ``width`` counts the stored columns of a
    group."""

    bits: int
    out_features: int
    in_features: int
    groups: int
    width: int


def shares_threads() -> bool:
    """Whether the library found the OpenMP runtime of torch; without it, it works on one thread."""
    lib = library()
    return lib is not None and bool(lib.llmquant_has_threads())


def pack(codes: Tensor, layout: Layout, columns: Tensor | None) -> Tensor:
    """uint8 ``[out, in]`` → int32 ``[tiles, words, 16]``; the layout is drawn in csrc/cpu/packed.h.

    Args:
        columns: int32 ``[groups * width]``, the input column of each stored one, -1 for padding;
            None: they are the same.
    """
    tiles = -(-layout.out_features // ROWS)
    words = torch.empty(
        tiles, layout.groups * layout.width * layout.bits // 32, ROWS, dtype=torch.int32
    )
    codes = codes.contiguous()
    weight = _struct(words, None, None, columns, layout)
    loaded().llmquant_pack(
        ctypes.byref(weight), codes.data_ptr(), words.data_ptr(), torch.get_num_threads()
    )
    return words


class Packed(NamedTuple):
    """A packed weight ``[out, in_]`` as the library's functions and operators get it; the buffers
    are :class:`llmquant.kernels.cpu.Cpu`'s."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    columns: Tensor | None
    bits: int
    out: int
    in_: int

    @classmethod
    def of(cls, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int]) -> Packed:
        words, scales = prepared["words"], prepared["scales"]
        assert words is not None
        assert scales is not None
        more = prepared.get("zeros"), prepared.get("columns")
        return cls(words, scales, *more, spec.bits, *shape)


def operator(name: str, product: Callable[[Tensor, Packed], Tensor]) -> CustomOpDef:
    """A product ``[..., in]`` → ``[..., out]`` as an operator ``(x, *packed)``, which
    ``torch.compile`` and exports see as one node."""

    def flat(
        x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, columns: Tensor | None,
        bits: int, out: int, in_: int,
    ) -> Tensor:  # fmt: skip
        return product(x, Packed(words, scales, zeros, columns, bits, out, in_))

    made = torch.library.custom_op(name, flat, mutates_args=(), device_types="cpu")
    made.register_fake(lambda x, *packed: x.new_empty((*x.shape[:-1], packed[5])))
    return made


def linear(x: Tensor, weight: Packed) -> Tensor:
    """``[..., in]`` → ``[..., out]``; x float32, bfloat16 or float16, on the CPU."""
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], weight.out))
    loaded().llmquant_linear(
        instruction_number(), bound(weight), x.data_ptr(), x.numel() // weight.in_,
        TYPES[x.dtype], None, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def decode(weight: Packed, rows: slice, dtype: torch.dtype) -> Tensor:
    """``[in, rows]``: the transposed weight of output rows ``rows`` (the first a multiple of 16),
    rounded once to ``dtype``."""
    count = rows.stop - rows.start
    decoded = torch.empty(weight.in_, count, dtype=dtype)
    loaded().llmquant_decode(
        instruction_number(), bound(weight), rows.start, count,
        TYPES[dtype], decoded.data_ptr(), count, torch.get_num_threads(),
    )  # fmt: skip
    return decoded


def half_tiles(weight: Tensor, stored: torch.dtype) -> Tensor:
    """``[out, in]`` → ``[tiles, in, 16]`` of bfloat16 or float16: a dense matrix in the kernel's
    order."""
    padded = torch.nn.functional.pad(weight.to(stored), (0, 0, 0, -weight.shape[0] % ROWS))
    return padded.view(-1, ROWS, weight.shape[1]).transpose(1, 2).contiguous()


def half_weight(words: Tensor, out: int) -> Tensor:
    """Inverse of :func:`half_tiles`."""
    return words.transpose(1, 2).reshape(-1, words.shape[1])[:out]


def half_linear(x: Tensor, words: Tensor, out: int, in_: int) -> Tensor:
    """``[..., in]`` → ``[..., out]`` with the weight of :func:`half_tiles`; sums are float32."""
    if torch.compiler.is_compiling():
        y: Tensor = _HALF(x, words, out, in_)
        return y
    return _half(x, words, out, in_)


def _half(x: Tensor, words: Tensor, out: int, in_: int) -> Tensor:
    return linear(x, Packed(words, words, None, None, 16, out, in_))


def _half_operator() -> CustomOpDef:
    made = torch.library.custom_op(
        "llmquant::half_linear", _half, mutates_args=(), device_types="cpu"
    )
    made.register_fake(lambda x, _, out, __: x.new_empty((*x.shape[:-1], out)))
    return made


_HALF = _half_operator()


def loaded() -> ctypes.CDLL:
    """The library, where it is known to be there."""
    lib = library()
    assert lib is not None, "asked only where why_missing() is None"
    return lib


def _struct(
    words: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    columns: Tensor | None,
    layout: Layout,
) -> _Weight:
    pointers = (None if t is None else t.data_ptr() for t in (words, scales, zeros, columns))
    kind = 0 if scales is None else TYPES[scales.dtype]
    return _Weight(
        *pointers,
        layout.out_features,
        layout.in_features,
        layout.groups,
        layout.width,
        layout.bits,
        kind,
    )


# id of a words tensor → (the tensor, addresses the structure was made for, the structure, its
# address).
_BOUND: dict[int, tuple[weakref.ref[Tensor], tuple[int, int], _Weight, int]] = {}


def bound(weight: Packed) -> int:
    """The address of the C structure for these buffers, made once."""
    words, scales, zeros, columns, bits, out, in_ = weight
    key = id(words)
    handle = _BOUND.get(key)
    addresses = (words.data_ptr(), scales.data_ptr())
    if handle is not None and handle[0]() is words and handle[1] == addresses:
        return handle[3]
    groups = 1 if bits == 16 else scales.shape[1]
    width = in_ if bits == 16 else words.shape[1] * 32 // bits // groups
    struct = _struct(words, scales, zeros, columns, Layout(bits, out, in_, groups, width))
    address = ctypes.addressof(struct)
    _BOUND[key] = (weakref.ref(words, lambda _: _forget(key, address)), addresses, struct, address)
    return address


def _forget(key: int, address: int) -> None:
    handle = _BOUND.get(key)
    if handle is not None and handle[3] == address:
        del _BOUND[key]


def describe() -> dict[str, Any]:
    """For `llmquant doctor`: the instruction set that runs, those there are, and whether threads
    are shared with torch."""
    if library() is None:
        return {"compiled": False, "reason": why_missing()}
    return {
        "compiled": True,
        "runs": current_instructions(),
        "available": list(compiled_instructions()),
        "shares_threads": shares_threads(),
    }
