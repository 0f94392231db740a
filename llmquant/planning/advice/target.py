"""Where a model is to run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmquant.runtime.devices import AUTO, parse_device
from llmquant.runtime.host import available_bytes
from llmquant.runtime.memory import resident_bytes


@dataclass(frozen=True, slots=True)
class Target:
    """Where the model is to run.

    Attributes:
        device: as in ``--device``.
        memory_bytes: that it may take.
        memory_from: where that number is from, for people.
        here: whether it is this machine.
        floor_bytes: what the process takes without a model.
    """

    device: str
    memory_bytes: int
    memory_from: str
    here: bool
    floor_bytes: int


def this_target(device: str = AUTO, memory_bytes: int | None = None) -> Target:
    """The machine at hand, or one of so much memory.

    Raises:
        UsageError: a device that is not there.
    """
    on = parse_device(device)
    floor = resident_bytes()
    if memory_bytes is not None:
        return Target(str(on), memory_bytes, "as given", False, floor)
    if on.type == "cuda":
        free, _ = torch.cuda.mem_get_info(on)
        return Target(str(on), free, "free on the device now", True, 0)
    return Target(str(on), available_bytes(), "available here now", True, floor)
