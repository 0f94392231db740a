"""How something is computed, as one record: for screens, reports and JSON, so that all say the same
in the same words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llmquant.runtime.devices import ChosenDtype
from llmquant.runtime.processor import this_processor


@dataclass(frozen=True, slots=True)
class Computing:
    """Device, dtype, threads and processor of a computation.

    Attributes:
        device: ``cpu``, ``cuda:0`` …
        dtype: ``float32`` …
        dtype_reason: why, when it was chosen automatically; None when it was asked for.
        threads: of torch.
        processor: its name.
        instruction_sets: of the processor, as far as torch may use them.
    """

    device: str
    dtype: str
    dtype_reason: str | None
    threads: int
    processor: str
    instruction_sets: tuple[str, ...]

    @classmethod
    def of(cls, device: str | torch.device, dtype: ChosenDtype) -> Computing:
        """With the threads and the processor of now."""
        here = this_processor()
        return cls(
            str(device),
            dtype.name,
            dtype.reason,
            torch.get_num_threads(),
            here.name,
            here.instruction_sets,
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "instruction_sets": list(self.instruction_sets)}

    def as_text(self, kernels: Mapping[str, int] | None = None) -> str:
        """One line: ``float32 on cpu, 2 threads, kernel cpu for 42 linears; bfloat16 would be
        …``."""
        parts = [
            f"{self.dtype} on {self.device}",
            f"{self.threads} thread{'' if self.threads == 1 else 's'}",
        ]
        parts += [f"kernel {name} for {count} linears" for name, count in (kernels or {}).items()]
        return ", ".join(parts) + (
            "" if self.dtype_reason is None else f"; {self.dtype} because {self.dtype_reason}"
        )
