"""The scale search and GPTQ's column loop in compiled code (csrc/cpu/rounding.h), for float32 on
the CPU.

Both give what the torch code of ``grid.py`` and ``gptq.py`` gives, to the bit but for one rounding
(below), and for any number of threads; that code stays for other devices and dtypes, for searches
by another exponent than 2, and where the library was not built. GPTQ's loop rounds ``w - u *
error`` once, as torch does on a processor with fused multiply-add; on one without it, and in the
output channels that are left over behind its last whole vector, torch rounds twice.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from llmquant.runtime.native_library import instruction_number, library, why_missing


class _Fit(ctypes.Structure):
    """``llmquant::Fit`` of csrc/cpu/rounding.h."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("weight", "cost", "factors", "fractions", "scales", "zeros")
        ),
        *((name, ctypes.c_int64) for name in ("rows", "groups", "width")),
        *((name, ctypes.c_int32) for name in ("max_code", "symmetric", "steps")),
    ]


class _Visit(ctypes.Structure):
    """``llmquant::Visit`` of csrc/cpu/rounding.h."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("weight", "codes", "errors", "upper", "scales", "zeros", "group_of")
        ),
        *((name, ctypes.c_int64) for name in ("out", "start", "first", "last", "stop")),
        ("max_code", ctypes.c_int32),
    ]


def why_not(weight: Tensor) -> str | None:
    """Why the compiled code does not take this weight, or None."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return f"compiled for float32 on the CPU, this is {weight.dtype} on {weight.device.type}"
    return why_missing()


def fit(
    groups: Tensor,
    cost: Tensor | None,
    max_code: int,
    symmetric: bool,
    steps: int,
    factors: list[float],
    fractions: list[float],
) -> tuple[Tensor, Tensor]:
    """Scales float32 and zero-points uint8 ``[out, groups]`` of a weight ``[out, groups, width]``,
    by squared error.

    Args:
        cost: ``[groups, width]``, or None.
        factors: what a group's reach is multiplied with for each candidate scale; see the header.
        fractions: of the widest range, for each candidate of an asymmetric search.
    """
    groups, cost = groups.contiguous(), None if cost is None else cost.contiguous()
    scales = torch.empty(groups.shape[:2])
    zeros = torch.empty(groups.shape[:2], dtype=torch.uint8)
    multiply, shrink = (
        torch.tensor(factors, dtype=torch.float32),
        torch.tensor(fractions, dtype=torch.float32),
    )
    pointers = (
        None if t is None else t.data_ptr() for t in (groups, cost, multiply, shrink, scales, zeros)
    )
    task = _Fit(*pointers, *groups.shape, max_code, symmetric, steps)
    _lib().llmquant_fit(instruction_number(), ctypes.byref(task), torch.get_num_threads())
    return scales, zeros


def visit(
    weight: Tensor,
    codes: Tensor,
    errors: Tensor,
    square: Tensor,
    grid: tuple[Tensor, Tensor, Tensor],
    start: int,
    columns: range,
    max_code: int,
) -> None:
    """Round ``columns`` of the block that begins at ``start``, and take their errors out of the
    block's later columns.

    Args:
        weight: ``[in, out]`` in visiting order, its later columns updated in place; so are
            ``codes``, of the same shape.
        errors: ``[block, out]``; those of ``columns`` are written.
        square: ``[block, block]``, the block's part of ``U``.
        grid: scales ``[groups, out]``, zeros likewise in the same dtype, and the group of each
            column, int64 ``[in]``.
    """
    tensors = (weight, codes, errors, square.T.contiguous(), *grid)
    assert all(t.is_contiguous() for t in tensors)
    task = _Visit(
        *(t.data_ptr() for t in tensors),
        weight.shape[1],
        start,
        columns.start,
        columns.stop,
        start + len(errors),
        max_code,
    )
    _lib().llmquant_visit(instruction_number(), ctypes.byref(task), torch.get_num_threads())


def _lib() -> ctypes.CDLL:
    lib = library()
    assert lib is not None, "asked only where why_not() is None"
    return lib
