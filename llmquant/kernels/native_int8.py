"""The product with 8-bit activations of the compiled CPU library (csrc/cpu/int8.h), through ctypes.

Its instruction sets are other ones than the strict product's: VNNI multiplies bytes. The result is the same bits on all of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from llmquant.errors import UsageError
from llmquant.kernels import native
from llmquant.kernels.native import TYPES
from llmquant.runtime.native_library import library
from llmquant.runtime.processor import Processor, this_processor

_NEEDS = {
    "avx512vnni": ("avx512f", "avx512_vnni"), "avx512": ("avx512f",), "avxvnni": ("avx2", "avx_vnni"), "avx2": ("avx2", "fma"),
    "generic": (),
}  # fmt: skip


@cache
def compiled_instructions() -> dict[str, int]:
    """Instruction sets that the library was compiled for and that this machine has → their number, best first."""
    lib = library()
    found: dict[str, int] = {}
    available = ctypes.c_int()
    while lib is not None and (name := lib.llmquant_int8_instructions(number := len(found), ctypes.byref(available))):
        found[name.decode()] = number if available.value else -1
    return {name: number for name, number in found.items() if number >= 0}


def best_instructions(processor: Processor) -> str:
    """The best instruction set that was compiled and that ``processor`` may use."""
    return next(name for name in compiled_instructions() if processor.has(*_NEEDS[name]))


_forced: list[str] = []


def current_instructions() -> str:
    """The name of the instruction set that runs now."""
    return _forced[-1] if _forced else _best()


@cache
def _best() -> str:
    return best_instructions(this_processor())


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


def linear(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, columns: Tensor | None, bits: int, out: int, in_: int
) -> Tensor:
    """``[..., in]`` → ``[..., out]``; x float32, bfloat16 or float16, on the CPU. Arguments as of ``native.linear``."""
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], out))
    native.loaded().llmquant_int8_linear(
        compiled_instructions()[current_instructions()], native.bound(words, scales, zeros, columns, bits, out, in_),
        x.data_ptr(), x.numel() // in_, TYPES[x.dtype], y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y
