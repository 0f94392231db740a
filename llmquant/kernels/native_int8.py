"""The product with 8-bit activations of the compiled CPU library (csrc/cpu/int8.h), through ctypes.

Its instruction sets are other ones than the strict product's: VNNI multiplies bytes. The result is
the same bits on all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant.kernels import native
from llmquant.kernels.native import TYPES
from llmquant.runtime.native_library import InstructionSets

SETS = InstructionSets(
    "llmquant_int8_instructions",
    {
        "avx512vnni": ("avx512f", "avx512_vnni"),
        "avx512": ("avx512f",),
        "avxvnni": ("avx2", "avx_vnni"),
        "avx2": ("avx2", "fma"),
        "generic": (),
    },
)
compiled_instructions, best_instructions = SETS.compiled, SETS.best
current_instructions, instructions = SETS.current, SETS.using


def linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    columns: Tensor | None,
    bits: int,
    out: int,
    in_: int,
) -> Tensor:
    """``[..., in]`` → ``[..., out]``; x float32, bfloat16 or float16, on the CPU. Arguments as of
    ``native.linear``."""
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], out))
    native.loaded().llmquant_int8_linear(
        SETS.number(), native.bound(words, scales, zeros, columns, bits, out, in_),
        x.data_ptr(), x.numel() // in_, TYPES[x.dtype], y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y
