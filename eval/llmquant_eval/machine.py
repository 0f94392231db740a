"""What the figures were measured on: versions and hardware."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import psutil

from llmquant_eval.report import Hardware

_PACKAGES = ("llmquant", "torch", "transformers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Python's and the installed packages' versions; a package run from its sources without metadata is left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The CPU's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: fall through to what Python knows
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    return len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count() or 1


def hardware(device: str) -> Hardware:
    """The machine as the models saw it."""
    import torch

    return Hardware(
        processor=processor(),
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        memory_bytes=psutil.virtual_memory().total,
        accelerator=torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else None,
    )
