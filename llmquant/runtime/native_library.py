"""The compiled CPU library (csrc/cpu): found, loaded once, and the instruction set it runs on.

The library has a plain C interface, so it depends on no version of torch; callers hand it addresses through ctypes. Which
instruction set runs is the best one that the processor has *and* that torch is held to (``ATEN_CPU_CAPABILITY``);
:func:`instructions` changes it for a test.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from llmquant.errors import UsageError
from llmquant.runtime.processor import Processor, this_processor

LIBRARY = Path(__file__).parents[1] / "kernels" / "libllmquant_cpu.so"
_NEEDS = {"avx512": ("avx512f",), "avx2": ("avx2", "fma"), "generic": ()}


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
        "llmquant_fit": [i, p, i],
        "llmquant_visit": [i, p, i],
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


def instruction_number() -> int:
    """What the library calls the instruction set that runs now."""
    return compiled_instructions()[current_instructions()]


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
