"""The compiled CPU library (csrc/cpu) as Python functions over tensors: found, loaded once, and called through ctypes.

The library has a plain C interface, so it depends on no version of torch. What torch must know of it, for ``torch.compile``
and exports, is the operator ``llmquant::packed_linear``; eager calls go past the dispatcher, which would cost more than a small
product does. Which instruction set runs is the best one that the processor has *and* that torch is held to
(``ATEN_CPU_CAPABILITY``); :func:`instructions` changes it for a test.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import UsageError
from llmquant.runtime.processor import Processor, this_processor

LIBRARY = Path(__file__).with_name("libllmquant_cpu.so")
ROWS = 16  # output rows of a tile
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NEEDS = {"avx512": ("avx512f",), "avx2": ("avx2", "fma"), "generic": ()}


class _Weight(ctypes.Structure):
    """``llmquant::Weight`` of csrc/cpu/packed.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("words", "scales", "zeros", "columns")),
        *((name, ctypes.c_int64) for name in ("out", "in_", "groups", "width")),
        *((name, ctypes.c_int32) for name in ("bits", "scale_type")),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layout:
    """What the buffers do not say of a packed weight; ``width`` counts the stored columns of a group."""

    bits: int
    out_features: int
    in_features: int
    groups: int
    width: int


@cache
def library() -> ctypes.CDLL | None:
    """The library with its signatures, or None where it was not built."""
    try:
        lib = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    p, n, i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    lib.llmquant_instructions.argtypes, lib.llmquant_instructions.restype = [i, p], ctypes.c_char_p
    lib.llmquant_int8_instructions.argtypes, lib.llmquant_int8_instructions.restype = [i, p], ctypes.c_char_p
    lib.llmquant_has_threads.restype = i
    for name, arguments in {
        "llmquant_pack": [p, p, p, i],
        "llmquant_linear": [i, p, p, n, i, p, p, i],
        "llmquant_decode": [i, p, n, n, i, p, n, i],
        "llmquant_block_before_attention": [i, p, p, p, p, i, p, p, p, i],
        "llmquant_block_after": [i, p, p, p, p, p, i, n, p, p, i],
        "llmquant_int8_linear": [i, p, p, n, i, p, i],
    }.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, None
    return lib


def why_missing() -> str | None:
    """Why there is no compiled kernel here, or None."""
    if library() is None:
        return "it was not compiled when llmquant was installed (no C++ compiler?); install g++, then llmquant again"
    return None


@cache
def compiled_instructions() -> dict[str, int]:
    """Instruction sets that the library was compiled for and that this machine has → their number, best first."""
    lib = library()
    found: dict[str, int] = {}
    available = ctypes.c_int()
    while lib is not None and (name := lib.llmquant_instructions(number := len(found), ctypes.byref(available))):
        found[name.decode()] = number if available.value else -1
    return {name: number for name, number in found.items() if number >= 0}


def best_instructions(processor: Processor) -> str:
    """The widest instruction set that was compiled and that ``processor`` may use."""
    return next(name for name in compiled_instructions() if processor.has(*_NEEDS[name]))


_forced: list[str] = []


def current_instructions() -> str:
    """The name of the instruction set that runs now."""
    return _forced[-1] if _forced else _best()


@cache
def _best() -> str:
    return best_instructions(this_processor())


def current_number() -> int:
    """The library's number of :func:`current_instructions`."""
    return _number(current_instructions())


@cache
def _number(name: str) -> int:
    return compiled_instructions()[name]


@contextmanager
def instructions(name: str) -> Iterator[None]:
    """Run on this instruction set inside the block, whatever is best.

    Raises:
        UsageError: it was not compiled, or this machine has not got it.
    """
    if name not in compiled_instructions():
        raise UsageError(f"instruction set {name!r} is not available; there are {', '.join(compiled_instructions())}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def shares_threads() -> bool:
    """Whether the library found the OpenMP runtime of torch; without it, it works on one thread."""
    lib = library()
    return lib is not None and bool(lib.llmquant_has_threads())


def pack(codes: Tensor, layout: Layout, columns: Tensor | None) -> Tensor:
    """uint8 ``[out, in]`` → int32 ``[tiles, words, 16]``; the layout is drawn in csrc/cpu/packed.h.

    Args:
        columns: int32 ``[groups * width]``, the input column of each stored one, -1 for padding; None: they are the same.
    """
    tiles = -(-layout.out_features // ROWS)
    words = torch.empty(tiles, layout.groups * layout.width * layout.bits // 32, ROWS, dtype=torch.int32)
    codes = codes.contiguous()
    weight = _struct(words, None, None, columns, layout)
    loaded().llmquant_pack(ctypes.byref(weight), codes.data_ptr(), words.data_ptr(), torch.get_num_threads())
    return words


def linear(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, columns: Tensor | None, bits: int, out: int, in_: int
) -> Tensor:
    """``[..., in]`` → ``[..., out]``; x float32, bfloat16 or float16, on the CPU."""
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], out))
    loaded().llmquant_linear(
        current_number(), bound(words, scales, zeros, columns, bits, out, in_), x.data_ptr(), x.numel() // in_,
        TYPES[x.dtype], None, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def decode(
    words: Tensor, scales: Tensor, zeros: Tensor | None, columns: Tensor | None, bits: int, out: int, in_: int,
    rows: slice, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``[in, rows]``: the transposed weight of output rows ``rows`` (the first a multiple of 16), rounded once to ``dtype``."""
    count = rows.stop - rows.start
    decoded = torch.empty(in_, count, dtype=dtype)
    loaded().llmquant_decode(
        current_number(), bound(words, scales, zeros, columns, bits, out, in_), rows.start, count,
        TYPES[dtype], decoded.data_ptr(), count, torch.get_num_threads(),
    )  # fmt: skip
    return decoded


def half_tiles(weight: Tensor, stored: torch.dtype) -> Tensor:
    """``[out, in]`` → ``[tiles, in, 16]`` of bfloat16 or float16: a dense matrix in the kernel's order."""
    padded = torch.nn.functional.pad(weight.to(stored), (0, 0, 0, -weight.shape[0] % ROWS))
    return padded.view(-1, ROWS, weight.shape[1]).transpose(1, 2).contiguous()


def half_weight(words: Tensor, out: int) -> Tensor:
    """Inverse of :func:`half_tiles`."""
    return words.transpose(1, 2).reshape(-1, words.shape[1])[:out]


def half_linear(x: Tensor, words: Tensor, out: int, in_: int) -> Tensor:
    """``[..., in]`` → ``[..., out]`` with the weight of :func:`half_tiles`; sums are float32."""
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], out))
    loaded().llmquant_linear(
        current_number(), bound(words, words, None, None, 16, out, in_), x.data_ptr(), x.numel() // in_, TYPES[x.dtype], None,
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def loaded() -> ctypes.CDLL:
    """The library, where it is known to be there."""
    lib = library()
    assert lib is not None, "asked only where why_missing() is None"
    return lib


def _struct(
    words: Tensor, scales: Tensor | None, zeros: Tensor | None, columns: Tensor | None, layout: Layout
) -> _Weight:
    pointers = (None if t is None else t.data_ptr() for t in (words, scales, zeros, columns))
    kind = 0 if scales is None else TYPES[scales.dtype]
    return _Weight(*pointers, layout.out_features, layout.in_features, layout.groups, layout.width, layout.bits, kind)


# id of a words tensor → (the tensor, addresses the structure was made for, the structure, its address).
_BOUND: dict[int, tuple[weakref.ref[Tensor], tuple[int, int], _Weight, int]] = {}


def bound(
    words: Tensor, scales: Tensor, zeros: Tensor | None, columns: Tensor | None, bits: int, out: int, in_: int
) -> int:
    """The address of the C structure for these buffers, made once."""
    key = id(words)
    found = _BOUND.get(key)
    addresses = (words.data_ptr(), scales.data_ptr())
    if found is not None and found[0]() is words and found[1] == addresses:
        return found[3]
    groups = 1 if bits == 16 else scales.shape[1]
    width = in_ if bits == 16 else words.shape[1] * 32 // bits // groups
    weight = _struct(words, scales, zeros, columns, Layout(bits, out, in_, groups, width))
    address = ctypes.addressof(weight)
    _BOUND[key] = (weakref.ref(words, lambda _: _forget(key, address)), addresses, weight, address)
    return address


def _forget(key: int, address: int) -> None:
    found = _BOUND.get(key)
    if found is not None and found[3] == address:
        del _BOUND[key]


def describe() -> dict[str, Any]:
    """For `llmquant doctor`: instruction sets, the one that runs, and whether threads are shared with torch."""
    if library() is None:
        return {"missing": why_missing()}
    return {
        "instructions": current_instructions(),
        "available": list(compiled_instructions()),
        "threads": torch.get_num_threads() if shares_threads() else 1,
    }
