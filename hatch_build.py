"""Build hook: compiles csrc/cpu into llmquant/kernels/libllmquant_cpu.so, for wheels and editable
installs alike.

The library has a plain C interface and needs neither torch nor Python's headers, so one build
serves every Python and every torch. Each instruction set is a file of its own with its own flags;
which one runs is decided at run time. Without a C++ compiler the package installs all the same and
says so: packed layers then run on torch's operators (`llmquant doctor` tells which).

    CXX                      the compiler [default: c++, g++ or clang++, whichever is found first]
    LLMQUANT_NATIVE=require  a build that fails is an error, for wheels that are given to others
    LLMQUANT_NATIVE=skip     no build
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = Path("csrc") / "cpu"
LIBRARY = Path("llmquant") / "kernels" / "libllmquant_cpu.so"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-fno-semantic-interposition",
]
# Files that are compiled for more than the oldest processor of the architecture.
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
X86 = {
    "isa_avx2": _AVX2,
    "isa_avx512": _AVX512,
    "rounding_avx2": _AVX2,
    "rounding_avx512": _AVX512,
    "int8_avx2": _AVX2,
    "int8_avx512": _AVX512,
    "int8_avx512vnni": [*_AVX512, "-mavx512vnni"],
    "int8_avxvnni": [*_AVX2, "-mavxvnni"],
}
# Files that leave out their instructions where the compiler refuses the flags, being younger than
# C++17 compilers.
OPTIONAL = {"int8_avxvnni"}


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the compiled library to the wheel, or a warning to the output."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        wanted = os.environ.get("LLMQUANT_NATIVE", "")
        root = Path(self.root)
        problem = "LLMQUANT_NATIVE=skip" if wanted == "skip" else build(root)
        if problem is None:
            build_data["pure_python"] = False
            build_data["artifacts"].append(f"/{LIBRARY.as_posix()}")
            build_data["tag"] = f"py3-none-{_platform_tag()}"
            return
        (root / LIBRARY).unlink(missing_ok=True)
        if wanted == "require":
            raise RuntimeError(f"the CPU kernel could not be built: {problem}")
        self.app.display_warning(
            f"llmquant: installed without its CPU kernel ({problem}); packed layers will be slow"
        )


def build(root: Path) -> str | None:
    """Compile and put the library in place. None, or why it could not be."""
    compiler = _compiler()
    if compiler is None:
        return "no C++ compiler: install g++ or clang++, then install llmquant again"
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sources = [s for s in sorted((root / SOURCES).glob("*.cpp")) if x86 or s.stem not in X86]
    with (
        tempfile.TemporaryDirectory() as scratch,
        ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,
    ):
        objects = [Path(scratch) / f"{s.stem}.o" for s in sources]
        commands = [_commands(compiler, s, o) for s, o in zip(sources, objects, strict=True)]
        made = Path(scratch) / LIBRARY.name
        link = [
            *compiler,
            "-shared",
            "-o",
            str(made),
            *map(str, objects),
            *([] if sys.platform == "darwin" else ["-ldl"]),
        ]
        problem = next((p for p in pool.map(_run_first, commands) if p), None) or _run(link)
        if problem is None:
            # Renamed into place: a process that has the old one mapped keeps it whole.
            beside = (root / LIBRARY).with_suffix(".new")
            shutil.copyfile(made, beside)
            beside.replace(root / LIBRARY)
        return problem


def _commands(compiler: list[str], source: Path, made: Path) -> list[list[str]]:
    """What compiles a file, and what to do where that fails."""
    # Chosen codes and sums of 8-bit products are the same bits on every instruction set, and the
    # codes torch's, only if no multiplication is fused into an addition unasked.
    flags = [*FLAGS, "-ffp-contract=off"] if source.stem.startswith(("int8", "rounding")) else FLAGS
    ends = [X86.get(source.stem, []), *([[]] if source.stem in OPTIONAL else [])]
    return [[*compiler, *flags, *end, "-c", str(source), "-o", str(made)] for end in ends]


def _compiler() -> list[str] | None:
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    return next(
        ([found] for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None
    )


def _run_first(commands: list[list[str]]) -> str | None:
    """Run the first of these that works. None, or why the first did not."""
    problems: list[str] = []
    for command in commands:
        problem = _run(command)
        if problem is None:
            return None
        problems.append(problem)
    return problems[0]


def _run(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as e:
        return f"{command[0]}: {e}"
    if done.returncode == 0:
        return None
    lines = [
        line for line in done.stderr.splitlines() if "error" in line
    ] or done.stderr.splitlines()
    return f"{shlex.join(command[:1])}: {lines[0] if lines else f'exit code {done.returncode}'}"


def _platform_tag() -> str:
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


if __name__ == "__main__":
    sys.exit(build(Path(__file__).parent))
