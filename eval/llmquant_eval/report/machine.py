"""What the figures were measured on: versions and hardware."""

from __future__ import annotations

import importlib.metadata
import platform

import psutil

import llmquant
from llmquant_eval.report.schema import Hardware

_PACKAGES = ("llmquant", "torch", "transformers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Python's and the installed packages' versions; a package run from its sources without
    metadata is left out."""
    installed = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def processor() -> str:
    """The CPU's name as the system gives it."""
    return llmquant.this_processor().name


def hardware(device: str) -> Hardware:
    """The machine that this process runs on, and the accelerator of ``device``."""
    import torch

    here = llmquant.this_processor()
    return Hardware(
        processor=here.name,
        cores=here.threads,
        threads=torch.get_num_threads(),
        memory_bytes=psutil.virtual_memory().total,
        accelerator=torch.cuda.get_device_name(torch.device(device))
        if device.startswith("cuda")
        else None,
        instruction_sets=list(here.instruction_sets),
    )
