"""Kernels by name in order of preference, and the choice among them: the first that has no reason
against it.

``auto`` never takes what stands behind ``reference``: ``dense``, because a packed model that
quietly became a dense one would not be what was asked for, and ``cpu_int8``, because it rounds the
activations.
"""

from __future__ import annotations

import logging

import torch

from llmquant.errors import UsageError
from llmquant.kernels.base import Kernel, Prepared
from llmquant.kernels.cpu import Cpu
from llmquant.kernels.cpu_int8 import CpuInt8
from llmquant.kernels.dense import Dense
from llmquant.kernels.gpu.gemlite import Gemlite
from llmquant.kernels.gpu.humming import Humming
from llmquant.kernels.int4.cpu import CpuInt4
from llmquant.kernels.int4.cuda import CudaInt4
from llmquant.kernels.reference import Reference
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

log = logging.getLogger(__name__)

KERNELS: dict[str, Kernel] = {
    k.name: k
    for k in (
        *(Cpu(), CpuInt4()),
        *(Humming(), Gemlite(), CudaInt4()),
        *(Reference(), Dense(), CpuInt8()),
    )
}
AUTO = "auto"


def check_name(name: str) -> None:
    """Raises UsageError for a name that is neither ``auto`` nor a kernel's."""
    if name != AUTO and name not in KERNELS:
        raise UsageError(f"kernel {name!r} does not exist; choose auto, {', '.join(KERNELS)}")


def rounds_inputs(name: str) -> bool:
    """Whether the kernel of that name computes with rounded activations; False for one that is
    not known here, which another version may have had."""
    return name in KERNELS and KERNELS[name].rounds_inputs


def choose(
    spec: QuantSpec,
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    g_idx: bool = False,
    prefer: str = AUTO,
    weight: QuantizedWeight | None = None,
) -> tuple[Kernel, dict[str, str]]:
    """The first kernel without an objection, and the objections of those before it.

    Args:
        shape: ``(out, in)``.
        g_idx: whether columns are assigned to groups by a non-trivial ``g_idx``.
        prefer: ``auto`` or a kernel's name, which then is the only one asked.
        weight: when given, kernels may also refuse its numbers.

    Raises:
        UsageError: an unknown name, or the named kernel refuses (with its reason).
    """
    check_name(prefer)
    refusals: dict[str, str] = {}
    for name in KERNELS if prefer == AUTO else (prefer,):
        kernel = KERNELS[name]
        reason = kernel.why_not(spec, shape, device, dtype, g_idx)
        if reason is None and weight is not None:
            reason = kernel.why_not_weight(weight, dtype)
        if reason is None:
            return kernel, refusals
        refusals[name] = reason
        log.info(
            "kernel %s cannot take a %s weight %s at %s on %s: %s",
            name,
            spec,
            list(shape),
            dtype,
            device,
            reason,
        )
    # `reference` refuses nothing, so with `auto` this point is not reached.
    raise UsageError(
        f"kernel {prefer} cannot take a {spec} weight {list(shape)}: {refusals[prefer]}; use --kernel auto"
    )


__all__ = ["AUTO", "KERNELS", "Kernel", "Prepared", "check_name", "choose", "rounds_inputs"]
