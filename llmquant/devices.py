"""Devices and dtypes as users write them, checked before work starts."""

from __future__ import annotations

import torch

from llmquant.errors import UsageError

DTYPES = {
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16, "fp16": torch.float16,
    "float32": torch.float32, "fp32": torch.float32,
}  # fmt: skip


def parse_device(device: str | torch.device) -> torch.device:
    """A device that tensors can be put on here.

    Raises:
        UsageError: not a device name, or not present.
    """
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as e:  # torch asserts when it was built without the device
        raise UsageError(f"device {device!s} cannot be used here: {str(e).splitlines()[0]}") from e
    if where.type == "meta":
        raise UsageError("device meta holds no numbers; choose cpu, cuda …")
    return where


def parse_dtype(dtype: str | torch.dtype, auto: torch.dtype) -> torch.dtype:
    """A floating-point dtype; ``auto`` is what the word auto stands for.

    Raises:
        UsageError: not a name in ``DTYPES``, or not floating-point.
    """
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise UsageError(f"dtype {dtype} is not a floating-point type")
        return dtype
    if dtype == "auto":
        return auto
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} does not exist; choose auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
