"""The compiled CPU library (csrc/cpu): found, loaded once, and the instruction set it runs on.

The library has a plain C interface, so it depends on no version of torch; callers hand it addresses
through ctypes. Which instruction set runs is the best one that the processor has *and* that torch
is held to (``ATEN_CPU_CAPABILITY``); :func:`instructions` changes it for a test.
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


@cache
def library() -> ctypes.CDLL | None:
    """The library with its signatures, or None where it was not built."""
    try:
        lib = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    p, n, i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    lib.llmquant_instructions.argtypes, lib.llmquant_instructions.restype = [i, p], ctypes.c_char_p
    lib.llmquant_int8_instructions.argtypes, lib.llmquant_int8_instructions.restype = (
        [i, p],
        ctypes.c_char_p,
    )
    lib.llmquant_has_threads.restype = i
    for name, arguments in {
        "llmquant_pack": [p, p, p, i],
        "llmquant_linear": [i, p, p, n, i, p, p, i],
        "llmquant_decode": [i, p, n, n, i, p, n, i],
        "llmquant_block_before_attention": [i, p, p, p, p, i, p, p, p, i],
        "llmquant_block_after": [i, p, p, p, p, p, i, n, p, p, i],
        "llmquant_prompt_before": [i, p, n, n, i, p, p, p, n, p, p, p, i],
        "llmquant_prompt_after": [i, p, n, n, i, p, p, p, p, i],
        "llmquant_blocks_step": [i, p, n, p, p, p, i, p, p, p, p, i],
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


class InstructionSets:
    """The instruction sets of one of the library's products: which there are, and which runs.

    Args:
        symbol: the library's function that names them, best first.
        needs: name → what :meth:`Processor.has` must have for it.
    """

    def __init__(self, symbol: str, needs: dict[str, tuple[str, ...]]) -> None:
        self.symbol, self.needs = symbol, needs
        self._forced: list[str] = []
        self._found: dict[str, int] = {}
        self._best: str | None = None

    def compiled(self) -> dict[str, int]:
        """Those that the library was compiled for and that this machine has → their number, best
        first."""
        lib = library()
        if lib is not None and not self._found:
            name_of, available, number = getattr(lib, self.symbol), ctypes.c_int(), 0
            while name := name_of(number, ctypes.byref(available)):
                if available.value:
                    self._found[name.decode()] = number
                number += 1
        return self._found

    def best(self, processor: Processor) -> str:
        """The best one that was compiled and that ``processor`` may use."""
        return next(name for name in self.compiled() if processor.has(*self.needs[name]))

    def current(self) -> str:
        """The name of the one that runs now."""
        if self._forced:
            return self._forced[-1]
        if self._best is None:
            self._best = self.best(this_processor())
        return self._best

    def number(self) -> int:
        """What the library calls the one that runs now."""
        return self.compiled()[self.current()]

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Run on this one inside the block, whatever is best.

        Raises:
            UsageError: it was not compiled, or this machine has not got it.
        """
        if name not in self.compiled():
            raise UsageError(
                f"instruction set {name!r} is not available; there are {', '.join(self.compiled())}"
            )
        self._forced.append(name)
        try:
            yield
        finally:
            self._forced.pop()


SETS = InstructionSets(
    "llmquant_instructions", {"avx512": ("avx512f",), "avx2": ("avx2", "fma"), "generic": ()}
)
compiled_instructions, best_instructions, current_instructions = (
    SETS.compiled,
    SETS.best,
    SETS.current,
)
instruction_number, instructions = SETS.number, SETS.using
