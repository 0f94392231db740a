"""Devices and dtypes as users write them, and what ``auto`` means: decided here for every command
and for :func:`llmquant.load`.

One set of words everywhere. Devices: ``auto`` (cuda where there is one, else cpu) and whatever
torch calls one. Dtypes: ``auto`` and the keys of ``DTYPES``. None counts as ``auto``.

``auto`` on a CPU is bfloat16 only where the processor is quick in it, else float32:

* AMX (``amx_bf16``) and ``bf16`` of ARM under Linux: bfloat16. These multiply matrices of it in
  hardware, and oneDNN uses them.
* x86 without AVX-512: float32. torch then has no fast matrix product in bfloat16; it is up to 100
  times slower.
* Where instruction sets cannot tell (AVX-512, also with ``avx512_bf16``, ARM without bf16 or under
  macOS, a processor that is not known): a probe of some milliseconds, once for a process. bfloat16
  must be clearly faster, so that noise does not decide.

On other devices ``auto`` is the checkpoint's own dtype.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from llmquant.errors import UsageError
from llmquant.runtime.processor import Processor, this_processor

AUTO = "auto"
DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}
_CLEARLY = 0.7  # of float32's time: what bfloat16 may take at most to be chosen by the probe
_PROBE_ROWS, _PROBE_WIDTH, _PROBE_REPEATS = (1, 16), 768, 15


@dataclass(frozen=True, slots=True)
class ChosenDtype:
    """A compute dtype, and why it was chosen; ``reason`` is None for one that was asked for by
    name."""

    dtype: torch.dtype
    reason: str | None = None

    @property
    def name(self) -> str:
        """``float32``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize


CALIBRATION = ChosenDtype(
    torch.float32,
    "calibration passes are float32 on every device, so that statistics are not rounded",
)
"""What ``auto`` means for calibration passes."""

ROUNDING = ChosenDtype(torch.float32, "weights are rounded in float32, whatever they are stored in")
"""What ``auto`` means where nothing is calibrated."""


def parse_device(device: str | torch.device | None = AUTO) -> torch.device:
    """A device that tensors can be put on here; ``auto`` or None: cuda where there is one, else
    cpu.

    Raises:
        UsageError: not a device name, or not present.
    """
    if device is None or device == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (
        RuntimeError,
        AssertionError,
    ) as e:  # torch asserts when it was built without the device
        raise UsageError(
            f"device {device!s} cannot be used here: {str(e).splitlines()[0]}; choose auto, cpu, cuda, cuda:0 …"
        ) from e
    if where.type == "meta":
        raise UsageError("device meta holds no numbers; choose auto, cpu, cuda, cuda:0 …")
    return where


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU that nobody has; None where torch does not tell."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


def make_current(device: torch.device) -> None:
    """Make a GPU the one that this thread's kernels go to: those of Triton and of other compilers
    ask the thread, not the tensors."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def parse_dtype(
    dtype: str | torch.dtype | None = AUTO,
    device: str | torch.device | None = "cpu",
    *,
    stored: str | torch.dtype | None = None,
    auto: ChosenDtype | None = None,
) -> ChosenDtype:
    """A floating-point dtype, with the reason where ``auto`` or None was asked for.

    Args:
        device: that will compute in it.
        stored: the checkpoint's own dtype, which ``auto`` takes on devices other than a CPU.
        auto: what ``auto`` means instead, for work that has a dtype of its own.

    Raises:
        UsageError: not a name in ``DTYPES``, or not floating-point; or the device cannot be used.
    """
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise UsageError(f"dtype {dtype} is not a floating-point type")
        return ChosenDtype(dtype)
    if dtype is None or dtype == AUTO:
        return auto if auto is not None else auto_dtype(parse_device(device), stored)
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} does not exist; choose auto, {', '.join(DTYPES)}")
    return ChosenDtype(DTYPES[dtype])


def auto_dtype(device: torch.device, stored: str | torch.dtype | None = None) -> ChosenDtype:
    """What ``auto`` means on a device: see the module text."""
    if device.type == "cpu":
        return _cpu_dtype()
    own = stored if isinstance(stored, torch.dtype) else DTYPES.get(stored or "")
    if own is None or not own.is_floating_point:
        return ChosenDtype(
            torch.bfloat16,
            f"the checkpoint does not tell its dtype, and on {device.type} this is the usual one",
        )
    return ChosenDtype(own, f"it is the checkpoint's own, and the device is {device.type}")


@cache
def _cpu_dtype() -> ChosenDtype:
    return dtype_for(this_processor())


def dtype_for(processor: Processor) -> ChosenDtype:
    """The faster dtype of a processor, by what it is; by a probe of the one at hand where that does
    not tell."""
    bfloat16 = torch.bfloat16
    if processor.has("amx_bf16"):
        return ChosenDtype(bfloat16, "this processor multiplies bfloat16 in AMX tiles (amx_bf16)")
    if processor.has("bf16") and sys.platform == "linux":
        return ChosenDtype(bfloat16, "this processor has bfloat16 instructions (ARM bf16)")
    if processor.is_x86 and processor.known and not processor.has("avx512f"):
        sets = "AVX2" if processor.has("avx2") else "no AVX2"
        held = f", held to that by {' '.join(processor.held_by)}" if processor.held_by else ""
        return ChosenDtype(
            torch.float32,
            f"bfloat16 can be up to 100 times slower on this processor ({sets}, no bf16 instructions{held})",
        )
    return _by_ratio(probe())


def _by_ratio(ratio: float) -> ChosenDtype:
    """The choice after a probe: ``ratio`` is bfloat16's time over float32's."""
    if ratio < _CLEARLY:
        return ChosenDtype(
            torch.bfloat16,
            f"bfloat16 takes {ratio:.2g} of float32's time on this processor (measured)",
        )
    if ratio >= 1.05:  # less is printed as "1 times"
        return ChosenDtype(
            torch.float32,
            f"bfloat16 takes {ratio:.2g} times as long as float32 on this processor (measured)",
        )
    return ChosenDtype(
        torch.float32,
        f"bfloat16 is not clearly faster on this processor: {ratio:.2g} of float32's time (measured)",
    )


def probe() -> float:
    """bfloat16's time over float32's for ``F.linear`` on one thread: the worse of one row
    (decoding) and some (a prompt).

    On a busy machine several threads wait for the one that another process keeps from its core:
    that wait, up to a thousand times the product's own time, then stood for either dtype's.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_PROBE_WIDTH, _PROBE_WIDTH, generator=generator)
    worst = 0.0
    with _one_thread():
        for rows in _PROBE_ROWS:
            x = torch.randn(rows, _PROBE_WIDTH, generator=generator)
            single, half = _shortest([(x, weight), (x.bfloat16(), weight.bfloat16())])
            worst = max(worst, half / single)
    return worst


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch computes on one thread inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _shortest(linears: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """The shortest of some runs of each, in seconds, after one that is not counted.

    They run in turn: what else the machine does then disturbs both.
    """
    shortest = [math.inf] * len(linears)
    for repeat in range(_PROBE_REPEATS + 1):
        for i, (x, weight) in enumerate(linears):
            began = time.perf_counter()
            F.linear(x, weight)
            if repeat:
                shortest[i] = min(shortest[i], time.perf_counter() - began)
    return shortest
