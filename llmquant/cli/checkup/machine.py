"""What ``llmquant doctor`` looks at. Each look stands alone: what cannot be found out is said in
words, never a traceback.

What llmquant needs, and what its extras are, is read from its own installed metadata, so there is
no second list of them.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import psutil

from llmquant.cli.checkup.engines import BITS, BROKEN, GROUP, llama_cpp, onnx, takes, vllm
from llmquant.errors import LlmquantError
from llmquant.runtime.processor import Processor, this_processor

_SHOWN_VERSIONS = (
    "llmquant",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "compressed-tensors",
    "datasets",
    "accelerate",
)
_NEEDED = (
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
)  # imported, not only looked up: a broken wheel shows then
_SHAPE = (4096, 4096)


@dataclass(slots=True)
class Checkup:
    """What was found. ``problems`` are what llmquant cannot work with; ``hints`` are what could be
    better."""

    processor: Processor
    versions: Mapping[str, str | None]
    memory: Mapping[str, int]
    disk: Mapping[str, Any]
    auto: dict[str, Any] = field(default_factory=dict)
    kernels: dict[str, dict[str, Any]] = field(default_factory=dict)
    compiled: dict[str, Any] = field(default_factory=dict)
    threads: dict[str, int | None] = field(default_factory=dict)
    gpus: list[dict[str, Any]] = field(default_factory=list)
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    extras: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"ok": self.ok, **asdict(self)}


def look(environment: Mapping[str, str] = os.environ) -> Checkup:
    """Look at everything."""
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    here = this_processor()
    checkup = Checkup(
        processor=here,
        versions={
            "python": platform.python_version(),
            **{name: _version(name) for name in _SHOWN_VERSIONS},
        },
        memory={
            "total": here.memory_bytes,
            "available": min(int(memory.available), here.memory_bytes),
            "swap": int(swap.total),
            "swap_free": int(swap.free),
        },
        disk=_disk(),
    )
    checkup.problems += _requirements(checkup.extras)
    broken = _imports()
    checkup.problems += broken
    if not broken:
        _look_with_torch(checkup)
    checkup.engines["vllm"] = vllm(environment)
    checkup.extras["ONNX exports"] = onnx()
    checkup.extras["llama.cpp"] = llama_cpp()
    return checkup


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _disk() -> dict[str, Any]:
    try:
        here = Path.cwd()
        return {"path": str(here), "free": shutil.disk_usage(here).free}
    except OSError as e:
        return {"path": None, "free": None, "error": str(e)}


def _imports() -> list[str]:
    """Which of the packages that everything stands on cannot be imported, and why."""
    problems = []
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except BROKEN as e:
            first = next(iter(str(e).splitlines()), type(e).__name__)
            problems.append(
                f"{name} cannot be imported: {first}; reinstall it: pip install --force-reinstall {name}"
            )
            if name == "torch":
                break  # the others only repeat it
    return problems


def _requirements(extras: dict[str, dict[str, Any]]) -> list[str]:
    """What the installed llmquant requires and does not have; fills ``extras`` with what each of
    those lacks."""
    try:
        from packaging.requirements import Requirement

        wanted = [Requirement(text) for text in requires("llmquant") or []]
    except PackageNotFoundError:
        return [
            "llmquant runs from sources that are not installed, so what it requires is not known: pip install -e ."
        ]
    except ImportError as e:
        return [
            f"packaging cannot be imported, which transformers needs: {e}; pip install packaging"
        ]
    problems = []
    for requirement in wanted:
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", str(requirement.marker or ""))
        have = _version(requirement.name)
        fits = have is not None and requirement.specifier.contains(have, prereleases=True)
        what = f"{requirement.name}{requirement.specifier}" + (
            f" (there is {have})" if have is not None else ""
        )
        if extra is not None:
            entry = extras.setdefault(
                extra[1], {"missing": [], "install": f"pip install 'llmquant[{extra[1]}]'"}
            )
            if not fits:
                entry["missing"].append(what)
        elif not fits and (requirement.marker is None or requirement.marker.evaluate()):
            problems.append(
                f"{what} is needed and not there: pip install '{requirement.name}{requirement.specifier}'"
            )
    # Of those who change llmquant, not of those who use it; vLLM is an engine, which is asked.
    for name in ("dev", "docs", "vllm"):
        extras.pop(name, None)
    return problems


def _look_with_torch(checkup: Checkup) -> None:
    import torch

    from llmquant.runtime.devices import AUTO, CALIBRATION, parse_device, parse_dtype

    here = checkup.processor
    device = parse_device(AUTO)
    chosen = parse_dtype(AUTO, device)
    on_cpu = parse_dtype(AUTO, "cpu")
    checkup.auto = {
        "device": str(device),
        "dtype": chosen.name if device.type == "cpu" else "the checkpoint's own dtype",
        "cpu_dtype": on_cpu.name,
        "cpu_reason": on_cpu.reason,
        "calibration_dtype": CALIBRATION.name,
        "calibration_reason": CALIBRATION.reason,
    }
    checkup.versions = {
        **checkup.versions,
        "torch's CPU capability": torch.backends.cpu.get_cpu_capability(),
    }
    checkup.threads = {
        "torch": torch.get_num_threads(),
        "available": here.threads,
        "cores": here.cores,
    }
    if torch.get_num_threads() > here.threads:
        checkup.hints.append(
            f"torch computes with {torch.get_num_threads()} threads where {here.threads} can run at once: "
            f"--threads {here.threads} is faster"
        )
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        checkup.gpus.append({"device": f"cuda:{i}", "name": facts.name, "memory": facts.total_memory,
                           "capability": f"{facts.major}.{facts.minor}"})  # fmt: skip
    if not checkup.gpus and shutil.which("nvidia-smi"):
        built = (
            f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        )
        checkup.hints.append(
            f"nvidia-smi is here but torch finds no GPU (it is {built}); see https://pytorch.org/get-started"
        )
    try:
        checkup.kernels = _kernels(device, chosen.dtype)
        checkup.compiled = _compiled(checkup.hints)
    except (LlmquantError, *BROKEN) as e:
        checkup.problems.append(f"kernels cannot be chosen: {e}")
    if checkup.versions["compressed-tensors"] is None:
        checkup.engines["transformers"] = {
            "ready": False,
            "reason": "compressed-tensors, by which it reads packed folders, is not installed",
            "install": "pip install compressed-tensors",
        }
    else:
        checkup.engines["transformers"] = {"ready": True, **takes("transformers")}


def _kernels(device: Any, dtype: Any) -> dict[str, dict[str, Any]]:
    """For each width the kernel that ``auto`` takes, and why not those before it."""
    from llmquant.kernels import choose
    from llmquant.spec import QuantSpec

    found = {}
    for bits in BITS:
        kernel, refusals = choose(QuantSpec(bits, GROUP), _SHAPE, device, dtype)
        found[f"W{bits} g{GROUP}"] = {
            "kernel": kernel.name,
            "dtype": str(dtype).removeprefix("torch."),
            "not": dict(refusals),
        }
    return found


def _compiled(hints: list[str]) -> dict[str, Any]:
    """The compiled CPU library: instruction sets and threads."""
    from llmquant.kernels import native

    facts = native.describe()
    if not facts["compiled"]:
        hints.append(
            f"packed layers are slow on this CPU: kernel cpu is missing; {facts['reason']}"
        )
    elif not facts["shares_threads"]:
        hints.append(
            "kernel cpu runs on one thread: torch brought no OpenMP runtime that it could share"
        )
    return facts
