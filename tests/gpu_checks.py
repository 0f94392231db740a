"""What a kernel must keep on the device that it is made for; the same checks anywhere."""

from __future__ import annotations

import torch
from packing import random_weight
from tolerances import ROUNDOFF, dot_bound

from llmquant.kernels import Kernel
from llmquant.spec import QuantSpec

# Weights and result are rounded, and on a GPU partial sums too, where several blocks add theirs.
ROUNDINGS = 8
# Those of the proof in llmquant/kernels/gpu/library.py, for which a package has compiled already.
ROWS = (1, 5, 80)


def check_kernel(
    kernel: Kernel, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype,
    device: torch.device, counts: tuple[int, ...] = ROWS,
) -> None:  # fmt: skip
    """It takes the weight, holds it exactly, and multiplies within its roundings.

    Raises:
        AssertionError: saying which it does not.
    """
    refused = kernel.why_not(spec, shape, device, dtype)
    assert refused is None, f"{kernel.name} refuses: {refused}"
    weight = random_weight(*shape, spec)
    prepared = kernel.prepare(weight.to(device), dtype)
    for wanted in (torch.float32, dtype):
        held = kernel.weight(prepared, spec, shape, wanted).cpu()
        assert torch.equal(held, weight.dequantize(wanted)), f"{kernel.name}: not the weight"
    ids = torch.tensor([shape[0] - 1, 0, 3])
    rows = kernel.rows(prepared, ids.to(device), spec, shape).cpu()
    assert torch.equal(rows.float(), weight.dequantize()[ids]), f"{kernel.name}: not its rows"
    exact = weight.dequantize(torch.float64)
    bound = ROUNDINGS * ROUNDOFF[dtype] + dot_bound(torch.float32, shape[1])
    for count in counts:
        x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(count)).to(dtype)
        with torch.no_grad():
            y = kernel.linear(x.to(device), prepared, spec, shape).cpu()
        error = (y.double() - x.double() @ exact.T).abs()
        assert bool((error <= bound * (x.double().abs() @ exact.abs().T)).all()), (
            f"{kernel.name}: {count} rows are off by {float(error.max()):.2g}"
        )
