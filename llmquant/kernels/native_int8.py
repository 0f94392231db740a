"""The product with 8-bit activations of the compiled CPU library (csrc/cpu/int8.h), through ctypes.

Its instruction sets are other ones than the strict product's: VNNI multiplies bytes. The result is
the same bits on all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant.kernels import native
from llmquant.kernels.native import TYPES, Packed
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


def linear(x: Tensor, weight: Packed) -> Tensor:
    """``[..., in]`` → ``[..., out]``; x float32, bfloat16 or float16, on the CPU."""
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], weight.out))
    native.loaded().llmquant_int8_linear(
        SETS.number(), native.bound(weight), x.data_ptr(), x.numel() // weight.in_,
        TYPES[x.dtype], y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y
