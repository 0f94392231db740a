"""What the kernels need to know of a GPU, asked in one place."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that torch can use.

    Attributes:
        amd: whether torch reaches it through ROCm; its ``cuda`` device is an AMD GPU then.
        capability: compute capability, ``(9, 0)`` for an H100; on AMD what torch says.
    """

    amd: bool
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"compute capability {self.capability[0]}.{self.capability[1]}"


def find(device: torch.device) -> Gpu | None:
    """The GPU that ``device`` (of type ``cuda``) names, or None where torch finds none."""
    if not torch.cuda.is_available():
        return None
    return Gpu(torch.version.hip is not None, torch.cuda.get_device_capability(device))
