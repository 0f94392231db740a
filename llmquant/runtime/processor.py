"""The one place that knows the processor: its name, its instruction sets, and how much of it this
process may use.

Instruction sets have one name each here, whatever the operating system calls them
(``INSTRUCTION_SETS``). They are read without torch: from ``/proc/cpuinfo`` on Linux, from
``sysctl`` on macOS. Where neither can be read they are unknown, which is another thing than absent
(``Processor.known``).

torch can be held to less than the processor has. ``ATEN_CPU_CAPABILITY`` holds torch's own loops,
``ONEDNN_MAX_CPU_ISA`` the matrix library under it. A set counts as usable when both let it: a
machine with AVX-512 that is held to AVX2 looks like one with AVX2. So a benchmark or a bug report
of another processor can be repeated here. The variables are read once, as torch does; set them
before Python starts.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import psutil

from llmquant.runtime import host

INSTRUCTION_SETS = (
    "amx_bf16",
    "amx_int8",
    "avx512_bf16",
    "avx512_vnni",
    "avx512f",
    "avx_vnni",
    "avx2",
    "fma",
    "f16c",
    "bf16",
    "i8mm",
    "dotprod",
    "neon",
)
"""Canonical names, the most telling first: x86, then ARM."""

_LINUX_ARM = {"bf16": "bf16", "i8mm": "i8mm", "asimddp": "dotprod", "asimd": "neon", "neon": "neon"}
_MACOS_X86 = {
    "AVX512F": "avx512f",
    "AVX512_BF16": "avx512_bf16",
    "AVX512VNNI": "avx512_vnni",
    "AVX2": "avx2",
    "FMA": "fma",
    "F16C": "f16c",
}
_MACOS_ARM = {
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_DotProd": "dotprod",
    "hw.optional.AdvSIMD": "neon",
}
# Arm gives numbers for names; these are the cores that servers have.
_ARM_PARTS = {
    ("0x41", "0xd0c"): "Neoverse N1",
    ("0x41", "0xd40"): "Neoverse V1",
    ("0x41", "0xd49"): "Neoverse N2",
    ("0x41", "0xd4f"): "Neoverse V2",
    ("0x41", "0xd83"): "Neoverse V3AE",
    ("0x41", "0xd84"): "Neoverse V3",
    ("0x41", "0xd8e"): "Neoverse N3",
    ("0xc0", "0xac3"): "AmpereOne",
}

_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512f"}
_ATEN = {"default": frozenset[str](), "avx2": _AVX2 | {"avx_vnni"}}
# https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html
_ONEDNN = {
    "SSE41": frozenset[str](),
    "AVX": frozenset({"f16c"}),
    "AVX2": _AVX2,
    "AVX2_VNNI": _AVX2 | {"avx_vnni"},
    "AVX2_VNNI_2": _AVX2 | {"avx_vnni"},
    "AVX512_CORE": _AVX512,
    "AVX512_CORE_VNNI": _AVX512 | {"avx512_vnni"},
    "AVX512_CORE_BF16": _AVX512 | {"avx512_vnni", "avx512_bf16"},
    "AVX512_CORE_FP16": _AVX512 | {"avx512_vnni", "avx512_bf16", "avx_vnni"},
    "AVX10_1_512": _AVX512 | {"avx512_vnni", "avx512_bf16", "avx_vnni"},
    "AVX10_2_512": _AVX512 | {"avx512_vnni", "avx512_bf16", "avx_vnni"},
}


@dataclass(frozen=True, slots=True)
class Processor:
    """A processor as this process may use it.

    Attributes:
        architecture: ``x86_64``, ``aarch64`` …
        name: as sold, or as far as it can be told.
        instruction_sets: the usable ones of ``INSTRUCTION_SETS``, in that order.
        known: whether instruction sets could be read at all.
        held_back: those that the processor has and ``held_by`` keeps torch from.
        held_by: the variables that do, ``ATEN_CPU_CAPABILITY=avx2``.
        cores: physical cores of the machine; None when it does not tell.
        threads: that this process may run at once: the machine's, less by affinity and a
            container's limit.
        memory_bytes: that this process may have: the machine's, less by a container's limit.
    """

    architecture: str
    name: str
    instruction_sets: tuple[str, ...]
    known: bool = True
    held_back: tuple[str, ...] = ()
    held_by: tuple[str, ...] = ()
    cores: int | None = None
    threads: int = 1
    memory_bytes: int = 0

    def has(self, *names: str) -> bool:
        """Whether all of these instruction sets are usable.

        Raises:
            KeyError: a name that is not in ``INSTRUCTION_SETS``.
        """
        strange = set(names) - set(INSTRUCTION_SETS)
        if strange:
            raise KeyError(f"no such instruction set: {', '.join(sorted(strange))}")
        return set(names) <= set(self.instruction_sets)

    @property
    def is_x86(self) -> bool:
        return self.architecture in ("x86_64", "i686", "i386")

    @property
    def is_arm(self) -> bool:
        return self.architecture in ("aarch64", "armv8l", "armv7l")


@cache
def this_processor() -> Processor:
    """The processor that this process runs on, under the variables it was started with."""
    architecture = _architecture(platform.machine())
    name, has = _macos(_sysctl()) if sys.platform == "darwin" else _linux()
    return processor_of(
        architecture, name or platform.processor() or architecture, has, os.environ,
        cores=psutil.cpu_count(logical=False), threads=host.threads(), memory_bytes=host.memory_bytes(),
    )  # fmt: skip


def processor_of(
    architecture: str,
    name: str,
    has: frozenset[str] | None,
    environment: Mapping[str, str],
    *,
    cores: int | None = None,
    threads: int = 1,
    memory_bytes: int = 0,
) -> Processor:
    """A processor with the instruction sets it ``has`` (None: unknown), held down by the variables
    in ``environment``."""
    own = has or frozenset[str]()
    ceilings = _ceilings(environment)
    usable = own.intersection(*(ceiling for _, ceiling in ceilings))
    held_by = [variable for variable, ceiling in ceilings if own - ceiling]
    return Processor(
        architecture,
        name,
        _ordered(usable),
        known=has is not None,
        held_back=_ordered(own - usable),
        held_by=tuple(held_by),
        cores=cores,
        threads=threads,
        memory_bytes=memory_bytes,
    )


def read_cpuinfo(text: str) -> tuple[str, frozenset[str] | None]:
    """Name and instruction sets from the text of ``/proc/cpuinfo``: those that all processors
    listed there have.

    A phone's or laptop's small cores may have fewer than its large ones, and a thread may run on
    either.
    """
    facts: dict[str, str] = {}
    sets: list[frozenset[str]] = []
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        facts.setdefault(key, value)
        if key == "flags":
            sets.append(
                frozenset(value.split()) & frozenset(INSTRUCTION_SETS) - set(_LINUX_ARM.values())
            )
        elif key == "Features":
            sets.append(frozenset(_LINUX_ARM[word] for word in value.split() if word in _LINUX_ARM))
    part = (facts.get("CPU implementer", "").lower(), facts.get("CPU part", "").lower())
    name = facts.get("model name") or _ARM_PARTS.get(part) or facts.get("Hardware") or ""
    return name, frozenset.intersection(*sets) if sets else None


def _ceilings(environment: Mapping[str, str]) -> list[tuple[str, frozenset[str]]]:
    """The variables that hold torch down, as ``NAME=value``, and the most that each lets it use.

    A value that is not known holds nothing: torch and oneDNN ignore such ones too. None holds ARM's
    sets: there torch's own ``default`` is NEON, and oneDNN heeds the variable on x86 only.
    """
    arm = frozenset(_LINUX_ARM.values())
    ceilings = []
    for variable, levels, case in (
        ("ATEN_CPU_CAPABILITY", _ATEN, str.lower),
        ("ONEDNN_MAX_CPU_ISA", _ONEDNN, str.upper),
        ("DNNL_MAX_CPU_ISA", _ONEDNN, str.upper),
    ):
        value = environment.get(variable, "")
        if (level := levels.get(case(value))) is not None:
            ceilings.append((f"{variable}={value}", level | arm))
    return ceilings


def _ordered(sets: frozenset[str]) -> tuple[str, ...]:
    return tuple(name for name in INSTRUCTION_SETS if name in sets)


def _architecture(machine: str) -> str:
    """One name for each: Windows says AMD64, macOS arm64."""
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine.lower(), machine.lower())


def _linux() -> tuple[str, frozenset[str] | None]:
    return read_cpuinfo(host.text("/proc/cpuinfo"))


def _sysctl() -> str:
    """Everything that macOS tells, as ``key: value`` lines; nothing when it cannot be asked."""
    try:
        return subprocess.run(
            ["/usr/sbin/sysctl", "machdep.cpu", "hw.optional"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _macos(text: str) -> tuple[str, frozenset[str] | None]:
    """Name and instruction sets from what ``sysctl machdep.cpu hw.optional`` prints."""
    facts = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in text.splitlines())
    }
    words = " ".join(
        facts.get(key, "") for key in ("machdep.cpu.features", "machdep.cpu.leaf7_features")
    ).split()
    sets = {_MACOS_X86[word] for word in words if word in _MACOS_X86}
    sets |= {name for key, name in _MACOS_ARM.items() if facts.get(key) == "1"}
    return facts.get("machdep.cpu.brand_string", ""), frozenset(sets) if facts else None
